"""Assignment of layers to cache arrays and to groups, which share block tables.

There are `g` cache arrays. The layers of each kind are cut into groups of `g` in layer order, the last group
maybe smaller; layer i of every group uses array i. A block id addresses a block in all arrays and belongs to one group
at a time, so one pool of ids is an elastic memory budget: blocks that sliding-window layers do not need serve
full-attention layers. A kind with m groups takes m ids for each logical block; they are allocated, reference-counted,
published and evicted together.

    6 layers, 5 sliding and 1 full: g = 1, one array; 5 groups of one layer for the sliding kind, 1 for the full kind
    24 layers, alternating:         g = 12, 12 arrays; one group per kind

Recurrent layers have no blocks; their state arrays follow the block arrays in the cache (`kv.recurrent`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from jaxinfer.errors import ConfigError
from jaxinfer.kv.spec import Full, Kind, State

MAX_PADDING = 0.03
"""Largest allowed ratio of unused (group, array) places to layers: each wastes one layer's memory in every block."""


class Place(NamedTuple):
    """Location of a layer's keys and values."""

    group: int
    """Group, i.e. block table, of the layer; -1 for recurrent layers, which have none."""
    array: int
    """Index of the layer's array in the cache."""


@dataclass(frozen=True)
class KindGroups:
    """Groups of one kind, numbered [first, first + count)."""

    kind: Kind
    first: int = 0
    count: int = 1
    """m: block ids per logical block."""

    @property
    def span(self) -> slice:
        """Slice of the groups' numbers."""
        return slice(self.first, self.first + self.count)


SINGLE = (KindGroups(Kind()),)
"""Groups of a model with full attention in every layer."""


def own(kinds: Sequence[KindGroups]) -> tuple[KindGroups, ...]:
    """Return the kinds that store the sequences' own positions; they come first (`layout`)."""
    return tuple(kind for kind in kinds if not kind.kind.encoded)


def encoded(kinds: Sequence[KindGroups]) -> KindGroups | None:
    """Return the kind that stores encoder positions, which comes last; None if there is none."""
    return next((kind for kind in kinds if kind.kind.encoded), None)


@dataclass(frozen=True)
class Layout:
    """Assignment of a model's layers to cache arrays and groups."""

    places: tuple[Place, ...]
    """Place of each layer."""
    array_specs: tuple[Full, ...]
    """Spec of each cache array."""
    kinds: tuple[KindGroups, ...]
    states: tuple[State, ...] = ()
    """Specs of recurrent layers, whose arrays follow the block arrays."""

    @property
    def groups(self) -> int:
        """G: block tables per sequence."""
        return count(self.kinds)


def count(kinds: Sequence[KindGroups]) -> int:
    """Count the groups of all kinds, G."""
    return sum(kind.count for kind in kinds)


@cache
def layout(specs: tuple[Full | State, ...]) -> Layout:
    """Compute the layout for layers with these cache specs.

    Raises:
        ConfigError: layers that would share a cache array need different shapes, or no layer stores keys and values.
    """
    states = tuple(spec for spec in specs if isinstance(spec, State))
    if len(states) == len(specs):
        raise ConfigError(
            "no layer stores keys and values; beside recurrent layers a model needs at least one attention layer"
        )
    layers: dict[Kind, list[int]] = {}
    for number, spec in enumerate(specs):
        if not isinstance(spec, State):
            layers.setdefault(spec.kind, []).append(number)
    most = MAX_PADDING * (len(specs) - len(states))
    sizes = [size for size in range(len(specs), 0, -1) if _padding(layers, size) <= most]
    fitting = next((size for size in sizes if _clash(specs, layers, size) is None), None)
    if fitting is None:
        one, other = _clash(specs, layers, sizes[-1])
        raise ConfigError(
            f"layers {one} and {other} need cache arrays of different shapes ({specs[one]}, {specs[other]}), which "
            "cannot share memory; if placement makes them differ, give all attention layers the same tactic"
        )
    places, kinds, groups = [Place(0, 0)] * len(specs), [], 0
    # Encoder kinds come last, so that the groups a decode step writes to come first.
    for kind, members in sorted(layers.items(), key=lambda item: item[0].encoded):
        for index, number in enumerate(members):
            places[number] = Place(groups + index // fitting, index % fitting)
        kinds.append(KindGroups(kind, groups, -(-len(members) // fitting)))
        groups += kinds[-1].count
    for index, number in enumerate(n for n, spec in enumerate(specs) if isinstance(spec, State)):
        places[number] = Place(-1, fitting + index)
    specs_of = {place.array: spec.array_spec for place, spec in zip(places, specs, strict=True) if place.group >= 0}
    return Layout(tuple(places), tuple(specs_of[index] for index in range(fitting)), tuple(kinds), states)


def _padding(layers: dict[Kind, list[int]], size: int) -> float:
    """Count the unused places in groups of this size; infinite if an array would have no layer at all."""
    if size > max(map(len, layers.values())):
        return math.inf
    return sum(-len(members) % size for members in layers.values())


def _clash(specs: Sequence[Full | State], layers: dict[Kind, list[int]], size: int) -> tuple[int, int] | None:
    """Find two layers that would share a cache array but need different shapes."""
    owners: dict[int, int] = {}
    for members in layers.values():
        for index, number in enumerate(members):
            owner = owners.setdefault(index % size, number)
            if specs[owner].array_spec != specs[number].array_spec:
                return owner, number
    return None


def blocks_needed(kinds: Sequence[KindGroups], tokens: int, block_size: int, chunk: int, read: int = 0) -> int:
    """Return the most block ids a sequence holds at a time.

    Args:
        kinds: groups of the model's layers.
        tokens: positions of the sequence.
        block_size: P.
        chunk: most tokens computed in one prefill chunk.
        read: encoder positions.
    """
    lengths = [read if kind.kind.encoded else tokens for kind in kinds]
    return sum(
        kind.count * _most_blocks(kind.kind, length, block_size, chunk)
        for kind, length in zip(kinds, lengths, strict=True)
    )


def blocks_of_beams(
    kinds: Sequence[KindGroups], lengths: tuple[int, int, int], width: int, block_size: int, chunk: int
) -> int:
    """Return the most block ids that `width` beams of a prompt hold at a time, if they share only the prompt.

    At least as many as one beam takes that is recomputed in chunks of `chunk`.

    Args:
        kinds: groups of the model's layers.
        lengths: positions of the prompt, of each beam at its end, and of the encoder.
        width: beams.
        block_size: P.
        chunk: most tokens computed in one prefill chunk.
    """
    prompt, tokens, read = lengths
    total = 0
    for kind in kinds:
        if kind.kind.encoded:
            total += kind.count * -(-read // block_size)
            continue
        held = _most_blocks(kind.kind, tokens, block_size, 1)
        unshared = min(held, -(-tokens // block_size) - prompt // block_size)
        total += kind.count * max(
            _most_blocks(kind.kind, tokens, block_size, chunk), held - unshared + width * unshared
        )
    return total


def _most_blocks(kind: Kind, tokens: int, block_size: int, chunk: int) -> int:
    every = -(-tokens // block_size)
    if kind.keeps_all:
        return every
    needed = tokens - kind.first_needed(tokens)  # positions still read, before the chunk
    # The range may start and end in the middle of a block.
    return min(every, -(-(needed + min(chunk, tokens)) // block_size) + 1)


def longest(kinds: Sequence[KindGroups], num_blocks: int, block_size: int, chunk: int, most: int, read: int = 0) -> int:
    """Return the longest sequence, up to `most` positions, that fits in a pool of `num_blocks` ids.

    Args:
        kinds: groups of the model's layers.
        num_blocks: N.
        block_size: P.
        chunk: most tokens computed in one prefill chunk.
        most: upper limit, in positions.
        read: encoder positions of the same sequence.
    """
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        fits = blocks_needed(kinds, middle, block_size, chunk, read) <= num_blocks
        low, high = (middle, high) if fits else (low, middle - 1)
    return low
