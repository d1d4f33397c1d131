"""Prefix index: maps chained block digests to published blocks, for automatic prefix caching.

Full blocks never change, so their content is identified by a chained digest: sha256 of the parent block's digest and
the block's tokens. The parent of a first block is the root, derived from everything else the content depends on (the
caller's salt, an encoder's input), so that prefixes with different roots never match. An index belongs to one model.

    root = sha256(salt) -> d0 = sha256(root | tokens[0:P] | extra[0]) -> d1 = sha256(d0 | tokens[P:2P] | extra[1]) ->
    ...

`extra` is content that only some blocks depend on: blocks with image tokens name the image. It is empty for text.

The digest finds a block; the match is then verified on tokens, extra and parent. Layers of all kinds share the tree;
each node has the blocks of every kind, or none for a kind. The index is mutable, and the engine changes it only when it
commits a step. sha256 is the same in every process, unlike Python's `hash`.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from jaxinfer.kv.digests import NO_EXTRAS, TOKEN_BYTES, Extras, Tokens, as_bytes, block_digest
from jaxinfer.kv.pool import BlockPool, Ids, PoolInvariantError
from jaxinfer.kv.prefix_node import Match, MatchEnd, Node

_versions = itertools.count(1)


class PrefixIndex:
    """Tree of published prefixes: for each node, the blocks of every kind of layer that has them.

    A node stays while it or a descendant has blocks, so that a hit whose first blocks were evicted, as behind a window,
    is still verified token by token.

    Args:
        block_size: P.
        remember_evicted: number of recently evicted digests to remember, so that a miss can be reported as an eviction.
        kinds: number of kinds of layers.
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
        self.mark_changed()

    def mark_changed(self) -> None:
        """Take a new `version`; called as well when blocks are unpublished before they are evicted from the index.

        No two indices of a process share a version, as sequences outlive an index that is made anew after a failure.
        """
        self.version = next(_versions)

    def __len__(self) -> int:
        """Return the number of blocks in the index."""
        return len(self._owners)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._nodes

    def chain(
        self, tokens: np.ndarray, root: bytes, start_digests: Sequence[bytes] = (), extras: Extras = NO_EXTRAS
    ) -> list[bytes]:
        """Compute the digests of all full blocks of tokens [T].

        `start_digests` are known digests of the first blocks of the same tokens after the same root; they are not
        recomputed.
        """
        digests = list(start_digests)
        self.extend(digests, tokens, root, extras)
        return digests

    def extend(self, digests: list[bytes], tokens: np.ndarray, root: bytes, extras: Extras = NO_EXTRAS) -> None:
        """Append the missing digests of the full blocks of tokens [T] to `digests`, in place."""
        size, first = self.block_size, len(digests)
        data, width = as_bytes(tokens[first * size : len(tokens) // size * size]), size * TOKEN_BYTES
        parent = digests[-1] if digests else root
        for number in range(len(data) // width):
            block = data[number * width : (number + 1) * width]
            parent = block_digest(parent, block, extras.get(first + number, b""))
            digests.append(parent)

    def match(self, digests: Sequence[bytes], tokens: np.ndarray, root: bytes, extras: Extras = NO_EXTRAS) -> Match:
        """Find the nodes of the longest known prefix of tokens [T] with these block digests.

        Callers pass the digests of at most floor((T - 1) / P) blocks, so that at least one token is computed. Every
        block is verified on its tokens, its extra and its parent's digest.
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
        """Return the nodes of those of these digests that are in the index."""
        return [self._nodes[digest] for digest in digests if digest in self._nodes]

    def all_nodes(self) -> Iterable[Node]:
        """Return all nodes, in the order in which they were entered."""
        return self._nodes.values()

    def insert(
        self,
        digest: bytes,
        parent: bytes,
        tokens: Tokens,
        ids: Sequence[int] = (),
        kind: int = 0,
        extra: bytes = b"",
    ) -> bool:
        """Enter the blocks of a kind for a block of tokens; existing blocks of that kind are kept.

        Args:
            digest: digest of the block.
            parent: digest of its parent, or the root.
            tokens: its tokens, [P].
            ids: block ids in the kind's groups; if empty, only the node is created.
            kind: index of the kind.
            extra: extra content.

        Returns:
            Whether the ids were entered; the caller then publishes them in the pool.

        Raises:
            ValueError: there are not P tokens.
            PoolInvariantError: a block is in the index under another digest, i.e. it was reused without `evict`.
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
        self.mark_changed()
        self._owners.update(dict.fromkeys(ids, node))
        return True

    def insert_missing(
        self, tokens: np.ndarray, digests: Sequence[bytes], root: bytes, stop: int, extras: Extras = NO_EXTRAS
    ) -> None:
        """Create missing nodes for blocks [0, stop); nodes may be gone if their blocks were evicted."""
        start, size = stop, self.block_size
        while start and digests[start - 1] not in self:
            start -= 1
        for number in range(start, stop):
            known, parent = tokens[number * size : (number + 1) * size], digests[number - 1] if number else root
            self.insert(digests[number], parent, known, extra=extras.get(number, b""))

    def _require(self, ids: Sequence[int], node: Node | None, kind: int) -> None:
        """Check that blocks which are already in the index belong to this node and kind."""
        for block_id in ids:
            owner = self._owners.get(block_id)
            if owner is not None and (owner is not node or block_id not in owner.ids[kind]):
                raise PoolInvariantError(f"block {block_id} is in the prefix index with different content.")

    def _add(self, node: Node) -> Node:
        above = self._nodes.get(node.parent)
        if above is None:
            self._heads[node.content] += 1
        else:
            above.children += 1
            node.linked = True
        self.mark_changed()
        self._nodes[node.digest] = node
        self._evicted.pop(node.digest, None)
        return node

    def evict(self, ids: Ids) -> list[int]:
        """Remove blocks from the index; unknown ids, -1 included, are skipped.

        Returns:
            The other blocks of the same nodes and kinds, which are removed too; the caller unpublishes them.
        """
        gone, given = [], np.asarray(ids, np.int64).tolist()
        for block_id in given:
            node = self._owners.get(block_id)
            if node is not None:
                gone += self._strip(node, next(kind for kind, some in enumerate(node.ids) if block_id in some))
        while len(self._evicted) > self._remember:
            del self._evicted[next(iter(self._evicted))]
        return list(set(gone) - set(given)) if len(gone) > 1 else []

    def _strip(self, node: Node, kind: int) -> tuple[int, ...]:
        """Remove a kind's blocks from a node, and the node if nothing is left of it; return the blocks."""
        self.mark_changed()
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
        """Remove all blocks of these nodes and their descendants, because their content was found to be bad.

        Returns:
            The removed blocks; the caller unpublishes them.
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
        """Remove everything; the caller resets the pool's published blocks."""
        self.mark_changed()
        self._nodes.clear()
        self._owners.clear()
        self._heads.clear()
        self._evicted.clear()

    def check(self, pool: BlockPool, others: Sequence[int] = ()) -> None:
        """Check that every published block of the pool has exactly one digest, and that no other block has one.

        Args:
            pool: the block pool.
            others: ids published outside the pool (`kv.recurrent`).

        Raises:
            PoolInvariantError: index and pool disagree.
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
