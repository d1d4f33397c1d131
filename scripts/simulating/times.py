"""Models of the time that a step takes on a device: by its data sheet, or fitted to measurements."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from benchmarks.gpu.predict import COPY_SHARE, GAP, MATMUL_SHARE

from jaxinfer.kv.spec import Full, Lent
from jaxinfer.models.base import LanguageModel
from jaxinfer.sharding import Plan
from jaxinfer.sharding.collectives import DECODE, PREFILL
from jaxinfer.sharding.placement_rows import Row
from simulating.work import TERMS, Work, windows

KERNELS = 11
"""Kernels of a layer in a decode step compiled for an H100 (docs/results/gpu.md)."""
LINK, LATENCY = 0.7, 10e-6
"""Estimates for collectives: share of the link's bandwidth that they reach, and seconds that each takes beside it."""


class StepTimes(Protocol):
    """A model of step times."""

    def seconds(self, work: Work) -> float:
        """Return the seconds that the device takes."""
        ...

    def describe(self) -> str:
        """Return one sentence about the model."""
        ...


@dataclass(frozen=True)
class Device:
    """A GPU by its data sheet: dense bfloat16 rate, and the bandwidth of its link to other devices."""

    name: str
    memory: int
    """Bytes."""
    bandwidth: float
    """Bytes per second."""
    rate: float
    """Operations per second."""
    link: float
    """Bytes per second in one direction."""


GIB = 2**30
DEVICES = {
    one.name: one
    for one in (
        Device("h100", 80 * GIB, 3.352e12, 989e12, 450e9),
        Device("h200", 141 * 10**9, 4.8e12, 989e12, 450e9),
        Device("a100-80", 80 * GIB, 2.039e12, 312e12, 300e9),
        Device("a100-40", 40 * GIB, 1.555e12, 312e12, 300e9),
        Device("l40s", 48 * GIB, 0.864e12, 362e12, 32e9),
        Device("l4", 24 * GIB, 0.3e12, 121e12, 32e9),
        Device("rtx4090", 24 * GIB, 1.008e12, 165e12, 32e9),
    )
}
"""NVIDIA's data sheets."""


class Roofline:
    """A step takes the longer of its bytes at the device's bandwidth and its operations at its rate, and launches.

    The shares of the peaks that kernels reach, and the gap between kernels, are those of `bench.py gpu --predict`.
    Experts that no token of a step chooses are not read: tokens are taken to choose independently.
    """

    def __init__(self, device: Device, module: LanguageModel, made: Plan, dtype_bytes: int):
        """Describe a model on a device.

        Args:
            device: the GPU.
            module: the model, which may be abstract.
            made: its plan, for what each device holds and what steps exchange.
            dtype_bytes: bytes of an element of the cache.
        """
        self._device, self._made = device, made
        moe = getattr(module.config, "moe", None) or getattr(module.config, "experts", None)
        used = [row for row in made.rows if DECODE in row.steps]
        if any(row.path.startswith("head.") for row in used):  # of a table that is not tied, steps read few rows
            used = [row for row in used if not row.path.startswith("embedding.")]
        used = [row for row in used if not row.path.startswith("inputs.embedding.")]
        routed = [row for row in used if moe is not None and _of_experts(row, moe.experts)]
        plain = [row for row in used if row not in routed]
        self._plain, self._plain_elements = sum(r.device_bytes for r in plain), _elements(plain)
        self._experts, self._expert_elements = sum(r.device_bytes for r in routed), _elements(routed)
        self._chosen = moe.per_token / moe.experts if routed else 0.0
        self._state = 0 if made.cache is None else made.cache.state_device_bytes
        shards, group, layers = made.devices, module.config.query_group, Counter()
        specs = module.cache_specs()
        for spec in specs:
            spec = specs[spec.lender] if isinstance(spec, Lent) else spec  # which reads the same keys
            if isinstance(spec, Full) and not spec.kind.encoded:
                layers[getattr(spec.kind, "size", None)] += spec.heads_on(shards) / shards * spec.head_dim
        elements = [layers[size] for size in windows(module.cache_specs())]
        self._kv, self._pair = [2 * n * dtype_bytes for n in elements], [4 * n * group for n in elements]
        self._layers = len(module.cache_specs())

    def seconds(self, work: Work) -> float:
        """Return the seconds of a step."""
        device = self._device
        read = 1 - (1 - self._chosen) ** work.tokens
        size = self._plain + self._experts * read + sum(a * b for a, b in zip(self._kv, work.kv, strict=True))
        size += 2 * self._state * work.rows
        operations = 2 * work.tokens * (self._plain_elements + self._expert_elements * self._chosen)
        operations += sum(a * b for a, b in zip(self._pair, work.pairs, strict=True))
        device_time = max(size / (COPY_SHARE * device.bandwidth), operations / (MATMUL_SHARE * device.rate))
        return device_time + GAP * KERNELS * self._layers + self._exchanged(work)

    def _exchanged(self, work: Work) -> float:
        kind = DECODE if work.decode else PREFILL
        calls = [one for one in self._made.exchanges if kind in one.steps]
        if self._made.devices == 1 or not calls:
            return 0.0
        size = sum(one.row_bytes for one in calls) * work.tokens
        return len(calls) * LATENCY + size / (LINK * self._device.link)

    def describe(self) -> str:
        """Return one sentence about the model."""
        d = self._device
        return (
            f"{d.name} by its data sheet: {COPY_SHARE:.0%} of {d.bandwidth / 1e12:.2f} TB/s, {MATMUL_SHARE:.0%} of "
            f"{d.rate / 1e12:.0f} TFLOP/s, {1e6 * GAP:.0f} us for each of {KERNELS} kernels a layer; never run on one"
        )


def _elements(rows: Sequence[Row]) -> float:
    """Return the elements of weights that each device holds. Codes of 4 bits lie two a byte."""
    weights = [row for row in rows if not row.path.endswith(("_scale", "_zero"))]
    return float(
        sum(row.device_bytes * (2 if row.dtype == "uint8" else 1 / np.dtype(row.dtype).itemsize) for row in weights)
    )


def _of_experts(row: Row, experts: int) -> bool:
    """Return whether a parameter has a slice for each routed expert."""
    return (
        row.path.split(".")[-2] in ("down", "gate_up", "gate", "up")
        and len(row.shape) > 2
        and (row.shape[0] == experts)
    )


@dataclass(frozen=True)
class Measured:
    """Step times that are linear in `TERMS`, fitted to those of a machine."""

    model: str
    seconds_per: dict[str, float]
    """Seconds for one of each term."""
    steps: int
    """Number of measured steps."""
    median_error: float
    """Median of |fitted / measured - 1| over the measured steps."""
    total_error: float
    """Sum of the fitted seconds over the sum of the measured ones, less 1."""

    @classmethod
    def fit(cls, model: str, steps: Sequence[Sequence[Work]], seconds: Sequence[float]) -> "Measured":
        """Fit by non-negative least squares of relative errors.

        Args:
            model: the model's name.
            steps: the work of each measured step, which may be several launches.
            seconds: its time.

        Raises:
            ValueError: there are fewer steps than terms.
        """
        from scipy.optimize import nnls

        if len(steps) < len(TERMS):
            raise ValueError(f"{len(steps)} steps were measured, fewer than the {len(TERMS)} terms; use a longer trace")
        table = np.array([np.sum([work.features for work in step], axis=0) for step in steps])
        times = np.array(seconds)
        # One slow step (another process on the machine) must not decide: weights of relative errors, twice, the second
        # time without the steps that are far off.
        kept = np.ones(len(times), bool)
        for _ in range(2):
            found = nnls(table[kept] / times[kept, None], np.ones(kept.sum()))[0]
            errors = np.abs(table @ found / times - 1)
            kept = errors <= max(3 * float(np.median(errors)), 0.05)
        fitted = table @ found
        return cls(
            model,
            dict(zip(TERMS, map(float, found), strict=True)),
            len(times),
            float(np.median(np.abs(fitted / times - 1))),
            float(fitted.sum() / times.sum() - 1),
        )

    @classmethod
    def read(cls, path: Path) -> "Measured":
        """Read a file that `write` made.

        Raises:
            ValueError: it is not one.
        """
        try:
            found = cls(**json.loads(path.read_text(encoding="utf-8")))
            if set(found.seconds_per) != set(TERMS):
                raise ValueError(f"its terms are not {', '.join(TERMS)}")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a file of --measure ({error}); make it again") from None
        return found

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def seconds(self, work: Work) -> float:
        """Return the seconds of a step."""
        return float(np.dot(work.features, [self.seconds_per[name] for name in TERMS]))

    def describe(self) -> str:
        """Return one sentence about the model."""
        return (
            f"fitted to {self.steps} steps of {self.model}: median error of a step {self.median_error:.1%}, of all "
            f"together {self.total_error:+.1%}"
        )
