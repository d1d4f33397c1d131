"""Cache specs: what each layer of a model stores, one spec per layer.

A kind says how long a layer needs its entries. Tables, release, prefix hits and eviction depend on nothing else, so a
new kind is one class with `first_needed`. A spec is a kind together with the shape of what is stored.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np

from jaxinfer.kernels.attention import quantised_cache


@dataclass(frozen=True)
class Kind:
    """How long a layer needs its cache entries; layers with equal kinds share block tables."""

    keeps_all: ClassVar[bool] = True
    """Whether all positions stay needed: a prompt's blocks are allocated at admission, otherwise chunk by chunk."""
    miss_reason: ClassVar[str] = "evicted under pressure"
    """Miss reason when a known prefix cannot be reused because a needed block is gone."""
    slots: ClassVar[bool] = False
    """Whether entries are stored in state slots and not in blocks (`kv.recurrent`)."""
    encoded: ClassVar[bool] = False
    """Whether entries belong to encoder positions and not to the sequence's own (`kv.cross_cache`)."""

    @property
    def name(self) -> str:
        """Name in metrics and messages."""
        return "full"

    def first_needed(self, length: Any) -> Any:
        """Return the first position that tokens from position `length` on still read, in [0, length]; int or array.

        Blocks before it may be released, and a prefix of `length` positions can be reused if everything from it on is
        cached. It never decreases as `length` grows.
        """
        return length * 0

    def most_needed(self, length: int) -> int:
        """Return the most positions before a token of the first `length` + 1 that it still reads."""
        return length - self.first_needed(length)

    def first_block(self, blocks: Any, block_size: int) -> Any:
        """Return the first block still needed after `blocks` blocks are written; int or array."""
        return self.first_needed(blocks * block_size) // block_size


@dataclass(frozen=True)
class Window(Kind):
    """Sliding window: a token at p sees positions (p - size, p]; or chunks of `size` positions: [p - p % size, p]."""

    keeps_all: ClassVar[bool] = False
    miss_reason: ClassVar[str] = "window evicted"

    size: int
    """Most positions a token sees, itself included; at least 1."""
    chunked: bool = False
    """Whether the window is one of chunks side by side, and does not slide."""

    @property
    def name(self) -> str:
        """Name in metrics and messages."""
        return f"{'chunked' if self.chunked else 'sliding'}({self.size})"

    def first_needed(self, length: Any) -> Any:
        """Return the first position that the token at `length` sees."""
        if self.chunked:
            return length - length % self.size
        behind = length - self.size + 1
        return behind * (behind > 0)

    def most_needed(self, length: int) -> int:
        """Return the most positions before a token of the first `length` + 1 that it still reads."""
        return min(length, self.size - 1)  # of chunks, the last token of one reads the most


@dataclass(frozen=True)
class Encoded(Kind):
    """Encoder positions: all written before the first token is computed, and needed to the end."""

    encoded: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """Name in metrics and messages."""
        return "cross"


@dataclass(frozen=True)
class Recurrent(Kind):
    """One state for all positions up to a point, stored in slots at some block boundaries (`kv.recurrent`)."""

    keeps_all: ClassVar[bool] = False
    slots: ClassVar[bool] = True
    miss_reason: ClassVar[str] = "no snapshot at that boundary"

    @property
    def name(self) -> str:
        """Name in metrics and messages."""
        return "recurrent"

    def first_needed(self, length: Any) -> Any:
        """Return the last position: the state after it is stored with its block."""
        behind = length - 1
        return behind * (behind > 0)


@dataclass(frozen=True)
class Full:
    """Keys and values of every position, in blocks that never change once full."""

    kv_heads: int
    """K of the layer, padding included; the cache repeats heads if there are more shards than heads."""
    head_dim: int
    """D."""
    replicated: bool = False
    """Whether every device computes the whole layer and stores all its heads (`sharding.policy`)."""
    codes: np.dtype | None = None
    """Format of keys and values that are stored quantised (`kernels.attention.quantised_cache`); None for the model's
    dtype."""

    def row_bytes(self, itemsize: int) -> int:
        """Return the bytes of one position's keys, or values, in one head; `itemsize` is that of the model's dtype."""
        if self.codes is None:
            return self.head_dim * itemsize
        return self.head_dim * self.codes.itemsize + quantised_cache.SCALE.itemsize

    def heads_on(self, tp: int) -> int:
        """Return K of the cache array over `tp` shards."""
        return self.kv_heads if self.replicated or tp % self.kv_heads else tp

    def block_bytes(self, block_size: int, itemsize: int, tp: int) -> int:
        """Return the bytes of one block of this layer, keys and values, over all `tp` shards."""
        copies = tp if self.replicated else 1
        return 2 * self.heads_on(tp) * copies * block_size * self.row_bytes(itemsize)

    @property
    def kind(self) -> Kind:
        """How long entries are needed."""
        return Kind()

    @property
    def array_spec(self) -> "Full":
        """Spec of the cache array, without the kind."""
        return Full(self.kv_heads, self.head_dim, self.replicated, self.codes)


@dataclass(frozen=True)
class Sliding(Full):
    """Keys and values of the last `window` positions; blocks behind the window are released."""

    window: int = field(kw_only=True)
    """Most positions a token sees, itself included."""
    chunked: bool = field(default=False, kw_only=True)
    """Whether the window is one of chunks side by side, and does not slide."""

    @property
    def kind(self) -> Kind:
        """How long entries are needed."""
        return Window(self.window, self.chunked)


@dataclass(frozen=True)
class Cross(Full):
    """Keys and values of encoder positions, which decoder tokens attend to."""

    @property
    def kind(self) -> Kind:
        """How long entries are needed."""
        return Encoded()


@dataclass(frozen=True)
class Lent:
    """Keys and values of an earlier layer: the layer attends to these and stores nothing (Gemma 4)."""

    lender: int
    """Number of the layer that stores them."""
    replicated: bool = False
    """Whether each device has all heads of the layer; the lender's placement must be the same."""

    @property
    def kind(self) -> Kind:
        """How long entries of its own, of which it has none, are needed."""
        return Kind()

    def block_bytes(self, block_size: int, itemsize: int, tp: int) -> int:
        """Return the bytes of one block of this layer."""
        return 0


@dataclass(frozen=True)
class Latent(Full):
    """MLA latents: one vector of `head_dim` columns per position, the keys of all heads and, in its first columns,
    their values.

    Replicated on every device, because all heads read it. See `kernels.attention.latent`.
    """

    kv_heads: int = field(default=1, init=False)
    replicated: bool = field(default=True, init=False)

    def block_bytes(self, block_size: int, itemsize: int, tp: int) -> int:
        """Return the bytes of one block of this layer, over all `tp` shards."""
        return tp * block_size * self.row_bytes(itemsize)

    @property
    def array_spec(self) -> "Full":
        """Spec of the cache array."""
        return self


class StateArray(NamedTuple):
    """Shape of one array of a recurrent layer's state, for one slot."""

    shape: tuple[int, ...]
    """Shape over all shards."""
    axes: tuple[str | None, ...]
    """Logical axis names, as on a parameter."""
    dtype: np.dtype


@dataclass(frozen=True)
class State:
    """State of a recurrent layer: one per prefix, not one per position."""

    arrays: tuple[StateArray, ...]
    """Named tuple of the layer's own type; in the cache the same type holds arrays `[slots, *shape]`."""
    replicated: bool = False
    """Whether every device computes the whole layer."""

    @property
    def kind(self) -> Kind:
        """How long entries are needed."""
        return Recurrent()

    def slot_bytes(self, tp: int) -> int:
        """Return the bytes of one slot of this layer, over all `tp` shards."""
        copies = tp if self.replicated else 1
        return copies * sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in self.arrays)


Spec: TypeAlias = Full | Lent | State
"""What a layer stores."""


def with_codes(specs: Sequence[Spec], kv_cache_dtype: str) -> tuple[Spec, ...]:
    """Return the specs of layers whose keys and values are stored as `EngineConfig.kv_cache_dtype` says.

    Recurrent states are unchanged: they are computed again from themselves in each step, so that errors would add up.
    """
    codes = quantised_cache.format_of(kv_cache_dtype)
    return tuple(replace(spec, codes=codes) if isinstance(spec, Full) else spec for spec in specs)
