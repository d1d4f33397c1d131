"""Read bytes and operations of compiled steps, and the least time that a device needs for them."""

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.context import Context, Figures

TESTS = Path(__file__).resolve().parents[3] / "tests"

from jaxinfer.engine.runner.logits import SampleLogits


@dataclass(frozen=True)
class Cost:
    """What a step reads, writes and computes."""

    bytes: float
    """Operands and results of all kernels; of our own kernels only what the caller added."""
    flops: float
    kernels: int = 0

    def more(self, bytes: float = 0, flops: float = 0) -> "Cost":
        """Return the cost with that of our own kernels, which XLA does not know."""
        return Cost(self.bytes + bytes, self.flops + flops, self.kernels)

    def least(self, bandwidth: float, rate: float) -> float:
        """Return the seconds at `bandwidth` bytes and `rate` operations per second: the roofline."""
        return max(self.bytes / bandwidth, self.flops / rate)


def of(text: str, lowered: Any, kernels: int = 0) -> Cost:
    """Return the cost of a program: bytes from the compiled text, operations from the program before optimisation."""
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    from support.lowering import moved_bytes  # needs pytest

    return Cost(moved_bytes(text), float(product_flops(lowered.as_text())), kernels)


_FUNCTION = re.compile(r"func\.func (?:public |private )?@(\S+?)\(")
_CALL = re.compile(r"\bcall @(\S+?)\(")
_PRODUCT = re.compile(
    r"stablehlo\.dot_general .*contracting_dims = \[([\d, ]*)\].*: \(tensor<(\S+)>, tensor<\S+>\) -> tensor<(\S+)>"
)


def product_flops(text: str) -> int:
    """Return the floating-point operations of a StableHLO module's products, those of called functions at each call.

    XLA's own analysis needs a device.
    """
    own: dict[str, int] = {}
    calls: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if begins := _FUNCTION.search(line):
            name = begins[1]
            own[name], calls[name] = 0, []
        elif product := _PRODUCT.search(line):
            inner, left, result = product.groups()
            sizes = _sizes(left)
            own[name] += 2 * math.prod(_sizes(result)) * math.prod(sizes[int(axis)] for axis in inner.split(","))
        if called := _CALL.search(line):
            calls[name].append(called[1])

    def total(function: str) -> int:
        return own.get(function, 0) + sum(map(total, calls.get(function, ())))

    return total("main")


def _sizes(tensor: str) -> list[int]:
    return [int(size) for size in tensor.split("x")[:-1]]


def of_step(engine: Any, kind: str) -> Cost | None:
    """Return the cost of the engine's largest compiled step of a kind, "decode" or "prefill"; None if unknown."""
    programs = engine.runner.programs
    keys = [key for key in programs.seconds if getattr(key, "kind", "") == kind]
    key = max(keys, key=lambda key: key.tokens)
    try:
        step = of(programs.get(key).as_text(), programs.lower(key))
        samplers = [one for one in programs.seconds if isinstance(one, SampleLogits) and one.rows == key.logit_rows]
        if key.pending and samplers:
            sampler = min(samplers, key=lambda one: (one.level, one.logprobs))
            step = step.more(bytes=of(programs.get(sampler).as_text(), programs.lower(sampler)).bytes)
        return step
    except ImportError:  # no pytest here
        return None


def roofline(context: Context, seconds: float, cost: Cost | None) -> Figures:
    """Return the roofline of a step beside its measured seconds, by the bandwidth and rate measured in the same run."""
    if cost is None:
        return {}
    figures: Figures = {"roofline_bytes": cost.bytes, "roofline_flops": cost.flops}
    measured = context.figures("roofline")
    bandwidth, rate = (measured.get(name) for name in ("copy_gb_per_second", "matmul_square_tflops"))
    if bandwidth and rate:
        least = cost.least(1e9 * bandwidth, 1e12 * rate)
        figures |= {"roofline_ms": 1e3 * least, "share_of_roofline": least / seconds}
    return figures
