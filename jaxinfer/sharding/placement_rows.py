"""The rows of a plan: parameters, collectives and the cache of each layer, and their sums."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax.sharding import PartitionSpec

from jaxinfer.sharding.collectives import STEPS, Collective

EVERYWHERE = (
    "A replicated layer is copied to every device and computed on every device; none lies on the first device only."
)
"""What a reader of any plan must know."""


@dataclass(frozen=True)
class Row:
    """One parameter."""

    path: str
    """From the model's root, dots between."""
    module: str
    """The module around it that a placement may name."""
    tactic: str
    """Of that module: "shard" or "replicate"; of experts that lie whole on one device each, "experts"."""
    shape: tuple[int, ...]
    """Over all devices."""
    dtype: str
    logical_axes: tuple[str | None, ...]
    spec: PartitionSpec
    """Mesh axes that its axes are divided over."""
    device_bytes: int
    """On each device that has a part of it, which is every one."""
    copies: int
    """Devices that hold the same numbers."""
    checkpoint_bytes: int
    """Of the checkpoint's numbers in this dtype, once: without what is repeated or filled up with zeroes."""

    steps: tuple[str, ...]
    """The compiled steps that read it."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        spec = [list(axis) if isinstance(axis, tuple) else axis for axis in self.spec]
        spec += [None] * (len(self.shape) - len(spec))
        lists = {name: list(getattr(self, name)) for name in ("shape", "logical_axes", "steps")}
        return {**vars(self), **lists, "spec": spec}


@dataclass(frozen=True)
class Exchange:
    """One collective of a step, and who causes it."""

    module: str
    collective: Collective
    steps: tuple[str, ...]
    """The compiled steps that have it."""
    row_bytes: int
    """For each of `collective.rows`, on each device."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
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
    """What one layer keeps: of each block, or of each sequence."""

    layer: int
    """From 0, in the order of the model; of an encoder-decoder, first attention and then cross-attention."""
    replicated: bool
    """Whether every device has all of it."""
    block_device_bytes: int = 0
    """A block, on each device; 0 for a recurrent layer."""
    state_device_bytes: int = 0
    """The state of a sequence, on each device, whatever its length; 0 for layers other than recurrent ones."""
    encoded: bool = False
    """Whether its blocks hold positions of what an encoder reads, and not of the sequence itself."""


@dataclass(frozen=True)
class CachePlan:
    """What the cache takes: blocks by the length of a sequence, and the states of recurrent layers by the sequence."""

    block_size: int
    """Tokens of a block."""
    layers: tuple[CacheLayer, ...]
    block_device_bytes: int
    """A block of tokens in all layers, on each device."""
    encoded_block_device_bytes: int = 0
    """A block of an encoder's positions in all layers, on each device; 0 without cross-attention."""
    sequences: int | None = None
    """Sequences that run at a time at most; None where the device's memory is not known, or no layer has a state."""
    state_slots: int = 0
    """States for which the cache has room then: those of running sequences, and snapshots of cached prefixes."""

    @property
    def state_device_bytes(self) -> int:
        """The state of one sequence in all layers, on each device."""
        return sum(layer.state_device_bytes for layer in self.layers)

    @property
    def replicated_layers(self) -> tuple[int, ...]:
        """Those whose part of the cache every device has whole."""
        return tuple(layer.layer for layer in self.layers if layer.replicated)

    def tokens(self, device_bytes: int) -> int:
        """Count the tokens that fit beside the states, in whole blocks."""
        left = max(0, device_bytes - self.state_slots * self.state_device_bytes)
        return left // self.block_device_bytes * self.block_size

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
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
    """The rows of a plan and their sums. Every device holds as much."""

    mesh: Mapping[str, int]
    """Sizes of its axes."""
    rows: tuple[Row, ...]
    exchanges: tuple[Exchange, ...]
    cache: CachePlan | None = None
    model: str = ""
    """What it is called."""
    patterns: Mapping[str, str] = field(default_factory=dict)
    """The placement asked for."""
    memory: int | None = None
    """Bytes of a device, where they are known."""
    cache_share: float = 0.9
    """Of what the weights leave, the part that the cache takes (`EngineConfig.gpu_memory_utilization`)."""

    @property
    def devices(self) -> int:
        """Of the mesh."""
        return int(np.prod(list(self.mesh.values())))

    @property
    def device_bytes(self) -> int:
        """Weights on each device."""
        return sum(row.device_bytes for row in self.rows)

    @property
    def copied_bytes(self) -> int:
        """Of them, those that every device has alike; none where there is one device."""
        return sum(row.device_bytes for row in self.rows if row.copies == self.devices) if self.devices > 1 else 0

    @property
    def checkpoint_bytes(self) -> int:
        """Weights, each once."""
        return sum(row.checkpoint_bytes for row in self.rows)

    @property
    def modules(self) -> dict[str, int]:
        """Bytes a device of every module, those of its parts included; the model's own path is empty."""
        sums: Counter[str] = Counter()
        for row in self.rows:
            parts = row.path.split(".")[:-1]
            for end in range(len(parts) + 1):
                sums[".".join(parts[:end])] += row.device_bytes
        return dict(sums)

    @property
    def steps(self) -> tuple[str, ...]:
        """The kinds of steps that exchange something, and those that every model has."""
        return tuple(dict.fromkeys([*STEPS, *(step for exchange in self.exchanges for step in exchange.steps)]))

    def collectives(self, step: str) -> dict[str, int]:
        """How many of each kind a step has, in a program for GPUs that sample greedily."""
        return dict(Counter(e.collective.kind for e in self.exchanges if step in e.steps))

    @property
    def cache_bytes(self) -> int | None:
        """What the cache may take on each device; None where its memory is not known."""
        return None if self.memory is None else max(0, int((self.memory - self.device_bytes) * self.cache_share))

    @property
    def tokens(self) -> int | None:
        """Tokens that the cache holds then."""
        return None if self.cache is None or self.cache_bytes is None else self.cache.tokens(self.cache_bytes)
