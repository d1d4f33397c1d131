"""Rows of a placement plan: parameters, collectives, cache layers, and their sums."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax.sharding import PartitionSpec

from jaxinfer.sharding.collectives import STEPS, Collective

REPLICATION_NOTE = (
    "A replicated layer is copied to every device and computed on every device; none lies on the first device only."
)
"""Note shown with every plan."""


@dataclass(frozen=True)
class Row:
    """Placement of one parameter."""

    path: str
    """Path from the model's root, separated by dots."""
    module: str
    """Path of the enclosing module that a placement may name."""
    tactic: str
    """Placement of that module: "shard", "replicate", or "experts" for experts that are each on one device."""
    shape: tuple[int, ...]
    """Global shape."""
    dtype: str
    logical_axes: tuple[str | None, ...]
    spec: PartitionSpec
    """Mesh axes over which each axis is sharded."""
    device_bytes: int
    """Bytes on each device."""
    copies: int
    """Devices that hold the same shard."""
    checkpoint_bytes: int
    """Bytes of the checkpoint's weights in this dtype, without repeated heads and padding."""

    steps: tuple[str, ...]
    """Compiled steps that read the parameter."""

    def as_dict(self) -> dict[str, Any]:
        """Convert the row to plain JSON values."""
        spec = [list(axis) if isinstance(axis, tuple) else axis for axis in self.spec]
        spec += [None] * (len(self.shape) - len(spec))
        lists = {name: list(getattr(self, name)) for name in ("shape", "logical_axes", "steps")}
        return {**vars(self), **lists, "spec": spec}


@dataclass(frozen=True)
class Exchange:
    """One collective of a step, and the module that causes it."""

    module: str
    collective: Collective
    steps: tuple[str, ...]
    """Compiled steps with this collective."""
    row_bytes: int
    """Bytes per row (see `Collective.rows`), on each device."""

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain JSON values."""
        made = self.collective
        return {
            "module": self.module,
            "kind": made.kind,
            "what": made.what,
            "steps": list(self.steps),
            "row_bytes": self.row_bytes,
            "rows": made.rows,
        }


@dataclass(frozen=True)
class CacheLayer:
    """Cache memory of one layer, per block or per sequence."""

    layer: int
    """Index in model order, from 0; in encoder-decoder models self-attention precedes cross-attention."""
    replicated: bool
    """Whether every device holds the whole layer."""
    block_device_bytes: int = 0
    """Bytes of a block on each device; 0 for recurrent layers."""
    state_device_bytes: int = 0
    """Bytes of a sequence's recurrent state on each device, whatever its length; 0 for other layers."""
    encoded: bool = False
    """Whether blocks hold encoder positions instead of the sequence's own."""


@dataclass(frozen=True)
class CachePlan:
    """Cache memory: blocks per sequence length, and recurrent states per sequence."""

    block_size: int
    """Tokens per block."""
    layers: tuple[CacheLayer, ...]
    block_device_bytes: int
    """Bytes of a block of tokens in all layers, on each device."""
    encoded_block_device_bytes: int = 0
    """Bytes of a block of encoder positions in all layers, on each device; 0 without cross-attention."""
    sequences: int | None = None
    """Maximum number of running sequences; None if device memory is unknown or no layer has a state."""
    state_slots: int = 0
    """State slots at that number: for running sequences and for snapshots of cached prefixes."""

    @property
    def state_device_bytes(self) -> int:
        """Bytes of one sequence's state in all layers, on each device."""
        return sum(layer.state_device_bytes for layer in self.layers)

    @property
    def replicated_layers(self) -> tuple[int, ...]:
        """Layers whose cache is replicated on every device."""
        return tuple(layer.layer for layer in self.layers if layer.replicated)

    def tokens(self, device_bytes: int) -> int:
        """Return the tokens that fit beside the states, in whole blocks."""
        left = max(0, device_bytes - self.state_slots * self.state_device_bytes)
        return left // self.block_device_bytes * self.block_size

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain JSON values."""
        names = (
            "block_size",
            "block_device_bytes",
            "encoded_block_device_bytes",
            "state_device_bytes",
            "sequences",
            "state_slots",
        )
        return {name: getattr(self, name) for name in names} | {
            "replicated_layers": list(self.replicated_layers),
            "layers": [vars(layer) for layer in self.layers],
        }


@dataclass(frozen=True, repr=False)
class Placed:
    """Rows of a plan and their sums. All devices hold equal amounts."""

    mesh: Mapping[str, int]
    """Sizes of the mesh axes."""
    rows: tuple[Row, ...]
    exchanges: tuple[Exchange, ...]
    cache: CachePlan | None = None
    model: str = ""
    """Name of the model."""
    patterns: Mapping[str, str] = field(default_factory=dict)
    """Requested placement."""
    memory: int | None = None
    """Bytes of memory per device, if known."""
    share: float = 0.9
    """Share of it that weights, cache and steps may take together (`EngineConfig.gpu_memory_utilization`)."""
    step_bytes: int = 0
    """Bytes per device that steps need while they run, and of arrays beside the cache."""
    draft_bytes: int = 0
    """Bytes per device of a draft model's weights, which are not among `rows`."""

    @property
    def devices(self) -> int:
        """Number of devices."""
        return int(np.prod(list(self.mesh.values())))

    @property
    def device_bytes(self) -> int:
        """Bytes of weights on each device."""
        return sum(row.device_bytes for row in self.rows)

    @property
    def copied_bytes(self) -> int:
        """Bytes of weights that are the same on every device; 0 with a single device."""
        return sum(row.device_bytes for row in self.rows if row.copies == self.devices) if self.devices > 1 else 0

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of all weights in the checkpoint."""
        return sum(row.checkpoint_bytes for row in self.rows)

    @property
    def modules(self) -> dict[str, int]:
        """Bytes per device of every module including its submodules, by path; the model's path is empty."""
        sums: Counter[str] = Counter()
        for row in self.rows:
            parts = row.path.split(".")[:-1]
            for end in range(len(parts) + 1):
                sums[".".join(parts[:end])] += row.device_bytes
        return dict(sums)

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of all steps: those every model has, and others with collectives."""
        return tuple(dict.fromkeys([*STEPS, *(step for exchange in self.exchanges for step in exchange.steps)]))

    def collectives(self, step: str) -> dict[str, int]:
        """Count a step's collectives by kind, as compiled for GPUs with greedy sampling."""
        return dict(Counter(e.collective.kind for e in self.exchanges if step in e.steps))

    @property
    def cache_bytes(self) -> int | None:
        """Bytes available to the cache on each device; None if device memory is unknown."""
        if self.memory is None:
            return None
        return max(0, int(self.memory * self.share) - self.device_bytes - self.draft_bytes - self.step_bytes)

    @property
    def tokens(self) -> int | None:
        """Tokens that fit in the cache; None if unknown."""
        return None if self.cache is None or self.cache_bytes is None else self.cache.tokens(self.cache_bytes)
