"""How much of a prompt the prefix index serves: the longest prefix of which every kind of layer has what it needs.

A kind serves n blocks where it has all those from the first that a token after them reads (`Kind.first_needed`). So
whether it does depends on n alone, not on the other kinds, and the hit is the largest n that all of them serve.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxinfer.kv.groups import KindGroups, count
from jaxinfer.kv.prefix import Match, MatchEnd
from jaxinfer.kv.spec import Kind
from jaxinfer.outputs import KindHit


@dataclass(frozen=True)
class Hit:
    """What a prompt found in the prefix index."""

    ids: np.ndarray
    """`[G, n]` int32: for each of its n blocks the id in every group, -1 where the group does not need it."""
    reason: str
    """Why it is no longer."""
    kinds: tuple[KindHit, ...]
    """What each kind could have served by itself."""
    known: int = 0
    """Blocks of the prompt that are in the index at all: where it parts from the prompts before it."""

    @property
    def blocks(self) -> int:
        """n."""
        return self.ids.shape[1]


def nothing(kinds: Sequence[KindGroups], reason: str) -> Hit:
    """No block, for a reason that is every kind's."""
    none = tuple(KindHit(kind.kind.name, 0, reason) for kind in kinds)
    return Hit(np.empty((count(kinds), 0), np.int32), reason, none)


def longest(kinds: Sequence[KindGroups], found: Match, published: np.ndarray, most: int, block_size: int) -> Hit:
    """The longest hit among the nodes of a match.

    Args:
        kinds: of the model's layers.
        found: the nodes of the prompt's blocks, and why there are no more.
        published: `[N]` whether the pool still calls a block published.
        most: blocks that a hit may have.
        block_size: P.
    """
    if not found.nodes:
        return nothing(kinds, str(found.reason))
    ids = _ids(kinds, found)
    present = (ids >= 0) & published[ids]
    numbers = np.arange(len(found.nodes) + 1)
    served, alone = np.ones(len(numbers), bool), []
    for kind in kinds:
        absent = np.concatenate([[0], np.cumsum(~present[kind.span].all(axis=0))])
        mine = absent == absent[kind.kind.first_block(numbers, block_size)]
        served &= mine
        alone.append(_alone(kind.kind, mine, found.reason, most, block_size))
    blocks = int(np.flatnonzero(served)[-1])
    for kind in kinds:
        ids[kind.span, : kind.kind.first_block(blocks, block_size)] = -1
    return Hit(ids[:, :blocks], _reason(blocks, most, alone, block_size), tuple(alone), len(found.nodes))


def _ids(kinds: Sequence[KindGroups], found: Match) -> np.ndarray:
    """`[G, n]` the nodes' blocks, -1 where a kind has none there."""
    ids = np.empty((count(kinds), len(found.nodes)), np.int32)
    for k, kind in enumerate(kinds):
        absent, k = (-1,) * kind.count, -1 if kind.kind.slots else k
        ids[kind.span] = np.array([node.ids[k] or absent for node in found.nodes], np.int32).T
    return ids


def _alone(kind: Kind, served: np.ndarray, end: MatchEnd, most: int, block_size: int) -> KindHit:
    blocks = int(np.flatnonzero(served)[-1])
    reason = kind.absent
    if blocks == len(served) - 1:
        reason = str(MatchEnd.COMPLETE if blocks == most else end)
    return KindHit(kind.name, blocks * block_size, reason)


def _reason(blocks: int, most: int, alone: Sequence[KindHit], block_size: int) -> str:
    """That of the kind that serves least; where all serve more, no window before a longer end is whole."""
    if blocks == most:
        return str(MatchEnd.COMPLETE)
    least = min(alone, key=lambda hit: hit.tokens)
    return least.reason if least.tokens == blocks * block_size else str(MatchEnd.WINDOW)
