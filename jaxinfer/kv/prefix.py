"""The prefix index: which published block holds the keys and values of which tokens after which prefix.

A full block never changes, so its content is named by a chained digest: sha256 over the parent block's
digest and the block's tokens. The first parent is the root, derived from everything else the content
depends on (model, adapter, the caller's salt), so that nothing is found across two of those.

    root = sha256(salt) -> d0 = sha256(root | tokens[0:P] | extra[0]) -> d1 = sha256(d0 | tokens[P:2P] | extra[1]) -> ...

What only some of the blocks depend on is their extra: that of a block with tokens of an image names the image. Of text it
is empty.

The digest finds a block; whether it is the right one is decided on its tokens, its extra and its parent.
The index is mutable, and the engine changes it only when it commits a step. sha256 is the same in every
process, which Python's own `hash` is not.
"""

import hashlib
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple, TypeAlias

import numpy as np

from jaxinfer.kv.pool import BlockPool, Ids, PoolInvariantError

Tokens: TypeAlias = np.ndarray | bytes
"""Token ids as an integer array, or as the bytes of little-endian int32."""

Extras: TypeAlias = Mapping[int, bytes]
"""What beside its tokens decides a block's content, by its number in the sequence; nothing where it is not named."""

NO_EXTRAS: Extras = {}
_TOKEN_BYTES = 4


class MatchEnd(StrEnum):
    """Why a match went no further."""

    COMPLETE = "complete"
    """Every block that was asked for is there."""
    NO_FULL_BLOCK = "no full block"
    """The prompt is too short to be looked up."""
    ABSENT = "absent"
    """The next block was never published, or that was long ago."""
    EVICTED = "evicted"
    """The next block was here and has been evicted: a larger pool would have kept it."""
    COLLISION = "collision"
    """The digest is here with another content: refused."""


class Match(NamedTuple):
    """The blocks of the longest published prefix, first block first, and why it ends there."""

    ids: list[int]
    reason: MatchEnd


class _Entry(NamedTuple):
    block_id: int
    parent: bytes
    content: bytes
    """Its tokens and its extra."""


def block_digest(parent: bytes, tokens: Tokens, extra: bytes = b"") -> bytes:
    """The 32-byte digest of a block of tokens [P] that follows the block (or the root) `parent`."""
    return hashlib.sha256(parent + _as_bytes(tokens) + extra).digest()


def root(*salt: bytes) -> bytes:
    """The parent of a first block: 32 bytes that differ wherever any part of the salt differs."""
    # Each part carries its length, so that ("ab", "c") and ("a", "bc") stay apart.
    parts = b"".join(len(part).to_bytes(8, "little") + part for part in salt)
    return hashlib.sha256(b"jaxinfer prefix root" + parts).digest()


class PrefixIndex:
    """Published blocks by digest; one block a digest and one digest a block.

    `remember_evicted` digests of evicted blocks are kept, the latest, so that a miss can be told from a
    block that did not fit.
    """

    def __init__(self, block_size: int, remember_evicted: int = 65536) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}.")
        self.block_size = block_size
        self._remember = remember_evicted
        self._entries: dict[bytes, _Entry] = {}
        self._digests: dict[int, bytes] = {}
        self._evicted: dict[bytes, None] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._entries

    def chain(
        self, tokens: np.ndarray, root: bytes, start_digests: Sequence[bytes] = (), extras: Extras = NO_EXTRAS
    ) -> list[bytes]:
        """The digests of all full blocks of tokens [T]; only those after `start_digests` are computed.

        `start_digests` are the digests of the first blocks of the same tokens after the same root.
        """
        digests = list(start_digests)
        self.extend(digests, tokens, root, extras)
        return digests

    def extend(
        self, digests: list[bytes], tokens: np.ndarray, root: bytes, extras: Extras = NO_EXTRAS
    ) -> None:
        """Adds those of the full blocks of tokens [T] that are missing at the end of `digests`, in place."""
        size, first = self.block_size, len(digests)
        data, width = _as_bytes(tokens[first * size : len(tokens) // size * size]), size * _TOKEN_BYTES
        parent = digests[-1] if digests else root
        for number in range(len(data) // width):
            block = data[number * width : (number + 1) * width]
            parent = block_digest(parent, block, extras.get(first + number, b""))
            digests.append(parent)

    def match(
        self, digests: Sequence[bytes], tokens: np.ndarray, root: bytes, extras: Extras = NO_EXTRAS
    ) -> Match:
        """The published blocks of the longest prefix of tokens [T] whose blocks have these digests.

        The caller passes the digests of at most floor((T - 1) / P) blocks, so that at least one token
        is left to compute. Every block is compared on its tokens, its extra and its parent's digest.
        """
        if not digests:
            return Match([], MatchEnd.NO_FULL_BLOCK)
        width = self.block_size * _TOKEN_BYTES
        data = _as_bytes(tokens[: len(digests) * self.block_size])
        ids: list[int] = []
        parent = root
        for number, digest in enumerate(digests):
            entry = self._entries.get(digest)
            if entry is None:
                return Match(ids, MatchEnd.EVICTED if digest in self._evicted else MatchEnd.ABSENT)
            content = data[number * width : (number + 1) * width] + extras.get(number, b"")
            if entry.parent != parent or entry.content != content:
                return Match(ids, MatchEnd.COLLISION)
            ids.append(entry.block_id)
            parent = digest
        return Match(ids, MatchEnd.COMPLETE)

    def insert(self, digest: bytes, parent: bytes, tokens: Tokens, block_id: int, extra: bytes = b"") -> bool:
        """Enters a block with its tokens [P] and its extra; False if the digest is there already: the first one stays.

        After True the caller publishes the block in the pool. Raises ValueError if there are not P
        tokens, and PoolInvariantError if the block is here under another digest, which means that it
        was handed out again without having been evicted here.
        """
        block_id, data = int(block_id), _as_bytes(tokens)
        if len(data) != self.block_size * _TOKEN_BYTES:
            found = len(data) // _TOKEN_BYTES
            raise ValueError(f"tokens must be a full block of {self.block_size}, got {found} tokens.")
        if self._digests.get(block_id, digest) != digest:
            raise PoolInvariantError(f"block {block_id} is in the prefix index with another content.")
        if digest in self._entries:
            return False
        self._entries[digest] = _Entry(block_id, bytes(parent), data + extra)
        self._digests[block_id] = digest
        self._evicted.pop(digest, None)
        return True

    def evict(self, ids: Ids) -> None:
        """Takes the blocks out; ids that are not here (-1 among them) are passed over."""
        for block_id in np.asarray(ids, np.int64).tolist():
            digest = self._digests.pop(block_id, None)
            if digest is not None:
                del self._entries[digest]
                self._evicted[digest] = None
        while len(self._evicted) > self._remember:
            del self._evicted[next(iter(self._evicted))]

    def clear(self) -> None:
        """Forgets everything; the caller resets what the pool has published."""
        self._entries.clear()
        self._digests.clear()
        self._evicted.clear()

    def check(self, pool: BlockPool) -> None:
        """Raises PoolInvariantError unless each published block of the pool has one digest, and no other."""
        listed = {entry.block_id: digest for digest, entry in self._entries.items()}
        if listed != self._digests or len(listed) != len(self._entries):
            raise PoolInvariantError(
                f"{len(self._entries)} digests in the prefix index name {len(listed)} blocks, "
                f"{len(self._digests)} blocks name a digest: they must be the same pairs."
            )
        published = set(np.flatnonzero(np.asarray(pool.published)).tolist())
        if published != listed.keys():
            raise PoolInvariantError(
                f"the pool has {len(published)} published blocks, the prefix index {len(listed)}; only in "
                f"the pool: {sorted(published - listed.keys())[:8]}, only in the index: "
                f"{sorted(listed.keys() - published)[:8]}."
            )


def _as_bytes(tokens: Tokens) -> bytes:
    """Little-endian int32, so that a digest does not depend on the machine or the array's type."""
    return tokens if isinstance(tokens, bytes) else np.asarray(tokens, "<i4").tobytes()
