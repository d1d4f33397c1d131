"""The Triton kernel of products with weights of 4 bits, interpreted, against float64 over random shapes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.four_bits import dequantised
from support.interpret import interpreted

from jaxinfer.kernels.matmul import packed_matmul, triton_packed
from jaxinfer.kernels.matmul.choose import TRITON
from jaxinfer.kernels.matmul.packed_matmul import Packed
from jaxinfer.kernels.triton.triton_launch import Target

pytestmark = [pytest.mark.xdist_group("triton"), pytest.mark.slow]

TARGET = Target(90, 2)
BFLOAT16 = 2**-7
"""The interpreter cuts bits off where a device rounds."""


@settings(deadline=None, max_examples=12, derandomize=True)
@given(
    rows=st.integers(1, triton_packed.MOST_ROWS),
    columns=st.integers(1, 150),
    group=st.sampled_from([8, 24, 32, 64, 128, 192]),
    groups=st.integers(1, 3),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    symmetric=st.booleans(),
)
def test_products(rows: int, columns: int, group: int, groups: int, dtype: str, symmetric: bool):
    rng, inner = np.random.default_rng(rows), group * groups
    scales = (rng.random((columns, groups)) * 0.1 + 0.01).astype(np.float16)
    zeros = None if symmetric else rng.integers(0, 17, scales.shape).astype(np.uint8)
    packed = Packed(rng.integers(0, 256, (columns, inner // 2)).astype(np.uint8), scales, zeros)
    x = rng.standard_normal((rows, inner)).astype(jnp.dtype(dtype))
    with interpreted():
        found = np.asarray(jax.jit(partial(packed_matmul.matmul, kernel=TRITON, target=TARGET))(x, packed))
    whole = dequantised(packed).astype(np.float64)
    expected, size = x.astype(np.float64) @ whole.T, np.abs(x.astype(np.float64)) @ np.abs(whole).T
    tolerance = 1e-5 if dtype == "float32" else 2 * BFLOAT16
    assert found.shape == expected.shape and found.dtype == x.dtype
    assert (np.abs(found.astype(np.float64) - expected) <= tolerance * size + 1e-6).all()


@pytest.mark.parametrize("rows", [1, 20, triton_packed.MOST_ROWS])
@pytest.mark.parametrize("group", [8, 24, 32, 128, 4096])
def test_tiles_are_what_the_device_takes(rows: int, group: int):
    for itemsize in (2, 4):
        made = triton_packed.tiling(rows, group, itemsize)
        for side in (made.block_m, made.block_n, made.block_k // 2):
            assert side >= 16 and side & (side - 1) == 0, "powers of two, 16 at least for a product"
        assert group % made.block_k == 0 or made.block_k == 32
