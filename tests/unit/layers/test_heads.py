"""Checkpoint rows per shard: fused outputs, repeated heads, zero padding heads."""

import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType

from jaxinfer.errors import ConfigError
from jaxinfer.layers.heads import HeadLayout
from jaxinfer.layers.linear import FusedLinear, Output, Piece
from jaxinfer.layers.params import Build
from jaxinfer.sharding import axes
from jaxinfer.sharding.policy import Placement

WIDTH = 2
RNGS = nnx.Rngs(0)
sizes = st.integers(1, 30)


def build(tp: int, **how: object) -> Build:
    """Make a build for any number of devices, without real ones."""
    mesh = AbstractMesh((tp,), (axes.MODEL,), axis_types=(AxisType.Auto,))
    return Build(RNGS, jnp.dtype("float32"), mesh, path="layers.5.attention", **how)


def layout(tp: int, heads: int, kv_heads: int) -> HeadLayout:
    return HeadLayout.of(build(tp, pad_heads=True), heads, kv_heads)


def held(output: Output, shard: int, tp: int) -> list[int | None]:
    """Return the checkpoint row of each column of a shard, None for zero columns."""
    columns: list[int | None] = [None] * output.columns(tp)
    for piece in output.pieces(shard, tp):
        rows = range(piece.start, piece.stop)
        at = slice(piece.column, piece.column + len(rows))
        assert columns[at] == [None] * len(rows), "two pieces overlap"
        columns[at] = rows
    return columns


def units(output: Output, tp: int) -> list[list[int | None]]:
    """Return the checkpoint heads of each shard, all of them whole."""
    found = []
    for shard in range(tp):
        rows = held(output, shard, tp)
        heads = [rows[i : i + WIDTH] for i in range(0, len(rows), WIDTH)]
        found.append([None if head[0] is None else head[0] // WIDTH for head in heads])
        for head in heads:
            assert head == [None] * WIDTH or head == list(range(head[0], head[0] + WIDTH)) and head[0] % WIDTH == 0
    return found


@settings(deadline=None)
@given(kv_heads=sizes, group=st.integers(1, 8), tp=st.integers(1, 64))
def test_padded_heads_divide_and_query_heads_are_on_the_shard_of_their_kv_head(kv_heads, group, tp):
    made = layout(tp, kv_heads * group, kv_heads)
    q, k, v = made.outputs(WIDTH)
    queries, keys = units(q, tp), units(k, tp)
    assert units(v, tp) == keys
    real = [head for shard in queries for head in shard if head is not None]
    assert real == list(range(kv_heads * group))  # every head once, in order
    assert {head for shard in keys for head in shard} - {None} == set(range(kv_heads))
    for own, around in zip(queries, keys, strict=True):
        share = len(own) // len(around)
        assert len(own) == share * len(around)
        for place, head in enumerate(own):
            assert head is None or around[place // share] == head // group
    assert sum(map(len, queries)) == made.stored_heads
    assert made.stored_heads < kv_heads * group + tp * group  # adds less than a group per shard
    assert len(keys[0]) * tp == (tp if tp % made.stored_kv_heads == 0 else made.stored_kv_heads)


@settings(deadline=None)
@given(kv_heads=sizes, group=st.integers(1, 8), tp=st.integers(1, 64))
def test_heads_that_divide_are_not_padded(kv_heads, group, tp):
    heads = kv_heads * group
    made = layout(tp, heads, kv_heads)
    if heads % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0):
        assert (made.stored_heads, made.stored_kv_heads) == (heads, kv_heads)
        assert all(output.stored is None for output in made.outputs(WIDTH))
    else:
        assert made.stored_heads > heads


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp", "stored", "stored_kv"),
    [
        (25, 25, 8, 32, 32),
        (3, 3, 8, 8, 8),
        (25, 25, 2, 26, 26),
        (14, 2, 8, 16, 2),
        (14, 2, 4, 16, 2),
        (6, 3, 4, 8, 4),
        (6, 1, 4, 8, 1),
        (12, 3, 4, 16, 4),
        (40, 10, 4, 48, 12),
        (8, 2, 4, 8, 2),
    ],
)
def test_the_number_of_stored_heads(heads, kv_heads, tp, stored, stored_kv):
    made = layout(tp, heads, kv_heads)
    assert (made.stored_heads, made.stored_kv_heads) == (stored, stored_kv)


def test_the_rows_of_a_padded_group():
    """14 query heads with 2 kv heads over 4 shards: groups of 8, half a group per shard."""
    q, k, _ = layout(4, 14, 2).outputs(head_dim=10)
    assert [q.pieces(shard, 4) for shard in range(4)] == [
        [Piece(0, 0, 40)],
        [Piece(0, 40, 70)],
        [Piece(0, 70, 110)],
        [Piece(0, 110, 140)],
    ]
    assert [k.pieces(shard, 4) for shard in range(4)] == [[Piece(0, 0, 10)]] * 2 + [[Piece(0, 10, 20)]] * 2
    assert (q.rows, q.columns(4)) == (140, 40)
    whole, _, _ = layout(1, 14, 2).outputs(head_dim=10)
    assert whole.pieces(0, 1) == [Piece(0, 0, 140)]


@settings(deadline=None)
@given(st.lists(st.none() | st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 3))
def test_any_order_of_units_is_cut_into_whole_runs(stored, tp, width):
    stored = tuple(stored * tp)
    output = Output("any", 10, width, stored=stored)
    rows = [row for shard in range(tp) for row in held(output, shard, tp)]
    assert rows == [None if unit is None else unit * width + i for unit in stored for i in range(width)]
    for shard in range(tp):
        pieces = output.pieces(shard, tp)
        for one, other in zip(pieces, pieces[1:], strict=False):
            gap = other.column - (one.column + one.stop - one.start)
            assert gap > 0 or other.start != one.stop, "adjacent pieces must be merged"


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 12), st.booleans())
def test_plain_outputs_are_cut_evenly_or_whole_on_every_shard(units, width, tp, sharded):
    output = Output("plain", units, width, sharded=sharded)
    if sharded and units % tp:
        with pytest.raises(ConfigError, match=f"'plain' of {units} .* mesh axis 'model' of size {tp}"):
            output.columns(tp)
        return
    rows = [row for shard in range(tp) for row in held(output, shard, tp)]
    assert rows == list(range(units * width)) * (1 if sharded else tp)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "fitting", "padded"),
    [(6, 3, "1, 3, 6", "8 (4"), (12, 3, "1, 3, 6, 12", "16 (4")],
)
def test_heads_that_do_not_divide_are_named_with_three_remedies(heads, kv_heads, fitting, padded):
    with pytest.raises(ConfigError) as error:
        HeadLayout.of(build(4), heads, kv_heads)
    assert str(error.value) == (
        f"layers.5.attention: axis 'heads' of size {heads} ({kv_heads} kv heads) does not divide over mesh axis "
        f"'model' of size 4; choose a tensor_parallel_size that does ({fitting}), or keep the module whole on every "
        f"device with placement={{'layers.*.attention': 'replicate'}}, or pad to {padded} kv heads) with pad_heads=True"
    )


def test_a_replicated_module_needs_no_padding():
    whole = build(4, placement=Placement({"*.attention": "replicate"}), pad_heads=True)
    assert HeadLayout.of(whole, 6, 3) == HeadLayout(6, 3, 3, 2)


def test_a_projection_that_does_not_divide_is_named_by_its_module():
    with pytest.raises(
        ConfigError, match=r"layers.5.attention: projection 'gate' of 50 columns .* \(1, 2, 5, 10, 25, 50\)"
    ):
        FusedLinear(build(4), 8, [Output("gate", 50)])
