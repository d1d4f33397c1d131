"""Assignment of layers to cache arrays and to groups, which share block tables.

There are `g` cache arrays. The layers of each kind are cut into groups of `g` in layer order, the last group
maybe smaller; layer i of every group uses array i. A block id addresses a block in all arrays and belongs to one group
at a time, so one pool of ids is an elastic memory budget: blocks that sliding-window layers do not need serve
full-attention layers. A kind with m groups takes m ids for each logical block; they are allocated, reference-counted,
published and evicted together.

Where kinds need arrays of different shapes, an array is as large as the largest needs, and as many narrower layers as
fill it lie side by side in its blocks: block b of part i of n is block n b + i of the array seen in the layer's shape.
Gemma 4 31B has 16 heads of 256 columns in sliding layers and 4 of 512 in full ones, two of which share an array.

    6 layers, 5 sliding and 1 full: g = 1, one array; 5 groups of one layer for the sliding kind, 1 for the full kind
    24 layers, alternating:         g = 12, 12 arrays; one group per kind

Recurrent layers have no blocks; their state arrays follow the block arrays in the cache (`kv.recurrent`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, TypeAlias

from jaxinfer.errors import ConfigError
from jaxinfer.kv.spec import Full, Kind, Lent, Spec, State

MAX_PADDING = 0.03
"""Largest allowed ratio of unused (group, array) places to layers: each wastes one layer's memory in every block."""


class Place(NamedTuple):
    """Location of a layer's keys and values; layers that attend to another one's have its place."""

    group: int
    """Group, i.e. block table, of the layer; -1 for recurrent layers, which have none."""
    array: int
    """Index of the layer's array in the cache."""
    part: int = 0
    """Which of `parts` equal parts of a block is the layer's."""
    parts: int = 1

    def ids(self, blocks: Any) -> Any:
        """Return the ids of the layer's parts of blocks, in the array seen in the layer's shape."""
        return blocks if self.parts == 1 else blocks * self.parts + self.part


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


def full_group(kinds: Sequence[KindGroups]) -> int | None:
    """Return a group whose blocks hold every position of a sequence; None if there is none."""
    return next((kind.first for kind in kinds if kind.kind == Kind()), None)


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
def layout(specs: tuple[Spec, ...]) -> Layout:
    """Compute the layout for layers with these cache specs.

    Raises:
        ConfigError: layers that would share a cache array need different shapes, or no layer stores keys and values.
    """
    states = tuple(spec for spec in specs if isinstance(spec, State))
    if len(states) == len(specs):
        raise ConfigError(
            "no layer stores keys and values; beside recurrent layers a model needs at least one attention layer"
        )
    # Layers side by side in one array only where they cannot share arrays otherwise.
    made = next(filter(None, (_arrange(specs, _cells(specs, packed=packed)) for packed in (False, True))), None)
    if made is None:
        one, other = _clash(specs, _cells(specs, packed=False), 1)
        raise ConfigError(
            f"layers {one} and {other} need cache arrays of different shapes ({specs[one]}, {specs[other]}), which "
            "cannot share memory; if placement makes them differ, give all attention layers the same tactic"
        )
    places, kinds, arrays = made
    for index, number in enumerate(n for n, spec in enumerate(specs) if isinstance(spec, State)):
        places[number] = Place(-1, len(arrays) + index)
    for number, spec in enumerate(specs):
        if isinstance(spec, Lent):
            if spec.replicated != specs[spec.lender].replicated:
                raise ConfigError(
                    f"layer {number} attends to the keys and values of layer {spec.lender}, but one of them is "
                    "replicated and the other is not; give all attention layers the same tactic"
                )
            places[number] = places[spec.lender]
    return Layout(tuple(places[number] for number in range(len(specs))), arrays, kinds, states)


class Cell(NamedTuple):
    """Layers of one kind that lie side by side in an array's blocks."""

    layers: tuple[int, ...]
    parts: int
    """Layers that there is room for."""
    array: Full
    """Spec of an array with that room."""


Cells: TypeAlias = dict[Kind, list[Cell]]


def _cells(specs: Sequence[Spec], *, packed: bool) -> Cells:
    """Divide layers with keys and values into cells by kind: one layer each, or as many as the largest has room for."""
    own = [(number, spec) for number, spec in enumerate(specs) if isinstance(spec, Full)]
    largest, cells = max(map(_elements, dict(own).values())), {}
    for number, spec in own:
        parts = largest // _elements(spec) if packed and type(spec.array_spec) is Full else 1
        array = spec.array_spec if parts == 1 else replace(spec.array_spec, kv_heads=parts * spec.kv_heads)
        found = cells.setdefault(spec.kind, [])
        last = found[-1] if found else None
        if last and last.parts == parts and last.array == array and len(last.layers) < parts:
            found[-1] = last._replace(layers=(*last.layers, number))
        else:
            found.append(Cell((number,), parts, array))
    return cells


def _elements(spec: Full) -> int:
    """Return the elements of one position's keys."""
    return spec.kv_heads * spec.head_dim


def _arrange(
    specs: Sequence[Spec], cells: Cells
) -> tuple[dict[int, Place], tuple[KindGroups, ...], tuple[Full, ...]] | None:
    """Place cells in arrays; return places by layer, kinds and arrays, or None if shapes do not allow it."""
    most = MAX_PADDING * sum(map(len, cells.values()))
    sizes = [size for size in range(len(specs), 0, -1) if _padding(cells, size) <= most]
    size = next((size for size in sizes if _clash(specs, cells, size) is None), None)
    if size is None:
        return None
    places, kinds, arrays, groups = {}, [], {}, 0
    # Encoder kinds come last, so that the groups a decode step writes to come first.
    for kind, members in sorted(cells.items(), key=lambda item: item[0].encoded):
        for index, cell in enumerate(members):
            arrays[index % size] = min(arrays.get(index % size, cell.array), cell.array, key=lambda one: one.head_dim)
            for part, number in enumerate(cell.layers):
                places[number] = Place(groups + index // size, index % size, part, cell.parts)
        kinds.append(KindGroups(kind, groups, -(-len(members) // size)))
        groups += kinds[-1].count
    return places, tuple(kinds), tuple(arrays[index] for index in range(size))


def _padding(cells: Cells, size: int) -> float:
    """Count the unused places in groups of this size; infinite if an array would have no layer at all."""
    if size > max(map(len, cells.values())):
        return math.inf
    return sum(-len(members) % size for members in cells.values())


def _clash(specs: Sequence[Spec], cells: Cells, size: int) -> tuple[int, int] | None:
    """Find two layers that would share a cache array but need different shapes."""
    owners: dict[int, Cell] = {}
    for members in cells.values():
        for index, cell in enumerate(members):
            owner = owners.setdefault(index % size, cell)
            if owner.array != cell.array and not _alike(owner, cell):
                return owner.layers[0], cell.layers[0]
    return None


def _alike(one: Cell, other: Cell) -> bool:
    """Return whether layers of one may see an array of the other (`kernels.attention.paged.seen_shape`)."""
    first, second = one.array, other.array
    narrow, wide = sorted((first.head_dim, second.head_dim))
    return (
        type(first) is type(second) is Full
        and _elements(first) == _elements(second)
        and (first.replicated, first.codes) == (second.replicated, second.codes)
        and wide % narrow == 0
    )


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
    # Positions still read, and the chunk: the range may start and end in the middle of a block.
    return min(every, -(-(kind.most_needed(tokens) + min(chunk, tokens)) // block_size) + 1)


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
