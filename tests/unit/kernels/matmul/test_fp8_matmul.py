"""Products with weights in FP8 against float64: of the dequantised weight, and of the codes of both operands."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from support.native import require_native_kernels

from jaxinfer.kernels.matmul import fp8_matmul, packed_matmul
from jaxinfer.kernels.matmul.choose import NATIVE, STABLE, XLA
from jaxinfer.kernels.matmul.packed_matmul import Packed, Packing

KERNELS = (XLA, NATIVE, STABLE)


def weight(columns: int, inner: int, groups: int, scales: str = "float32") -> Packed:
    """Make every code but NaN, with random scales."""
    rng = np.random.default_rng(columns)
    bits = rng.integers(0, 254, (columns, inner)).astype(np.uint8)
    bits += bits >= 127
    made = (rng.random((columns, groups)) * 0.1 + 0.01).astype(jnp.dtype(scales))
    return Packed(bits.view(ml_dtypes.float8_e4m3fn), made)


def dequantised(packed: Packed) -> np.ndarray:
    return np.asarray(packed.codes, np.float64) * np.repeat(np.asarray(packed.scales, np.float64), packed.group, axis=1)


def numbers(rows: int, inner: int, dtype: str) -> np.ndarray:
    return np.random.default_rng(rows).standard_normal((rows, inner)).astype(jnp.dtype(dtype))


def product(x: np.ndarray, packed: Packed, kernel: str, **how) -> np.ndarray:
    if kernel != XLA:
        require_native_kernels()
    return np.asarray(jax.jit(partial(packed_matmul.matmul, kernel=kernel, **how))(x, packed))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kernel", KERNELS)
def test_products_are_those_of_the_dequantised_weight(kernel: str, groups: int, dtype: str):
    for rows, columns, inner in ((1, 50, 192), (40, 33, 384)):
        x, packed = numbers(rows, inner, dtype), weight(columns, inner, groups, dtype)
        found = product(x, packed, kernel, dtype="float32")
        whole = dequantised(packed)
        exact, size = x.astype(np.float64) @ whole.T, np.abs(x.astype(np.float64)) @ np.abs(whole).T
        # A scale of a whole row multiplies sums, so that weights are rounded to bfloat16 only where groups have scales.
        tolerance = 2**-9 if dtype == "bfloat16" and groups > 1 else 2e-6
        assert (np.abs(found - exact) <= tolerance * size).all()
    part = product(x, packed, kernel, dtype="float32", part=(3, 21))
    np.testing.assert_allclose(part, found[:, 3:21], rtol=0, atol=1e-6 * size.max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_products_of_quantised_activations(kernel: str, dtype: str):
    """The rounding of both operands is that of a conversion on the host: XLA leaves none of them out."""
    x, packed = numbers(20, 192, dtype), weight(33, 192, 1)
    x[3], x[4, 7] = 0, 300
    codes, scales = fp8_matmul.quantise(x)
    assert codes.dtype == fp8_matmul.CODE and np.abs(codes.astype(np.float32)).max(1)[4] == 448
    made = codes.astype(np.float64) * scales[:, None]
    found = product(x, packed, kernel, activations=True, dtype="float32")
    expected, size = made @ dequantised(packed).T, np.abs(made) @ np.abs(dequantised(packed)).T
    assert (np.abs(found - expected) <= 1e-5 * size).all() and not found[3].any()
    unrounded = x.astype(np.float64) @ dequantised(packed).T
    assert np.abs(found - unrounded).max() > 100 * np.abs(found - expected).max()
    assert (np.abs(found - unrounded) <= 2**-4 * size + 1e-3 * np.abs(dequantised(packed)).sum(1)).all()
    x[2, 5] = np.inf
    other = product(x, packed, kernel, activations=True, dtype="float32")
    assert np.isnan(other[2]).all()
    np.testing.assert_array_equal(np.delete(other, 2, 0), np.delete(found, 2, 0))


def test_shards_quantise_their_own_columns():
    x, packed = numbers(6, 128, "float32"), weight(10, 128, 4)
    equal = Packed(packed.codes, np.repeat(packed.scales[:, :1], 4, axis=1))
    equal.scales[:, 1] = 0  # a group of padding columns
    halves = [Packed(equal.codes[:, part], equal.scales[:, :1]) for part in (slice(0, 64), slice(64, 128))]
    how = dict(kernel=XLA, activations=True)
    expected = sum(product(x[:, i * 64 : i * 64 + 64], half, **how) for i, half in enumerate(halves))
    found = product(x.reshape(6, 2, 64), equal, **how)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    assert np.abs(found - product(x, equal, **how)).max() > 0.1


@pytest.mark.parametrize("activations", [False, True])
def test_rows_are_rounded_to_the_nearest_code(activations: bool):
    rows = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    rows[1], rows[2, 32:] = 0, 100 * rows[2, 32:]
    packed = packed_matmul.quantise(jnp.asarray(rows), Packing(32, True, "float32", fp8=True, activations=activations))
    assert packed.zeros is None and packed.group == 32
    own = rows if activations else rows.reshape(5, 2, 32)
    largest = np.repeat(np.abs(own).max(-1).reshape(5, -1), 2 if activations else 1, axis=1)
    np.testing.assert_allclose(packed.scales, np.maximum(largest / 448, 1e-30), rtol=1e-6)
    step = np.maximum(np.abs(rows) * 2.0**-4, np.repeat(np.asarray(packed.scales), 32, axis=1) * 2.0**-10)
    assert (np.abs(dequantised(packed) - rows) <= 1.001 * step).all()
    on_host = fp8_matmul.quantise(rows)
    if activations:
        np.testing.assert_array_equal(np.asarray(packed.codes).view(np.uint8), on_host[0].view(np.uint8))
        np.testing.assert_array_equal(packed.scales[:, 0], on_host[1])
