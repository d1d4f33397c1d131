"""Length of a prefix hit: the longest prefix that every kind of layer can serve.

A kind serves n blocks if it has all blocks from the first one that a token after them reads (`Kind.first_needed`). This
depends on n alone and not on other kinds, so the hit is the largest n that all kinds serve.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxinfer.kv.groups import KindGroups, count
from jaxinfer.kv.prefix_node import Match, MatchEnd
from jaxinfer.kv.spec import Kind
from jaxinfer.outputs import CacheHit


@dataclass(frozen=True)
class Hit:
    """Result of looking up a prompt in the prefix index."""

    ids: np.ndarray
    """Block ids `[G, n]` int32 in every group; -1 where a group does not need the block."""
    reason: str
    """Why the hit is not longer."""
    kinds: tuple[CacheHit, ...]
    """Hit of each kind on its own."""
    known: int = 0
    """Blocks of the prompt whose nodes are in the index: where it diverges from earlier prompts."""

    @property
    def blocks(self) -> int:
        """Length of the hit in blocks, n."""
        return self.ids.shape[1]


def nothing(kinds: Sequence[KindGroups], reason: str) -> Hit:
    """Return an empty hit with one reason for all kinds."""
    none = tuple(CacheHit(kind.kind.name, 0, reason) for kind in kinds)
    return Hit(np.empty((count(kinds), 0), np.int32), reason, none)


def longest(
    kinds: Sequence[KindGroups],
    found: Match,
    are_published: Callable[[np.ndarray], np.ndarray],
    most: int,
    block_size: int,
) -> Hit:
    """Find the longest hit among the nodes of a match.

    Args:
        kinds: groups of the model's layers.
        found: the nodes of the prompt's blocks, and why the match ended.
        are_published: function from block ids to whether the pool has them as published; False for -1.
        most: most blocks the hit may have.
        block_size: P.
    """
    if not found.nodes:
        return nothing(kinds, str(found.reason))
    ids = _ids(kinds, found)
    present = are_published(ids)
    numbers = np.arange(len(found.nodes) + 1)
    usable, hits = np.ones(len(numbers), bool), []
    for kind in kinds:
        absent = np.concatenate([[0], np.cumsum(~present[kind.span].all(axis=0))])
        mine = absent == absent[kind.kind.first_block(numbers, block_size)]
        usable &= mine
        hits.append(_kind_hit(kind.kind, mine, found.reason, most, block_size))
    blocks = int(np.flatnonzero(usable)[-1])
    for kind in kinds:
        ids[kind.span, : kind.kind.first_block(blocks, block_size)] = -1
    return Hit(ids[:, :blocks], _reason(blocks, most, hits, block_size), tuple(hits), len(found.nodes))


def _ids(kinds: Sequence[KindGroups], found: Match) -> np.ndarray:
    """Return the nodes' block ids `[G, n]`, -1 where a kind has none."""
    ids = np.empty((count(kinds), len(found.nodes)), np.int32)
    for k, kind in enumerate(kinds):
        absent, k = (-1,) * kind.count, -1 if kind.kind.slots else k
        ids[kind.span] = np.array([node.ids[k] or absent for node in found.nodes], np.int32).T
    return ids


def _kind_hit(kind: Kind, usable: np.ndarray, end: MatchEnd, most: int, block_size: int) -> CacheHit:
    blocks = int(np.flatnonzero(usable)[-1])
    reason = kind.miss_reason
    if blocks == len(usable) - 1:
        reason = str(MatchEnd.COMPLETE if blocks == most else end)
    return CacheHit(kind.name, blocks * block_size, reason)


def _reason(blocks: int, most: int, hits: Sequence[CacheHit], block_size: int) -> str:
    """Return the reason of the kind with the shortest hit; WINDOW if every kind alone serves more than all together."""
    if blocks == most:
        return str(MatchEnd.COMPLETE)
    least = min(hits, key=lambda hit: hit.tokens)
    return least.reason if least.tokens == blocks * block_size else str(MatchEnd.WINDOW)
