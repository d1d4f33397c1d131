"""What a layer keeps: stated by the model, one entry a layer.

A kind says how long a layer needs what it keeps, and that is all that tables, release, prefix hits and eviction ask
of it: a new kind is one more class with `first_needed`. A spec is a kind with the shape of what is kept.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class Kind:
    """How long a layer needs what it keeps; layers that are equal in it share block tables."""

    whole: ClassVar[bool] = True
    """Whether a prompt's blocks are all needed at the same time; they are then taken at its admission, and otherwise
    chunk by chunk."""

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
