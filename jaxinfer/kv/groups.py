"""Which layers share arrays and block tables.

There are `g` lanes. The layers of each kind are cut into groups of `g` in their order, the last one maybe short; layer
i of every group uses lane i. A block id names a place in all lanes and belongs to one group at a time, so that one pool
of ids is one elastic budget: what sliding layers do not need, full ones have. A kind of m groups takes m ids for a
logical block; they are taken, counted, published and evicted together.

    6 layers, 5 sliding and 1 full: g = 1, one lane; 5 groups of a layer each for the sliding kind, 1 for the full one
    24 layers, alternating:         g = 12, 12 lanes; one group a kind

Layers with a recurrent state have no blocks, but arrays of their own, each behind the lanes (`kv.recurrent`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from jaxinfer.errors import ConfigError
from jaxinfer.kv.spec import Full, Kind, State

MOST_PADDING = 0.03
"""Places without a layer, of all layers: an id takes their memory for nothing."""


class Place(NamedTuple):
    """Where a layer's keys and values are."""

    group: int
    """Whose block tables; -1 of a recurrent layer, which has none."""
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


def own(kinds: Sequence[KindGroups]) -> tuple[KindGroups, ...]:
    """Those that keep the positions of a sequence; they are the first (`layout`)."""
    return tuple(kind for kind in kinds if not kind.kind.encoded)


def encoded(kinds: Sequence[KindGroups]) -> KindGroups | None:
    """The one that keeps the positions of an encoder, the last; None: there is none."""
    return next((kind for kind in kinds if kind.kind.encoded), None)


@dataclass(frozen=True)
class Layout:
    """Of a model's layers on lanes and groups."""

    places: tuple[Place, ...]
    """One a layer."""
    lanes: tuple[Full, ...]
    """What the arrays of each lane hold."""
    kinds: tuple[KindGroups, ...]
    states: tuple[State, ...] = ()
    """What recurrent layers keep, behind the lanes."""

    @property
    def groups(self) -> int:
        """G: block tables a sequence has."""
        return count(self.kinds)


def count(kinds: Sequence[KindGroups]) -> int:
    """G: the groups of all kinds."""
    return sum(kind.count for kind in kinds)


@cache
def layout(specs: tuple[Full | State, ...]) -> Layout:
    """The layout of layers that keep these.

    Raises:
        ConfigError: layers that would share a lane keep arrays of different shapes, or none keeps keys and values.
    """
    states = tuple(spec for spec in specs if isinstance(spec, State))
    if len(states) == len(specs):
        raise ConfigError(
            "no layer keeps keys and values: a model needs at least one that attends, beside recurrent ones"
        )
    layers: dict[Kind, list[int]] = {}
    for number, spec in enumerate(specs):
        if not isinstance(spec, State):
            layers.setdefault(spec.kind, []).append(number)
    most = MOST_PADDING * (len(specs) - len(states))
    sizes = [size for size in range(len(specs), 0, -1) if _padding(layers, size) <= most]
    fitting = next((size for size in sizes if _clash(specs, layers, size) is None), None)
    if fitting is None:
        one, other = _clash(specs, layers, sizes[-1])
        raise ConfigError(
            f"layers {one} and {other} keep arrays of different shapes ({specs[one]}, {specs[other]}), which cannot "
            "share "
            "memory; where placement makes them differ, place all attention layers alike"
        )
    places, kinds, groups = [Place(0, 0)] * len(specs), [], 0
    # What belongs to an encoder comes last, so that the groups a decode step writes to are the first ones.
    for kind, members in sorted(layers.items(), key=lambda item: item[0].encoded):
        for index, number in enumerate(members):
            places[number] = Place(groups + index // fitting, index % fitting)
        kinds.append(KindGroups(kind, groups, -(-len(members) // fitting)))
        groups += kinds[-1].count
    for index, number in enumerate(n for n, spec in enumerate(specs) if isinstance(spec, State)):
        places[number] = Place(-1, fitting + index)
    lanes = {place.lane: spec.lane for place, spec in zip(places, specs, strict=True) if place.group >= 0}
    return Layout(tuple(places), tuple(lanes[lane] for lane in range(fitting)), tuple(kinds), states)


def _padding(layers: dict[Kind, list[int]], size: int) -> float:
    """Places without a layer in groups of this size; infinite where a lane would have none at all."""
    if size > max(map(len, layers.values())):
        return math.inf
    return sum(-len(members) % size for members in layers.values())


def _clash(specs: Sequence[Full | State], layers: dict[Kind, list[int]], size: int) -> tuple[int, int] | None:
    """Two layers that would share a lane and cannot."""
    owners: dict[int, int] = {}
    for members in layers.values():
        for index, number in enumerate(members):
            owner = owners.setdefault(index % size, number)
            if specs[owner].lane != specs[number].lane:
                return owner, number
    return None


def blocks_needed(kinds: Sequence[KindGroups], tokens: int, block_size: int, chunk: int, read: int = 0) -> int:
    """The most ids that a sequence of `tokens` positions holds at a time, computed in chunks of `chunk` at most.

    `read`: positions of what its encoder reads.
    """
    lengths = [read if kind.kind.encoded else tokens for kind in kinds]
    return sum(
        kind.count * _most_blocks(kind.kind, length, block_size, chunk)
        for kind, length in zip(kinds, lengths, strict=True)
    )


def blocks_of_beams(
    kinds: Sequence[KindGroups], lengths: tuple[int, int, int], width: int, block_size: int, chunk: int
) -> int:
    """The most ids that `width` forks of a prompt hold at a time, if all that they have in common is the prompt; as
    many as one of them takes that is computed again in chunks of `chunk`, at least.

    `lengths`: positions of the prompt, of each fork at its end, and of what their encoder reads.
    """
    prompt, tokens, read = lengths
    total = 0
    for kind in kinds:
        if kind.kind.encoded:
            total += kind.count * -(-read // block_size)
            continue
        held = _most_blocks(kind.kind, tokens, block_size, 1)
        apart = min(held, -(-tokens // block_size) - prompt // block_size)
        total += kind.count * max(_most_blocks(kind.kind, tokens, block_size, chunk), held - apart + width * apart)
    return total


def _most_blocks(kind: Kind, tokens: int, block_size: int, chunk: int) -> int:
    every = -(-tokens // block_size)
    if kind.whole:
        return every
    kept = tokens - kind.first_needed(tokens)  # before a chunk
    # They may begin and end within a block.
    return min(every, -(-(kept + min(chunk, tokens)) // block_size) + 1)


def longest(kinds: Sequence[KindGroups], num_blocks: int, block_size: int, chunk: int, most: int, read: int = 0) -> int:
    """The most positions, up to `most`, that a sequence can have in a pool of this many ids, beside `read` of an
    encoder."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        fits = blocks_needed(kinds, middle, block_size, chunk, read) <= num_blocks
        low, high = (middle, high) if fits else (low, middle - 1)
    return low
