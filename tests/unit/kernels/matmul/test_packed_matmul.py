"""Products with weights of 4 bits against float64: native and XLA's, every way rows, columns and groups can be left."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import four_bits
from support.four_bits import dequantised
from support.native import require_native_kernels

from jaxinfer.kernels.matmul import choose, grouped, packed_matmul
from jaxinfer.kernels.matmul.choose import NATIVE, STABLE, XLA
from jaxinfer.kernels.matmul.packed_matmul import Packed

SHAPES = [
    (1, 16, 32, 8),
    (1, 3, 576, 64),
    (2, 47, 640, 128),
    (5, 33, 96, 96),
    (7, 50, 288, 16),
    (32, 49, 576, 192),
    (33, 70, 384, 32),
    (45, 20, 200, 40),
]
"""Rows, columns, inner dimension, columns of a group: few rows (up to 32) and many, whole blocks of 128 and parts,
groups within, across and of several blocks."""
FORMS = ("float16", "float16 zeros", "bfloat16 zeros", "float32 zeros", "uint8")
"""Dtypes of scales, and whether there are zero points; uint8 is MXFP4."""
SIZES = {"one each": ([1] * 4, 4), "few and many, padding": ([3, 0, 9, 40], 60), "none": ([0, 0], 3)}
"""Rows of each group, and how many there are with those of none."""


def numbers(rows: int, inner: int, dtype: str) -> np.ndarray:
    return np.random.default_rng(rows).standard_normal((rows, inner)).astype(jnp.dtype(dtype))


def reference(x: np.ndarray, packed: Packed) -> np.ndarray:
    return x.astype(np.float64) @ dequantised(packed).astype(np.float64).T


def product(x: np.ndarray, packed: Packed, kernel: str, **how) -> np.ndarray:
    return np.asarray(jax.jit(partial(packed_matmul.matmul, kernel=kernel, **how))(x, packed))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "bfloat16 to float32"])
@pytest.mark.parametrize(
    ("kernel", "number"),
    [*((NATIVE, number) for number in range(len(SHAPES))), (STABLE, 5), (XLA, 2), (XLA, 6)],
)
def test_products(kernel: str, number: int, kind: str):
    if kernel != XLA:
        require_native_kernels()
    (rows, columns, inner, group), (name, _, result) = SHAPES[number], kind.partition(" to ")
    x = numbers(rows, inner, name)
    for form in (FORMS[0], FORMS[1 + number % 3], FORMS[-1]) if result == "" else FORMS[1:2]:
        packed = four_bits.random((columns, inner), group, form)
        found = product(x, packed, kernel, dtype=result or None)
        expected = reference(x, packed)
        assert found.shape == expected.shape and found.dtype == jnp.dtype(result or name)
        size = np.abs(x.astype(np.float64)) @ np.abs(dequantised(packed)).T
        # Few rows are multiplied with unrounded weights; others, and XLA, with weights of the activations' dtype.
        direct = kernel == STABLE or kernel == NATIVE and rows <= packed_matmul.DIRECT_ROWS[name]
        tolerance = (2e-6 if direct or name == "float32" else 2**-9) * size
        tolerance += 2**-8 * np.abs(expected) if found.dtype == jnp.bfloat16 else 0
        assert (np.abs(found.astype(np.float64) - expected) <= tolerance).all()


def by_group(x: np.ndarray, packed: Packed, offsets: np.ndarray, kernel: str) -> np.ndarray:
    return np.asarray(jax.jit(partial(grouped.packed, kernel=kernel))(x, packed, offsets))


@pytest.mark.parametrize("kernel", [NATIVE, STABLE, XLA])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SIZES)
def test_each_row_is_multiplied_with_the_matrix_of_its_group(name: str, dtype: str, kernel: str):
    """Rows of no group are NaN, and so are the matrices of groups without rows."""
    if kernel != XLA:
        require_native_kernels()
    sizes, rows = SIZES[name]
    offsets, x = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32), numbers(rows, 192, dtype)
    x[offsets[-1] :] = np.nan
    for form in ("bfloat16 zeros", "uint8"):
        packed = four_bits.random((len(sizes), 50, 192), 32, form)
        packed.scales[np.array(sizes) == 0] = 255 if form == "uint8" else np.nan
        found, whole = by_group(x, packed, offsets, kernel), dequantised(packed)
        assert found.shape == (rows, 50)
        for group, (first, last) in enumerate(pairwise(offsets)):
            own, wanted = x[first:last].astype(np.float64), whole[group].astype(np.float64).T
            tolerance = (2**-7 if dtype == "bfloat16" else 2e-6) * (np.abs(own) @ np.abs(wanted))
            assert (np.abs(found[first:last].astype(np.float64) - own @ wanted) <= tolerance).all()


@pytest.mark.parametrize("kernel", [NATIVE, XLA])
@pytest.mark.parametrize("rows", [1, 40])
def test_the_exponent_255_is_nan_and_others_are_exact(rows: int, kernel: str):
    require_native_kernels()
    packed = four_bits.random((3, 96), 32, "uint8")
    packed.scales[:] = [[127, 1, 130], [0, 127, 127], [255, 127, 127]]
    packed.codes[:] = 0x7A  # -1 and 6
    assert np.isnan(packed_matmul.dequantise(Packed(*map(jnp.asarray, packed[:2])), "float32")[2, :32]).all()
    sums = []
    for group in range(3):
        x = np.zeros((rows, 96), np.float32)
        x[:, 32 * group : 32 * group + 2] = 2.0**60 if group == 1 else 1
        sums.append(product(x, packed, kernel))
    assert (sums[0][:, 0] == 5).all() and (sums[1][:, 0] == 5 * 2.0**-66).all() and (sums[2][:, 0] == 40).all()
    assert np.isnan(sums[0][:, 2]).all() and (np.abs(sums[0][:, 1]) < 1e-36).all() and (sums[2][:, 1] == 5).all()


@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_many_rows_are_multiplied_with_the_dequantised_weight(dtype: str, units: bool, monkeypatch):
    """The native product unpacks to the bits that the loader dequantises to, also for XLA's matrix units."""
    require_native_kernels()
    monkeypatch.setattr(choose, "cpu_has_matrix_units", lambda: units)
    for form in FORMS:
        packed = four_bits.random((21, 288), 48, form)
        x = np.eye(288, dtype=np.float32).astype(jnp.dtype(dtype))
        found = product(x, packed, NATIVE).T
        np.testing.assert_array_equal(found, dequantised(packed).astype(x.dtype))


@pytest.mark.parametrize("kernel", [NATIVE, XLA])
@pytest.mark.parametrize("rows", [3, 40])
def test_a_part_of_the_weight(rows: int, kernel: str):
    require_native_kernels()
    x, packed = numbers(rows, 256, "float32"), four_bits.random((90, 256), 32, "float16 zeros")
    for first, end in ((0, 50), (37, 90)):
        found = product(x, packed, kernel, part=(first, end))
        np.testing.assert_allclose(found, product(x, packed, kernel)[:, first:end], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_stable_product_of_a_row_has_the_same_bits_among_any_rows(dtype: str):
    require_native_kernels()
    x, packed = numbers(70, 320, dtype), four_bits.random((50, 320), 64, "float16 zeros")
    whole = product(x, packed, STABLE)
    for count in (1, 34):
        np.testing.assert_array_equal(product(x[:count], packed, STABLE), whole[:count])
    padded = np.where((np.arange(70) < 5)[:, None], x, 0).astype(x.dtype)
    nothing = packed._replace(scales=np.full_like(packed.scales, np.nan))
    skipped = product(padded, nothing, STABLE).astype(np.float32)
    assert np.isnan(skipped[:5]).all() and not skipped[5:].any(), "rows of zeros at the end are not computed"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_not_finite_stays_alone(value: float):
    require_native_kernels()
    x, packed = numbers(6, 192, "bfloat16"), four_bits.random((34, 192), 32, "float16 zeros")
    whole = product(x, packed, NATIVE)
    x[2, 5] = value
    found = product(x, packed, NATIVE)
    assert not np.isfinite(found[2].astype(np.float32)).any()
    np.testing.assert_array_equal(np.delete(found, 2, 0), np.delete(whole, 2, 0))


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_are_rounded_to_the_nearest_code(symmetric: bool):
    rows = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    rows[1, :32], rows[2] = 0, np.abs(rows[2])
    packed = packed_matmul.quantise(jnp.asarray(rows), packed_matmul.Packing(32, symmetric, "float32"))
    assert (packed.zeros is None) == symmetric and packed.group == 32
    step = np.repeat(np.asarray(packed.scales), 32, axis=1)
    error = np.abs(dequantised(packed) - rows)
    assert (error <= 0.5001 * step).mean() > (0.97 if symmetric else 0.99) and (error <= 1.001 * step).all()
    assert not error[1, :32].any()


def test_rows_are_rounded_to_floats_of_a_power_of_two():
    rows = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    rows[1, :32], rows[2] = 0, np.abs(rows[2])
    packed = packed_matmul.quantise(jnp.asarray(rows), packed_matmul.Packing(32, True, packed_matmul.EXPONENT))
    found = dequantised(packed)
    assert packed.scales.dtype == jnp.uint8 and packed.zeros is None and not found[1, :32].any()
    largest = np.repeat(np.abs(rows.reshape(5, 2, 32)).max(-1), 32, axis=1)
    assert (np.abs(found - rows) <= largest / 4).all()
    again = packed_matmul.quantise(jnp.asarray(found), packed_matmul.Packing(32, True, packed_matmul.EXPONENT))
    np.testing.assert_array_equal(dequantised(again), found)
