"""The Triton kernels of products with weights of 4 bits and FP8, interpreted, against float64 over random shapes."""

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

from jaxinfer.kernels.matmul import fp8_matmul, grouped, packed_matmul, triton_fp8, triton_packed
from jaxinfer.kernels.matmul.choose import TRITON
from jaxinfer.kernels.matmul.packed_matmul import Packed
from jaxinfer.kernels.triton import triton_launch
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


@settings(deadline=None, max_examples=12, derandomize=True)
@given(
    rows=st.integers(1, triton_fp8.MOST_ROWS + 30),
    columns=st.integers(1, 150),
    group=st.sampled_from([32, 96, 128, 200]),
    groups=st.sampled_from([0, 0, 1, 3]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_products_in_fp8(rows: int, columns: int, group: int, groups: int, dtype: str):
    """With quantised activations for 0 groups; whole rows and groups of a weight otherwise, for few rows."""
    rng, activations = np.random.default_rng(rows), groups == 0
    inner = group * max(1, groups)
    bits = rng.integers(0, 126, (columns, inner)).astype(np.uint8) | rng.integers(0, 2, (columns, inner)) << 7
    codes = bits.astype(np.uint8).view(fp8_matmul.CODE)
    scales = (rng.random((columns, max(1, groups))) * 0.1 + 0.01).astype(np.float32)
    x = rng.standard_normal((rows, inner)).astype(jnp.dtype(dtype))
    call = partial(packed_matmul.matmul, kernel=TRITON, target=TARGET, activations=activations)
    with interpreted() as patch:
        launched = []
        real = triton_launch.launch
        patch.setattr(triton_fp8, "quantise", lambda x, target: fp8_matmul.quantise(x))
        patch.setattr(triton_launch, "launch", lambda kernel, *a, **k: launched.append(kernel) or real(kernel, *a, **k))
        found = np.asarray(jax.jit(call)(x, Packed(codes, scales)))
    assert len(launched) == (activations or rows <= triton_fp8.MOST_ROWS and (groups == 1 or group % 32 == 0))
    whole = codes.astype(np.float64) * np.repeat(scales, inner // scales.shape[1], axis=1)
    left = x.astype(np.float64)
    if activations:
        made, own = fp8_matmul.quantise(x)
        left = made.astype(np.float64) * own[:, None]
    expected, size = left @ whole.T, np.abs(left) @ np.abs(whole).T
    tolerance = 1e-5 if dtype == "float32" else 2 * BFLOAT16
    assert found.shape == expected.shape and found.dtype == x.dtype
    assert (np.abs(found.astype(np.float64) - expected) <= tolerance * size + 1e-6).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_quantised_to_fp8(dtype: str):
    x = np.random.default_rng(1).standard_normal((5, 2500)).astype(jnp.dtype(dtype))
    x[1], x[2, 3], x[3, 2400] = 0, np.inf, np.nan
    with interpreted():
        codes, scales = jax.jit(partial(triton_fp8.quantise, target=TARGET))(x)
    expected, own = fp8_matmul.quantise(x)
    np.testing.assert_array_equal(scales, own)
    assert np.isnan(own[2:4]).all() and np.isfinite(own[[0, 1, 4]]).all()
    steps = np.asarray(codes).view(np.uint8)[[0, 1, 4]].astype(int) - expected.view(np.uint8)[[0, 1, 4]]
    assert set(np.unique(steps)) <= {-8, 0, 1}, "the interpreter rounds ties up, and carries no bit into the exponent"


@pytest.mark.parametrize("rows", [1, 20, 64, 65, 4096])
@pytest.mark.parametrize(("group", "inner"), [(8, 200), (24, 96), (32, 2880), (32, 64), (128, 4096), (4096, 4096)])
def test_tiles_are_what_the_device_takes(rows: int, group: int, inner: int):
    for itemsize in (2, 4):
        made = triton_packed.tiling(rows, group, inner, itemsize)
        for side in (made.block_m, made.block_n, made.block_k // 2):
            assert side >= 16 and side & (side - 1) == 0, "powers of two, 16 at least for a product"
        assert group % made.block_k == 0 or made.block_k % group == 0 or made.block_k == 32
        assert inner % made.block_k == 0 or inner % 32


@pytest.mark.parametrize("rows", [1, 20, 64, 2048])
@pytest.mark.parametrize("group", [None, 32, 96, 4096])
def test_tiles_of_fp8_are_what_the_device_takes(rows: int, group: int | None):
    for itemsize in (1, 2, 4):
        made = triton_fp8.tiling(rows, group, itemsize)
        least = 64 if itemsize == 1 else 16, 16, 32
        for side, fewest in zip((made.block_m, made.block_n, made.block_k), least, strict=True):
            assert side >= fewest and side & (side - 1) == 0, "powers of two, enough for the device's products"
        assert itemsize == 1 or group is None or group % made.block_k == 0
