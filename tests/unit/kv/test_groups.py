"""Assignment of layers to cache arrays and groups, and blocks per sequence."""

import numpy as np
import pytest

from jaxinfer.errors import ConfigError
from jaxinfer.kv.groups import MAX_PADDING, KindGroups, Place, blocks_needed, layout, longest
from jaxinfer.kv.spec import Full, Kind, Lent, Sliding, Window

FULL, SLIDING = Full(2, 16), Sliding(2, 16, window=8)


@pytest.mark.parametrize(
    ("specs", "arrays", "counts"),
    [
        ([FULL] * 16, 16, [1]),
        ([SLIDING] * 7, 7, [1]),
        ([SLIDING, FULL] * 12, 12, [1, 1]),
        (([SLIDING] * 5 + [FULL]) * 8, 8, [5, 1]),
        ([SLIDING] * 5 + [FULL], 1, [5, 1]),
        (([SLIDING] * 5 + [FULL]) * 4 + [SLIDING] * 2, 2, [11, 2]),  # 22 and 4: four arrays would pad 2 of 26
        (([SLIDING] * 5 + [FULL]) * 10 + [SLIDING] * 2, 2, [26, 5]),  # 52 and 10
        ([FULL] * 33 + [SLIDING] * 34, 34, [1, 1]),  # one place of 67 without a layer
    ],
)
def test_the_number_of_arrays_is_the_largest_with_little_padding(specs, arrays, counts):
    made = layout(tuple(specs))
    assert (len(made.array_specs), sorted(kind.count for kind in made.kinds)) == (arrays, sorted(counts))
    assert len(set(made.places)) == len(specs), "no two layers in one place"
    assert made.groups * arrays - len(specs) <= MAX_PADDING * len(specs)
    for place, spec in zip(made.places, specs, strict=True):
        [kind] = [kind for kind in made.kinds if place.group in range(made.groups)[kind.span]]
        assert kind.kind == spec.kind


def test_a_model_of_one_kind_has_an_array_per_layer_and_one_group():
    made = layout((FULL, Full(4, 8), Full(2, 16, replicated=True)))
    assert made.places == (Place(0, 0), Place(0, 1), Place(0, 2)) and made.kinds == (KindGroups(Kind()),)
    assert made.array_specs == (FULL, Full(4, 8), Full(2, 16, replicated=True)), "each has its own shape"


def test_layers_of_different_shapes_do_not_share_an_array():
    """With fewer arrays, layers of equal shapes can share them."""
    narrow = Sliding(3, 8, window=8)
    made = layout((FULL, FULL, SLIDING, SLIDING))
    assert len(made.array_specs) == 2
    with pytest.raises(
        ConfigError,
        match="layers 0 and 1 need cache arrays of different shapes.*give all attention layers the same tactic",
    ):
        layout((FULL, narrow))


def test_narrower_layers_lie_side_by_side():
    """As in Gemma 4: three sliding layers and a full one of twice the size, which other layers attend to as well."""
    narrow = Sliding(2, 16, window=8)
    made = layout((narrow, narrow, narrow, Full(1, 64), Lent(2), Lent(3)))

    assert [(place.array, place.part, place.parts) for place in made.places] == [
        (0, 0, 2),
        (0, 1, 2),
        (0, 0, 2),
        (0, 0, 1),
        (0, 0, 2),
        (0, 0, 1),
    ]
    assert made.places[4:] == made.places[2:4], "layers that borrow have the place of their lender"
    assert made.places[0].group == made.places[1].group != made.places[2].group
    assert [kind.count for kind in made.kinds] == [2, 1] and made.groups == 3
    assert made.array_specs == (Full(4, 16),), "64 elements a position, in whichever shape"


def test_a_layer_that_borrows_is_placed_as_its_lender():
    assert layout((Full(2, 16, replicated=True), Lent(0, replicated=True))).groups == 1
    for lender in (True, False):
        with pytest.raises(ConfigError, match="layer 1 attends to the keys.*layer 0.*the same tactic"):
            layout((Full(2, 16, replicated=lender), Lent(0, replicated=not lender)))


@pytest.mark.parametrize(
    "changes",
    [{"head_dim": 24}, {"replicated": True}, {"kv_heads": 4, "head_dim": 24}],
    ids=["no multiple", "another placement", "narrow heads do not divide wide ones"],
)
def test_layers_that_cannot_lie_side_by_side_are_refused(changes):
    narrow = Sliding(2, 16, window=8) if "kv_heads" not in changes else Sliding(3, 16, window=8)
    with pytest.raises(ConfigError, match="different shapes.*same tactic"):
        layout((narrow, Full(**{"kv_heads": 1, "head_dim": 64} | changes)))


@pytest.mark.parametrize(("length", "first"), [(0, 0), (1, 0), (7, 0), (8, 1), (9, 2), (100, 93)])
def test_first_needed_position_of_a_window(length, first):
    assert Window(8).first_needed(length) == first
    assert Kind().first_needed(length) == 0
    assert Window(1).first_needed(length) == length


def test_chunks_begin_anew():
    kind = Window(6, chunked=True)
    assert [kind.first_needed(length) for length in (0, 5, 6, 11, 12, 13)] == [0, 0, 6, 6, 12, 12]
    assert kind.first_needed(np.array([5, 6])).tolist() == [0, 6]
    # At the end of a chunk nothing is read, but a sequence must have room for the whole of one.
    assert (
        [kind.most_needed(length) for length in (3, 5, 6, 12)] == [3, 5, 5, 5] == list(map(min, (3, 5, 6, 12), [5] * 4))
    )
    assert [Window(6).most_needed(length) for length in (3, 6, 12)] == [3, 5, 5]
    made = layout((Sliding(2, 16, window=6, chunked=True), Sliding(2, 16, window=6)))
    assert [one.kind.name for one in made.kinds] == ["chunked(6)", "sliding(6)"], "layers of both share no blocks"
    assert blocks_needed(made.kinds[:1], 12, 4, 1) == blocks_needed(made.kinds[1:], 12, 4, 1)


def test_blocks_needed():
    kinds = layout((SLIDING, SLIDING, FULL)).kinds
    assert blocks_needed(kinds, 4, 4, 16) == 3
    assert blocks_needed(kinds, 400, 4, 16) == 100 + 2 * (-(-(7 + 16) // 4) + 1)
    assert blocks_needed(kinds, 400, 4, 1) == 100 + 2 * 3
    assert blocks_needed((KindGroups(Kind()),), 401, 4, 16) == 101


@pytest.mark.parametrize("blocks", [0, 2, 3, 20, 21, 30, 99, 100, 114, 300])
def test_the_longest_sequence_is_the_last_that_fits(blocks):
    kinds = layout((SLIDING, SLIDING, FULL)).kinds
    found = longest(kinds, blocks, 4, 16, 500)
    assert found == 0 or blocks_needed(kinds, found, 4, 16) <= blocks
    assert found == 500 or blocks_needed(kinds, found + 1, 4, 16) > blocks
