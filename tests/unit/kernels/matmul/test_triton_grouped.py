"""The kernel of grouped products, interpreted, against the oracle, and the tiles it is given."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.interpret import interpreted

from jaxinfer.kernels.matmul import grouped, int8_matmul, triton_grouped
from jaxinfer.kernels.matmul.choose import TRITON
from jaxinfer.kernels.triton.triton_launch import Target

pytestmark = [pytest.mark.xdist_group("triton"), pytest.mark.slow]

TARGET = Target(90, 2)
BFLOAT16 = 2**-7
"""The interpreter cuts bits off where a device rounds."""
CASES = {
    "few rows": ([1, 0, 3, 2], 8, 40, 70, "float32"),
    "a part of the inner dimension, bfloat16": ([5, 17, 0, 1], 23, 40, 200, "bfloat16"),
    "several tiles": ([100, 0, 40], 150, 130, 64, "bfloat16"),
    "one group of many rows": ([300], 300, 16, 32, "float16"),
    "none": ([0, 0], 4, 16, 32, "float32"),
}
"""Rows of the groups, all rows, out, in, dtype."""


def case(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    sizes, rows, out, inner, dtype = CASES[name]
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    x = rng.standard_normal((rows, inner)).astype(jnp.dtype(dtype))
    x[offsets[-1] :] = np.nan
    return x, rng.standard_normal((len(sizes), out, inner)).astype(jnp.dtype(dtype)), offsets


def run(*operands: np.ndarray, block: int = 1) -> np.ndarray:
    with interpreted():
        return np.asarray(jax.jit(partial(grouped.matmul, kernel=TRITON, target=TARGET, block=block))(*operands))


@pytest.mark.parametrize("name", CASES)
def test_each_row_is_multiplied_with_the_matrix_of_its_group(name: str):
    x, weight, offsets = case(name)
    found, end = run(x, weight, offsets), offsets[-1]
    expected = grouped.reference(x, weight, offsets)[:end]
    tolerance = BFLOAT16 * np.abs(expected) if x.dtype.itemsize == 2 else 0
    assert (np.abs(found[:end].astype(np.float64) - expected) <= tolerance + 1e-4).all()
    assert np.isnan(found[end:].astype(np.float32)).all(), "rows of no group are not written"


@pytest.mark.parametrize("name", ["few rows", "several tiles"])
def test_int8(name: str):
    x, weight, offsets = case(name)
    block = int8_matmul.rotation(x.shape[1])
    values, scales = int8_matmul.quantise_weight(weight.astype(np.float32), block)
    found = run(x, values, offsets, scales, block=block).astype(np.float64)
    for group, (first, last) in enumerate(pairwise(offsets)):
        rows = x[first:last].astype(np.float32)
        expected = int8_matmul.reference(rows, values[group], scales[group], block)
        step = (
            int8_matmul.row_scales(int8_matmul.rotate(rows, block))[:, None] * 127 * scales[group]
            if last > first
            else 0
        )
        tolerance = BFLOAT16 * np.abs(expected) if x.dtype.itemsize == 2 else 1e-6 * np.abs(expected)
        assert (np.abs(found[first:last] - expected) <= 2.01 * step + tolerance).all()


cut = jax.jit(triton_grouped.cut, static_argnums=(1, 2))
GROUPS, ROWS, TILE = 5, 40, 16


@settings(deadline=None)
@given(st.lists(st.integers(0, ROWS // GROUPS * 2), min_size=GROUPS, max_size=GROUPS))
def test_the_tiles_are_the_rows_of_each_group_once(sizes: list[int]):
    offsets = np.minimum(np.concatenate([[0], np.cumsum(sizes)]), ROWS).astype(np.int32)
    tiles = np.asarray(cut(offsets, ROWS, TILE))
    found = [(group, row) for group, first, count in tiles.tolist() for row in range(first, first + count)]
    assert found == [(g, row) for g in range(GROUPS) for row in range(offsets[g], offsets[g + 1])]
    assert tiles[:, 2].max(initial=0) <= TILE


@pytest.mark.parametrize(("rows", "groups"), [(1, 512), (64, 128), (4096, 8), (16384, 8), (7, 7)])
@pytest.mark.parametrize(("dtype", "inner"), [("bfloat16", 2048), ("float32", 768), ("int8", 48)])
def test_tiles_are_what_the_device_takes(rows: int, groups: int, dtype: str, inner: int):
    size = jnp.dtype(dtype).itemsize
    made = triton_grouped.tiling(rows, groups, inner, size)
    for side in (made.block_m, made.block_n, made.block_k):
        assert side >= 16 and side & (side - 1) == 0, "powers of two, 16 at least for a product"
    assert dtype != "int8" or made.block_k >= 32
    staged = (made.block_m + made.block_n) * made.block_k * size * made.options.stages
    assert staged <= 113 << 10, "two programs fit on a multiprocessor of an H100"
