"""The Triton kernel of products with weights of 4 bits, interpreted, against float64 over random shapes."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import four_bits
from support.four_bits import dequantised
from support.interpret import interpreted

from jaxinfer.kernels.matmul import grouped, packed_matmul, triton_packed
from jaxinfer.kernels.matmul.choose import TRITON
from jaxinfer.kernels.triton.triton_launch import Target

pytestmark = [pytest.mark.xdist_group("triton"), pytest.mark.slow]

TARGET = Target(90, 2)
BFLOAT16 = 2**-7
"""The interpreter cuts bits off where a device rounds."""


FORM = st.sampled_from(["float16", "float16 zeros", "uint8"])
"""Dtype of scales, and whether there are zero points; uint8 is MXFP4."""
GROUP = st.sampled_from([8, 24, 32, 64, 128, 192])
DTYPE = st.sampled_from(["float32", "bfloat16"])


def check(found: np.ndarray, x: np.ndarray, whole: np.ndarray) -> None:
    x, whole = x.astype(np.float64), whole.astype(np.float64)
    expected, size = x @ whole.T, np.abs(x) @ np.abs(whole).T
    tolerance = 1e-5 if found.dtype == np.float32 else 2 * BFLOAT16
    assert found.shape == expected.shape
    assert (np.abs(found.astype(np.float64) - expected) <= tolerance * size + 1e-6).all()


@settings(deadline=None, max_examples=12, derandomize=True)
@given(
    rows=st.integers(1, triton_packed.MOST_ROWS),
    columns=st.integers(1, 150),
    group=GROUP,
    groups=st.integers(1, 3),
    dtype=DTYPE,
    form=FORM,
)
def test_products(rows: int, columns: int, group: int, groups: int, dtype: str, form: str):
    packed = four_bits.random((columns, group * groups), group, form)
    x = np.random.default_rng(rows).standard_normal((rows, group * groups)).astype(jnp.dtype(dtype))
    with interpreted():
        found = np.asarray(jax.jit(partial(packed_matmul.matmul, kernel=TRITON, target=TARGET))(x, packed))
    assert found.dtype == x.dtype
    check(found, x, dequantised(packed))


@settings(deadline=None, max_examples=12, derandomize=True)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 3, 20, 70]), min_size=1, max_size=4),
    padding=st.integers(1, 5),
    columns=st.integers(1, 150),
    group=GROUP,
    groups=st.integers(1, 5),
    dtype=DTYPE,
    form=FORM,
)
def test_products_of_experts(
    sizes: list[int], padding: int, columns: int, group: int, groups: int, dtype: str, form: str
):
    packed = four_bits.random((len(sizes), columns, group * groups), group, form)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    x = np.random.default_rng(columns).standard_normal((offsets[-1] + padding, group * groups))
    x = x.astype(jnp.dtype(dtype))
    with interpreted():
        found = np.asarray(jax.jit(partial(grouped.packed, kernel=TRITON, target=TARGET))(x, packed, offsets))
    whole = dequantised(packed)
    for number, (first, last) in enumerate(pairwise(offsets)):
        check(found[first:last], x[first:last], whole[number])
    assert np.isnan(found[offsets[-1] :].astype(np.float32)).all(), "rows of no group are not written"


@pytest.mark.parametrize("rows", [1, 20, 64, 65, 4096])
@pytest.mark.parametrize(("group", "inner"), [(8, 200), (24, 96), (32, 2880), (32, 64), (128, 4096), (4096, 4096)])
def test_tiles_are_what_the_device_takes(rows: int, group: int, inner: int):
    for itemsize in (2, 4):
        made = triton_packed.tiling(rows, group, inner, itemsize)
        for side in (made.block_m, made.block_n, made.block_k // 2):
            assert side >= 16 and side & (side - 1) == 0, "powers of two, 16 at least for a product"
        assert group % made.block_k == 0 or made.block_k % group == 0 or made.block_k == 32
        assert inner % made.block_k == 0 or inner % 32
