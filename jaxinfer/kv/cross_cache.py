"""Cache of encoder outputs for cross-attention: written once, shared by requests with equal input, cached until
evicted.

The keys and values of an input's S positions take `ceil(S / P)` logical blocks, each with one id per group of cross
layers. Encoder positions depend on the whole input, so a hit is all blocks of an input or none. The blocks are nodes of
the prefix index (`kv.prefix`), chained from a root that is derived from the input:

    root = sha256(salt, digest, S) -> d0 = sha256(root | 0 .. P-1 | identity) -> d1 = sha256(d0 | P .. 2P-1) -> ...

In place of token ids these nodes have the position numbers; the first node also has the input's identity, so that a hit
compares the content and not only a digest. Blocks never change once written, partial last blocks included, so forks
share them without copy-on-write.

Blocks enter the index when the step that writes them is dispatched. Requests admitted to the same step share them
before that, because encoders run at the start of a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from jaxinfer.kv.digests import Extras, block_digest, root
from jaxinfer.kv.groups import KindGroups, encoded
from jaxinfer.kv.prefix import PrefixIndex


@dataclass(frozen=True)
class Encoded:
    """Identity of the encoder input of one request."""

    salt: bytes
    """The caller's `cache_salt`."""
    digest: bytes
    """Digest of the input."""
    identity: bytes
    """Content of the input, or bytes that identify it (`media.EncoderInput.identity`)."""
    length: int
    """S: encoder positions; at least 1."""
    block_size: int

    @cached_property
    def root(self) -> bytes:
        """Parent digest of its first block."""
        return root(b"encoded", self.salt, self.digest, str(self.length).encode())

    @cached_property
    def numbers(self) -> np.ndarray:
        """Position numbers `[n * P]` used in place of token ids, rounded up to full blocks."""
        return np.arange(-(-self.length // self.block_size) * self.block_size, dtype=np.int32)

    @property
    def extras(self) -> Extras:
        """Extra content of blocks beside the position numbers: the identity, on the first block."""
        return {0: self.identity}

    @property
    def blocks(self) -> int:
        """Number of logical blocks, n."""
        return len(self.numbers) // self.block_size

    def tokens(self, number: int) -> np.ndarray:
        """Return the position numbers `[P]` of one block."""
        return self.numbers[number * self.block_size : (number + 1) * self.block_size]

    @cached_property
    def digests(self) -> list[bytes]:
        """Chained digests of its blocks."""
        made = [self.root]
        for number in range(self.blocks):
            made.append(block_digest(made[-1], self.tokens(number), self.extras.get(number, b"")))
        return made[1:]


class EncodedHit(NamedTuple):
    """Result of looking up an encoder input in the cache."""

    ids: np.ndarray
    """Block ids `[m, n]` int32 in each group of cross layers; `[m, 0]` on a miss."""
    content: Encoded | None
    """The encoder input; None if the sequence has none."""
    missing: int = 0
    """Block ids to allocate for it."""

    @property
    def length(self) -> int:
        """S, or 0 without an encoder input."""
        return 0 if self.content is None else self.content.length


NO_ENCODER_INPUT = EncodedHit(np.empty((0, 0), np.int32), None)


class EncodedBlocks:
    """Tracker of encoder inputs that are about to be written; looks up written ones in the prefix index.

    Does nothing for models without cross-attention layers.

    Args:
        kinds: the model's groups by kind.
        index: the prefix index, shared with the sequences' own blocks.
        prefix_caching: whether inputs are shared between requests.
    """

    def __init__(self, kinds: Sequence[KindGroups], index: PrefixIndex, *, prefix_caching: bool = True):
        self.kind = encoded(kinds)
        self._number = len(kinds) - 1
        """Number of the cross kind in the index's nodes: the last."""
        self._index, self._caching = index, prefix_caching
        self._writing: dict[int, tuple[Encoded, np.ndarray]] = {}
        """Maps a row to the input its next step writes, and the blocks `[m, n]` it is written to."""

    def lookup(self, content: Encoded | None, published: np.ndarray) -> EncodedHit:
        """Find the blocks of an input that is cached or about to be written.

        Args:
            content: the input; None if the sequence has none.
            published: the pool's flags of published blocks, `[N]` bool.
        """
        if self.kind is None:
            return NO_ENCODER_INPUT
        if content is None:
            return EncodedHit(np.empty((self.kind.count, 0), np.int32), None)
        nothing = EncodedHit(np.empty((self.kind.count, 0), np.int32), content, self.kind.count * content.blocks)
        if not self._caching:
            return nothing
        for other, ids in self._writing.values():
            if (other.root, other.identity, other.length) == (content.root, content.identity, content.length):
                return EncodedHit(ids, content)
        nodes = self._index.match(content.digests, content.numbers, content.root, content.extras).nodes
        if len(nodes) < content.blocks or not all(node.ids[self._number] for node in nodes):
            return nothing
        ids = np.array([node.ids[self._number] for node in nodes], np.int32).T
        return EncodedHit(ids, content) if published[ids].all() else nothing

    def take(self, row: int, hit: EncodedHit, new: np.ndarray) -> np.ndarray:
        """Return the blocks `[m, n]` of an admitted row: those of the hit, or the `new` ids, now to be written."""
        if not hit.missing:
            return hit.ids
        ids = new.reshape(-1, self.kind.count).T
        self._writing[row] = hit.content, ids
        return ids

    def writes(self, row: int) -> np.ndarray | None:
        """Return the blocks `[m, n]` that the next step writes for a row; None after a hit or without an input."""
        return self._writing[row][1] if row in self._writing else None

    def publish(self, row: int) -> list[int]:
        """Enter a row's written blocks in the index; return the ids the caller marks as published."""
        content, ids = self._writing.pop(row, (None, None))
        if content is None or not self._caching:
            return []
        entered, parent = [], content.root
        for number, digest in enumerate(content.digests):
            own, extra = ids[:, number].tolist(), content.extras.get(number, b"")
            if self._index.insert(digest, parent, content.tokens(number), own, self._number, extra):
                entered += own
            parent = digest
        return entered

    def leave(self, row: int) -> None:
        """Forget a row that leaves, even before its input is written."""
        self._writing.pop(row, None)
