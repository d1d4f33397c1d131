"""What a layer keeps: stated by the model, one entry a layer.

A kind says how long a layer needs what it keeps, and that is all that tables, release, prefix hits and eviction ask
of it: a new kind is one more class with `first_needed`. A spec is a kind with the shape of what is kept.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Kind:
    """How long a layer needs what it keeps; layers that are equal in it share block tables."""

    whole: ClassVar[bool] = True
    """Whether a prompt's blocks are all needed at the same time; they are then taken at its admission, and otherwise
    chunk by chunk."""
    absent: ClassVar[str] = "evicted under pressure"
    """Why a known prefix cannot be gone on from where some of what is needed is gone."""
    slots: ClassVar[bool] = False
    """Whether it is kept in slots of its own and not in blocks (`kv.recurrent`)."""
    encoded: ClassVar[bool] = False
    """Whether what is kept is of an encoder's positions, and not of the sequence's own (`kv.encoded`)."""

    @property
    def name(self) -> str:
        """In metrics and messages."""
        return "full"

    def first_needed(self, length: Any) -> Any:
        """The first position that tokens from position `length` on still read, of [0, length]; an int or an array.

        What lies before it may be released, and a prefix of `length` positions can be gone on from where all from there
        on is kept. It never decreases with `length`.
        """
        return length * 0

    def first_block(self, blocks: Any, block_size: int) -> Any:
        """The number of the first block that is needed where so many are written; an int or an array."""
        return self.first_needed(blocks * block_size) // block_size


@dataclass(frozen=True)
class Window(Kind):
    """The positions (p - size, p] that a token at p sees."""

    whole: ClassVar[bool] = False
    absent: ClassVar[str] = "window evicted"

    size: int
    """Positions, the token's own among them; at least 1."""

    @property
    def name(self) -> str:
        """In metrics and messages."""
        return f"sliding({self.size})"

    def first_needed(self, length: Any) -> Any:
        """The first position that the token at `length` sees."""
        behind = length - self.size + 1
        return behind * (behind > 0)


@dataclass(frozen=True)
class Encoded(Kind):
    """The positions of what an encoder read: written once, all before the first token is computed, and needed to the
    end."""

    encoded: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """In metrics and messages."""
        return "cross"


@dataclass(frozen=True)
class Recurrent(Kind):
    """One state for all positions up to some, kept in slots of its own at some block boundaries (`kv.recurrent`)."""

    whole: ClassVar[bool] = False
    slots: ClassVar[bool] = True
    absent: ClassVar[str] = "no snapshot at that boundary"

    @property
    def name(self) -> str:
        """In metrics and messages."""
        return "recurrent"

    def first_needed(self, length: Any) -> Any:
        """The last position: the state after it is kept with its block."""
        behind = length - 1
        return behind * (behind > 0)


@dataclass(frozen=True)
class Full:
    """Keys and values of every position, in blocks that never change once full."""

    kv_heads: int
    """K of the layer, padded ones included; the cache repeats heads where there are more shards."""
    head_dim: int
    """D."""
    replicated: bool = False
    """Whether the layer is computed whole on every device: each then has all heads (`sharding.policy`)."""

    def heads_on(self, tp: int) -> int:
        """K of the array over `tp` shards."""
        return self.kv_heads if self.replicated or tp % self.kv_heads else tp

    def block_bytes(self, block_size: int, itemsize: int, tp: int) -> int:
        """Bytes of one block of this layer, keys and values, over all `tp` shards."""
        copies = tp if self.replicated else 1
        return 2 * self.heads_on(tp) * copies * block_size * self.head_dim * itemsize

    @property
    def kind(self) -> Kind:
        """How long it is needed."""
        return Kind()

    @property
    def lane(self) -> "Full":
        """The arrays it needs, whatever its kind."""
        return Full(self.kv_heads, self.head_dim, self.replicated)


@dataclass(frozen=True)
class Sliding(Full):
    """The same of the last `window` positions: blocks behind the window of every holder are released."""

    window: int = field(kw_only=True)
    """Positions a token sees, itself included."""

    @property
    def kind(self) -> Kind:
        """How long it is needed."""
        return Window(self.window)


@dataclass(frozen=True)
class Cross(Full):
    """Keys and values of an encoder's positions, which the tokens of a decoder attend to."""

    @property
    def kind(self) -> Kind:
        """How long it is needed."""
        return Encoded()


@dataclass(frozen=True)
class Latent(Full):
    """One latent a position, of `head_dim` columns: keys for all heads, and values in its first columns
    (`kernels.latent`).

    It is whole on every device, as all heads there are need it.
    """

    kv_heads: int = field(default=1, init=False)
    replicated: bool = field(default=True, init=False)

    def block_bytes(self, block_size: int, itemsize: int, tp: int) -> int:
        """Bytes of one block of this layer, over all `tp` shards."""
        return tp * block_size * self.head_dim * itemsize

    @property
    def lane(self) -> "Full":
        """The array it needs."""
        return self


class StateArray(NamedTuple):
    """One array of a recurrent layer's state, of one slot."""

    shape: tuple[int, ...]
    """Over all shards."""
    axes: tuple[str | None, ...]
    """Logical, as on a parameter."""
    dtype: np.dtype


@dataclass(frozen=True)
class State:
    """What a recurrent layer keeps: not of each position but of all up to one."""

    arrays: tuple[StateArray, ...]
    """A named tuple of the layer's own; its arrays in the cache, `[N, *shape]` over slots, are another of the same
    type."""
    replicated: bool = False
    """Whether the layer is computed whole on every device."""

    @property
    def kind(self) -> Kind:
        """How long it is needed."""
        return Recurrent()

    def slot_bytes(self, tp: int) -> int:
        """Bytes of one slot of this layer, over all `tp` shards."""
        copies = tp if self.replicated else 1
        return copies * sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in self.arrays)
