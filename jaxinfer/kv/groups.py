"""Which layers share arrays and block tables.

There are `g` lanes. The layers of each kind are cut into groups of `g` in their order, the last one maybe short; layer
i of every group uses lane i. A block id names a place in all lanes and belongs to one group at a time, so that one pool
of ids is one elastic budget: what sliding layers do not need, full ones have. A kind of m groups takes m ids for a
logical block; they are taken, counted, published and evicted together.

    6 layers, 5 sliding and 1 full: g = 1, one lane; 5 groups of a layer each for the sliding kind, 1 for the full one
    24 layers, alternating:         g = 12, 12 lanes; one group a kind
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from jaxinfer.errors import ConfigError
from jaxinfer.kv.spec import Full, Kind

MOST_PADDING = 0.03
"""Places without a layer, of all layers: an id takes their memory for nothing."""


class Place(NamedTuple):
    """Where a layer's keys and values are."""

    group: int
    """Whose block tables."""
    lane: int
    """Which of the cache's arrays."""


@dataclass(frozen=True)
class KindGroups:
    """The groups of one kind: those numbered [first, first + count)."""

    kind: Kind
    first: int = 0
    count: int = 1
    """m: ids that a logical block takes."""

    @property
    def span(self) -> slice:
        """The groups' numbers."""
        return slice(self.first, self.first + self.count)


SINGLE = (KindGroups(Kind()),)
"""Of a model whose layers are all alike in full attention."""


@dataclass(frozen=True)
class Layout:
    """Of a model's layers on lanes and groups."""

    places: tuple[Place, ...]
    """One a layer."""
    lanes: tuple[Full, ...]
    """What the arrays of each lane hold."""
    kinds: tuple[KindGroups, ...]

    @property
    def groups(self) -> int:
        """G: block tables a sequence has."""
        return count(self.kinds)


def count(kinds: Sequence[KindGroups]) -> int:
    """G: the groups of all kinds."""
    return sum(kind.count for kind in kinds)


@cache
def layout(specs: tuple[Full, ...]) -> Layout:
    """The layout of layers that keep these.

    Raises:
        ConfigError: layers that would share a lane keep arrays of different shapes.
    """
    layers: dict[Kind, list[int]] = {}
    for number, spec in enumerate(specs):
        layers.setdefault(spec.kind, []).append(number)
    sizes = [size for size in range(len(specs), 0, -1) if _padding(layers, size) <= MOST_PADDING * len(specs)]
    fitting = next((size for size in sizes if _clash(specs, layers, size) is None), None)
    if fitting is None:
        one, other = _clash(specs, layers, sizes[-1])
        raise ConfigError(
            f"layers {one} and {other} keep arrays of different shapes ({specs[one]}, {specs[other]}), which cannot share "
            "memory; where placement makes them differ, place all attention layers alike"
        )
    places, kinds, groups = [Place(0, 0)] * len(specs), [], 0
    for kind, members in layers.items():
        for index, number in enumerate(members):
            places[number] = Place(groups + index // fitting, index % fitting)
        kinds.append(KindGroups(kind, groups, -(-len(members) // fitting)))
        groups += kinds[-1].count
    lanes = {place.lane: spec.lane for place, spec in zip(places, specs, strict=True)}
    return Layout(tuple(places), tuple(lanes[lane] for lane in range(fitting)), tuple(kinds))


def _padding(layers: dict[Kind, list[int]], size: int) -> float:
    """Places without a layer in groups of this size; infinite where a lane would have none at all."""
    if size > max(map(len, layers.values())):
        return math.inf
    return sum(-len(members) % size for members in layers.values())


def _clash(specs: Sequence[Full], layers: dict[Kind, list[int]], size: int) -> tuple[int, int] | None:
    """Two layers that would share a lane and cannot."""
    owners: dict[int, int] = {}
    for members in layers.values():
        for index, number in enumerate(members):
            owner = owners.setdefault(index % size, number)
            if specs[owner].lane != specs[number].lane:
                return owner, number
    return None


def blocks_needed(kinds: Sequence[KindGroups], tokens: int, block_size: int, chunk: int) -> int:
    """The most ids that a sequence of `tokens` positions holds at a time, computed in chunks of `chunk` at most."""
    return sum(kind.count * _most_blocks(kind.kind, tokens, block_size, chunk) for kind in kinds)


def _most_blocks(kind: Kind, tokens: int, block_size: int, chunk: int) -> int:
    every = -(-tokens // block_size)
    if kind.whole:
        return every
    kept = tokens - kind.first_needed(tokens)  # before a chunk
    # They may begin and end within a block.
    return min(every, -(-(kept + min(chunk, tokens)) // block_size) + 1)


def longest(kinds: Sequence[KindGroups], num_blocks: int, block_size: int, chunk: int, most: int) -> int:
    """The most positions, up to `most`, that a sequence can have in a pool of this many ids."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        fits = blocks_needed(kinds, middle, block_size, chunk) <= num_blocks
        low, high = (middle, high) if fits else (low, middle - 1)
    return low
