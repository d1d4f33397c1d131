"""Blocks of what encoders read: written once, shared by all whose input is the same, found again until they are
evicted.

The keys and values of an input's positions lie in `ceil(S / P)` logical blocks, each an id in every group of cross
layers. A position depends on the whole input, so that the blocks are of use together only: a hit is all of them or
none. They are nodes of the prefix index (`kv.prefix`), in a chain whose root follows from what the input is:

    root = sha256(salt, digest, S) -> d0 = sha256(root | 0 .. P-1 | identity) -> d1 = sha256(d0 | P .. 2P-1) -> ...

Where a prefix block has token ids a block here has the numbers of its positions; the first one has the input's identity
beside them, so that a hit is compared on the content and not on a digest alone. No block changes once it is written,
the last and partial one included, so that forks share all and copy none.

Until the step that writes them is dispatched blocks are not in the index; others admitted to the same step share them,
as encoders run before all else in a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from jaxinfer.kv.groups import KindGroups, encoded
from jaxinfer.kv.prefix import Extras, PrefixIndex, block_digest, root


@dataclass(frozen=True)
class Encoded:
    """What one request's encoder reads, as the cache knows it."""

    salt: bytes
    """Of the request: model, and the caller's own."""
    digest: bytes
    """Of the input."""
    identity: bytes
    """The input itself, or what stands for it (`media.EncoderInput.identity`)."""
    length: int
    """S: positions; at least 1."""
    block_size: int

    @cached_property
    def root(self) -> bytes:
        """The parent of its first block."""
        return root(b"encoded", self.salt, self.digest, str(self.length).encode())

    @cached_property
    def numbers(self) -> np.ndarray:
        """`[n * P]` what stands for token ids: the numbers of its positions, and of places that are none."""
        return np.arange(-(-self.length // self.block_size) * self.block_size, dtype=np.int32)

    @property
    def extras(self) -> Extras:
        """What the content of a block is beside that."""
        return {0: self.identity}

    @property
    def blocks(self) -> int:
        """n."""
        return len(self.numbers) // self.block_size

    def tokens(self, number: int) -> np.ndarray:
        """`[P]` of one block."""
        return self.numbers[number * self.block_size : (number + 1) * self.block_size]

    @cached_property
    def digests(self) -> list[bytes]:
        """Of its blocks."""
        made = [self.root]
        for number in range(self.blocks):
            made.append(block_digest(made[-1], self.tokens(number), self.extras.get(number, b"")))
        return made[1:]


class EncodedHit(NamedTuple):
    """What of an input is in the cache."""

    ids: np.ndarray
    """`[m, n]` int32 its blocks in each group of cross layers; `[m, 0]` where they are still to be computed."""
    content: Encoded | None
    """None: the sequence reads none."""
    missing: int = 0
    """Ids to be taken for it."""

    @property
    def length(self) -> int:
        """S."""
        return 0 if self.content is None else self.content.length


NOTHING_READ = EncodedHit(np.empty((0, 0), np.int32), None)


class EncodedBlocks:
    """Who is about to write which input, and the index of those that are written.

    `kinds`: of the model's layers; without cross-attention nothing is done here.
    """

    def __init__(self, kinds: Sequence[KindGroups], index: PrefixIndex, *, prefix_caching: bool = True):
        self.kind = encoded(kinds)
        self._number = len(kinds) - 1
        """Of the kind in the nodes of the index: the last."""
        self._index, self._caching = index, prefix_caching
        self._writing: dict[int, tuple[Encoded, np.ndarray]] = {}
        """By row: what the next step will write, and the blocks `[m, n]`."""

    def lookup(self, content: Encoded | None, published: np.ndarray) -> EncodedHit:
        """The blocks of an input, if all are there or about to be written; `published` `[N]`: the pool's marks."""
        if self.kind is None:
            return NOTHING_READ
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
        """The blocks `[m, n]` of a row that was admitted: those found, or `new` ones, which it is to have written."""
        if not hit.missing:
            return hit.ids
        ids = new.reshape(-1, self.kind.count).T
        self._writing[row] = hit.content, ids
        return ids

    def writes(self, row: int) -> np.ndarray | None:
        """The blocks `[m, n]` that a row is to have written by the next step; None: it found them, or reads none."""
        return self._writing[row][1] if row in self._writing else None

    def publish(self, row: int) -> list[int]:
        """Enters what a row has had written; the ids that the caller is to mark as published."""
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
        """A row goes, maybe before what it was to have written is."""
        self._writing.pop(row, None)
