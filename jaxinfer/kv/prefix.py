"""The prefix index: which published block holds the keys and values of which tokens after which prefix.

A full block never changes, so its content is named by a chained digest: sha256 over the parent block's
digest and the block's tokens. The first parent is the root, derived from everything else the content
depends on (model, adapter, the caller's salt), so that nothing is found across two of those.

    root = sha256(salt) -> d0 = sha256(root | tokens[0:P] | extra[0]) -> d1 = sha256(d0 | tokens[P:2P] | extra[1]) ->
    ...

What only some of the blocks depend on is their extra: that of a block with tokens of an image names the image. Of text
it is empty.

The digest finds a block; whether it is the right one is decided on its tokens, its extra and its parent.
Layers of all kinds share the tree; at each node every kind has its own blocks, or none.
The index is mutable, and the engine changes it only when it commits a step. sha256 is the same in every
process, which Python's own `hash` is not.
"""

import hashlib
from collections import Counter
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
TOKEN_BYTES = 4
"""Of a token's id, as it is hashed and compared."""


class MatchEnd(StrEnum):
    """Why a match went no further."""

    COMPLETE = "complete"
    """Every block that was asked for is there."""
    NO_FULL_BLOCK = "below one block"
    """The prompt is too short to be looked up."""
    ABSENT = "absent"
    """The next block was never published, or that was long ago."""
    EVICTED = "evicted under pressure"
    """The next block was here and has been evicted: a larger pool would have kept it."""
    WINDOW = "window evicted"
    """The prefix is known, but of the blocks that a window before its end needs one has been evicted."""
    SALT = "salt differs"
    """The first block's tokens are here, under another model, adapter, image or salt."""
    COLLISION = "collision"
    """The digest is here with another content: refused."""


class Node:
    """A block of tokens after a prefix, and where its keys and values are kept; the nodes form a tree of prefixes."""

    __slots__ = ("children", "content", "digest", "ids", "linked", "parent")

    def __init__(self, digest: bytes, parent: bytes, content: bytes, kinds: int) -> None:
        self.digest, self.parent = digest, parent
        self.content = content
        """Its tokens and its extra."""
        self.ids: list[tuple[int, ...]] = [()] * kinds
        """A kind's blocks, one a group; () where it has none, as behind a window."""
        self.children = 0
        """Nodes that follow it."""
        self.linked = False
        """Whether its parent is a node, which counts it; not where it is the first block of a prefix."""


class Match(NamedTuple):
    """The nodes of the longest known prefix, first block first, and why it ends there."""

    nodes: list[Node]
    reason: MatchEnd


def block_digest(parent: bytes, tokens: Tokens, extra: bytes = b"") -> bytes:
    """The 32-byte digest of a block of tokens [P] that follows the block (or the root) `parent`."""
    return hashlib.sha256(parent + as_bytes(tokens) + extra).digest()


def root(*salt: bytes) -> bytes:
    """The parent of a first block: 32 bytes that differ wherever any part of the salt differs."""
    # Each part carries its length, so that ("ab", "c") and ("a", "bc") stay apart.
    parts = b"".join(len(part).to_bytes(8, "little") + part for part in salt)
    return hashlib.sha256(b"jaxinfer prefix root" + parts).digest()


class PrefixIndex:
    """The tree of published prefixes: of each node the blocks of every kind of layer that has them.

    A node stays while it or one that follows it has blocks, so that a hit whose first blocks are gone, as behind a
    window, is still compared token by token. `remember_evicted` digests of nodes that went are kept, the latest, so
    that a miss can be told from a block that did not fit.
    """

    def __init__(self, block_size: int, remember_evicted: int = 65536, kinds: int = 1) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}.")
        self.block_size = block_size
        self._remember = remember_evicted
        self.kinds = kinds
        self._nodes: dict[bytes, Node] = {}
        self._owners: dict[int, Node] = {}
        self._heads: Counter[bytes] = Counter()
        self._evicted: dict[bytes, None] = {}

    def __len__(self) -> int:
        """Blocks in it."""
        return len(self._owners)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._nodes

    def chain(
        self, tokens: np.ndarray, root: bytes, start_digests: Sequence[bytes] = (), extras: Extras = NO_EXTRAS
    ) -> list[bytes]:
        """The digests of all full blocks of tokens [T]; only those after `start_digests` are computed.

        `start_digests` are the digests of the first blocks of the same tokens after the same root.
        """
        digests = list(start_digests)
        self.extend(digests, tokens, root, extras)
        return digests

    def extend(self, digests: list[bytes], tokens: np.ndarray, root: bytes, extras: Extras = NO_EXTRAS) -> None:
        """Adds those of the full blocks of tokens [T] that are missing at the end of `digests`, in place."""
        size, first = self.block_size, len(digests)
        data, width = as_bytes(tokens[first * size : len(tokens) // size * size]), size * TOKEN_BYTES
        parent = digests[-1] if digests else root
        for number in range(len(data) // width):
            block = data[number * width : (number + 1) * width]
            parent = block_digest(parent, block, extras.get(first + number, b""))
            digests.append(parent)

    def match(self, digests: Sequence[bytes], tokens: np.ndarray, root: bytes, extras: Extras = NO_EXTRAS) -> Match:
        """The nodes of the longest known prefix of tokens [T] whose blocks have these digests.

        The caller passes the digests of at most floor((T - 1) / P) blocks, so that at least one token
        is left to compute. Every block is compared on its tokens, its extra and its parent's digest.
        """
        if not digests:
            return Match([], MatchEnd.NO_FULL_BLOCK)
        width = self.block_size * TOKEN_BYTES
        data = as_bytes(tokens[: len(digests) * self.block_size])
        found: list[Node] = []
        parent = root
        for number, digest in enumerate(digests):
            node = self._nodes.get(digest)
            content = data[number * width : (number + 1) * width] + extras.get(number, b"")
            if node is None:
                return Match(found, self._missing(digest, content, number))
            if node.parent != parent or node.content != content:
                return Match(found, MatchEnd.COLLISION)
            found.append(node)
            parent = digest
        return Match(found, MatchEnd.COMPLETE)

    def _missing(self, digest: bytes, content: bytes, number: int) -> MatchEnd:
        if digest in self._evicted:
            return MatchEnd.EVICTED
        return MatchEnd.SALT if number == 0 and self._heads[content] else MatchEnd.ABSENT

    def nodes(self, digests: Sequence[bytes]) -> list[Node]:
        """Those of the nodes of these digests that are here."""
        return [self._nodes[digest] for digest in digests if digest in self._nodes]

    def insert(
        self,
        digest: bytes,
        parent: bytes,
        tokens: Tokens,
        ids: Sequence[int] = (),
        kind: int = 0,
        extra: bytes = b"",
    ) -> bool:
        """Enters a block of tokens [P] and its extra with its ids in the groups of a kind; False if it has some: the
        first stay.

        Without ids the node is only made. After True the caller publishes the blocks in the pool. Raises ValueError if
        there are not P tokens, and PoolInvariantError if a block is here under another digest, which means that it was
        handed out again without having been evicted here.
        """
        data, node = as_bytes(tokens), self._nodes.get(digest)
        if len(data) != self.block_size * TOKEN_BYTES:
            found = len(data) // TOKEN_BYTES
            raise ValueError(f"tokens must be a full block of {self.block_size}, got {found} tokens.")
        if not self._owners.keys().isdisjoint(ids):
            self._require(ids, node, kind)
        if node is None:
            node = self._add(Node(digest, bytes(parent), data + extra, self.kinds))
        if node.ids[kind] or not ids:
            return False
        node.ids[kind] = tuple(ids)
        self._owners.update(dict.fromkeys(ids, node))
        return True

    def _require(self, ids: Sequence[int], node: Node | None, kind: int) -> None:
        """That what of these is here is this node's."""
        for block_id in ids:
            owner = self._owners.get(block_id)
            if owner is not None and (owner is not node or block_id not in owner.ids[kind]):
                raise PoolInvariantError(f"block {block_id} is in the prefix index with another content.")

    def _add(self, node: Node) -> Node:
        above = self._nodes.get(node.parent)
        if above is None:
            self._heads[node.content] += 1
        else:
            above.children += 1
            node.linked = True
        self._nodes[node.digest] = node
        self._evicted.pop(node.digest, None)
        return node

    def evict(self, ids: Ids) -> list[int]:
        """Takes the blocks out; ids that are not here (-1 among them) are passed over.

        Returns the other blocks of the same nodes and kinds, which go as well: the caller unpublishes them.
        """
        gone, asked = [], np.asarray(ids, np.int64).tolist()
        for block_id in asked:
            node = self._owners.get(block_id)
            if node is not None:
                gone += self._strip(node, next(kind for kind, some in enumerate(node.ids) if block_id in some))
        while len(self._evicted) > self._remember:
            del self._evicted[next(iter(self._evicted))]
        return list(set(gone) - set(asked)) if len(gone) > 1 else []

    def _strip(self, node: Node, kind: int) -> tuple[int, ...]:
        """Takes a kind's blocks from a node, and the node where nothing is left of it; the blocks."""
        ids, node.ids[kind] = node.ids[kind], ()
        for block_id in ids:
            del self._owners[block_id]
        self._prune(node)
        return ids

    def _prune(self, node: Node) -> None:
        while not node.children and not any(node.ids):
            del self._nodes[node.digest]
            self._evicted[node.digest] = None
            if node.linked:
                node = self._nodes[node.parent]
                node.children -= 1
                continue
            self._heads[node.content] -= 1
            if not self._heads[node.content]:
                del self._heads[node.content]
            return

    def withdraw(self, digests: Sequence[bytes]) -> list[int]:
        """Takes all blocks of these nodes, and of those that follow them, out: their content was found bad.

        The caller unpublishes what it returns.
        """
        following: dict[bytes, list[Node]] = {}
        for node in self._nodes.values():
            following.setdefault(node.parent, []).append(node)
        bad = {node.digest: node for node in self.nodes(digests)}
        waiting = list(bad)
        while waiting:
            more = [node for node in following.get(waiting.pop(), ()) if node.digest not in bad]
            bad |= {node.digest: node for node in more}
            waiting += [node.digest for node in more]
        found = [(node, kind) for node in bad.values() for kind, ids in enumerate(node.ids) if ids]
        return [i for node, kind in found for i in self._strip(node, kind)]

    def clear(self) -> None:
        """Forgets everything; the caller resets what the pool has published."""
        self._nodes.clear()
        self._owners.clear()
        self._heads.clear()
        self._evicted.clear()

    def check(self, pool: BlockPool, others: Sequence[int] = ()) -> None:
        """Raises PoolInvariantError unless each published block of the pool has one digest, and no other.

        `others`: numbers that are published elsewhere (`kv.recurrent`).
        """
        named = [(i, node) for node in self._nodes.values() for ids in node.ids for i in ids]
        listed = dict(named)
        if listed != self._owners or len(listed) != len(named):
            raise PoolInvariantError(
                f"{len(named)} entries of the prefix index name {len(listed)} blocks, "
                f"{len(self._owners)} blocks name an entry: they must be the same pairs."
            )
        published = {*np.flatnonzero(np.asarray(pool.published)).tolist(), *others}
        if published != listed.keys():
            raise PoolInvariantError(
                f"the pool has {len(published)} published blocks, the prefix index {len(listed)}; only in "
                f"the pool: {sorted(published - listed.keys())[:8]}, only in the index: "
                f"{sorted(listed.keys() - published)[:8]}."
            )


def as_bytes(tokens: Tokens) -> bytes:
    """Little-endian int32, so that a digest does not depend on the machine or the array's type."""
    return tokens if isinstance(tokens, bytes) else np.asarray(tokens, "<i4").tobytes()
