"""Grouped products and the layout of rows by groups, against loops of NumPy."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.native import require_native_kernels

from jaxinfer.kernels.matmul import grouped, int8_matmul
from jaxinfer.kernels.matmul.choose import NATIVE, XLA

KERNELS = (XLA, NATIVE)
SIZES = {
    "one each": ([1] * 8, 8),
    "all to one": ([0, 0, 37, 0], 37),
    "none to some, padding": ([3, 0, 7, 1, 0], 16),
    "few and many": ([40, 0, 70], 120),
    "padding alone": ([0, 0], 5),
}
"""Rows of each group, and how many there are with those of none."""
OUT, IN = 50, 36

run = {kernel: jax.jit(partial(grouped.matmul, kernel=kernel, block=4)) for kernel in KERNELS}


def case(name: str, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, NaN in those of no group; matrices; offsets."""
    sizes, rows = SIZES[name]
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, IN)).astype(jnp.dtype(dtype))
    x[offsets[-1] :] = np.nan
    return x, rng.standard_normal((len(sizes), OUT, IN)).astype(jnp.dtype(dtype)), offsets


def require(kernel: str) -> None:
    if kernel == NATIVE:
        require_native_kernels()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SIZES)
def test_each_row_is_multiplied_with_the_matrix_of_its_group(name: str, dtype: str, kernel: str):
    require(kernel)
    x, weight, offsets = case(name, dtype)
    found = run[kernel](x, weight, offsets)
    end = offsets[-1]
    expected = grouped.reference(x, weight, offsets)[:end]
    assert found.shape == (x.shape[0], OUT) and found.dtype == jnp.dtype(dtype)
    tolerance = 2**-8 * np.abs(expected) if dtype == "bfloat16" else 0
    assert (np.abs(np.asarray(found[:end], np.float64) - expected) <= tolerance + 1e-5).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["few and many", "none to some, padding"])
def test_int8_is_the_product_of_each_group_in_int8(name: str, kernel: str):
    require(kernel)
    x, weight, offsets = case(name, "float32")
    values, scales = int8_matmul.quantise_weight(weight, 4)
    found = np.asarray(run[kernel](x, values, offsets, scales))
    for group, (first, last) in enumerate(pairwise(offsets)):
        expected = int8_matmul.reference(x[first:last], values[group], scales[group], 4)
        # A number half way between two steps may be rounded to either.
        rows = int8_matmul.rotate(x[first:last], 4)
        step = int8_matmul.row_scales(rows)[:, None] * 127 * scales[group] if last > first else 0
        assert (np.abs(found[first:last] - expected) <= 2.01 * step + 1e-6 * np.abs(expected)).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_groups_without_rows_are_not_read(kernel: str):
    """NaN in their matrices would show."""
    require(kernel)
    x, weight, offsets = case("none to some, padding", "float32")
    weight[[1, 4]] = np.nan
    assert np.isfinite(np.asarray(run[kernel](x, weight, offsets))[: offsets[-1]]).all()


def test_the_loop_turns_as_often_as_there_are_tiles_with_rows():
    """The work is proportional to the rows, not to the groups."""
    turns: list[int] = []

    def product(rows: jax.Array, group: jax.Array) -> jax.Array:
        jax.debug.callback(lambda _: turns.append(1), group)
        return rows

    loop = jax.jit(lambda x, offsets: grouped._tiles(x, offsets, 4, product))
    for sizes in ([0] * 64, [1] + [0] * 63, [8, 9] + [0] * 62, [1] * 64):
        turns.clear()
        loop(np.zeros((128, 4), np.float32), np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32))
        jax.effects_barrier()
        assert len(turns) == sum(-(-size // grouped.LEAST_TILE) for size in sizes)


EXPERTS, TOKENS, PER_TOKEN = 4, 7, 3
dispatch = jax.jit(grouped.dispatch, static_argnums=1)
row = st.lists(st.integers(-1, EXPERTS), min_size=PER_TOKEN, max_size=PER_TOKEN)


@settings(deadline=None)
@given(st.lists(row, min_size=TOKENS, max_size=TOKENS))
def test_every_pair_has_one_place_in_the_order_of_experts_and_tokens(chosen: list[list[int]]):
    laid = jax.tree.map(np.asarray, dispatch(np.array(chosen, np.int32), EXPERTS))
    pairs = [(e if 0 <= e < EXPERTS else EXPERTS, t, k) for t, own in enumerate(chosen) for k, e in enumerate(own)]
    assert sorted(laid.places.reshape(-1).tolist()) == list(range(len(pairs)))
    for place, (expert, token, k) in enumerate(sorted(pairs)):
        assert laid.places[token, k] == place and laid.tokens[place] == token
        assert expert == EXPERTS or laid.experts[place] == expert
    assert laid.offsets.tolist() == [sum(e < number for e, _, _ in pairs) for number in range(EXPERTS + 1)]


def test_keys_of_more_than_32_bits_are_sorted_in_the_same_order(monkeypatch):
    chosen = jnp.array([[3, -1, 0], [0, 3, 4], [1, 0, 3]], jnp.int32)
    small = grouped.dispatch(chosen, EXPERTS)
    monkeypatch.setattr(grouped, "KEYS", 5 * chosen.size - 1)
    wide = grouped.dispatch(chosen, EXPERTS)
    assert all(a.dtype == b.dtype and (a == b).all() for a, b in zip(small, wide, strict=True))


def test_the_largest_key_is_the_largest_int32():
    pairs = (1 << 20) * 8  # the most tokens of a step, of 8 experts each
    assert grouped.has_one_key(255, pairs) and not grouped.has_one_key(256, pairs)


def test_what_the_experts_made_is_summed_by_weight_and_what_none_made_is_zero():
    chosen = jnp.array([[1, 0], [2, 1], [0, 2]])  # of two experts: 2 is none
    laid = dispatch(chosen, 2)
    y = np.full((6, 3), np.nan, np.float32)
    y[:4] = np.arange(4)[:, None]  # experts 0, 0, 1, 1 of tokens 0, 2, 0, 1
    weights = np.array([[0.5, 2.0], [100.0, 10.0], [1.0, 100.0]], np.float32)
    found = jax.jit(grouped.combine)(y, weights, laid.places, laid.offsets[-1])
    np.testing.assert_array_equal(np.asarray(found)[:, 0], [2 * 0.5 + 0 * 2, 3 * 10, 1 * 1])
