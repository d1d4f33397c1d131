"""The native products against NumPy's: every way rows and columns can be left over."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.native import require_native_kernels

from jaxinfer.errors import ConfigError
from jaxinfer.kernels.matmul import choose as matmul
from jaxinfer.kernels.matmul import int8_matmul
from jaxinfer.kernels.matmul.choose import NATIVE
from jaxinfer.sharding import make_mesh

SHAPES = [(1, 16, 32), (2, 47, 34), (7, 49, 1000), (32, 100, 66), (33, 48, 64), (45, 97, 130), (9, 33, 384)]
"""Rows, columns, inner dimension: few rows (up to 32) and many, whole panels and parts."""


@pytest.fixture(scope="module", autouse=True)
def native() -> None:
    require_native_kernels()


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "bfloat16 to float32"])
@pytest.mark.parametrize(("rows", "columns", "inner"), SHAPES)
def test_products(rows: int, columns: int, inner: int, kind: str):
    name, _, result = kind.partition(" to ")
    x, w = (a.astype(jnp.dtype(name)) for a in (numbers(rows, inner), numbers(columns, inner, seed=1)))
    found = jax.jit(partial(matmul.matmul, dtype=result or None, kernel=NATIVE))(x, w)
    expected = x.astype(np.float64) @ w.astype(np.float64).T
    assert found.shape == expected.shape and found.dtype == jnp.dtype(result or name)
    # Of bfloat16 8 bits are kept; sums are taken in float32.
    tolerance = 2**-8 * np.abs(expected) if kind == "bfloat16" else 0
    assert (np.abs(np.asarray(found, np.float64) - expected) <= tolerance + 1e-5 * np.sqrt(inner)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "columns", "inner"), [(r, c, k // 4 * 4) for r, c, k in SHAPES])
def test_int8_products(rows: int, columns: int, inner: int, dtype: str):
    x = numbers(rows, inner).astype(jnp.dtype(dtype))
    x[0] = 0
    block = int8_matmul.rotation(inner)
    values, scales = int8_matmul.quantise_weight(numbers(columns, inner, seed=1), block)
    found = jax.jit(partial(int8_matmul.matmul, dtype=jnp.float32, kernel=NATIVE, block=block))(x, values, scales)
    expected = int8_matmul.reference(x.astype(np.float32), values, scales, block)
    # A number half way between two steps may be rounded to either.
    step = int8_matmul.row_scales(int8_matmul.rotate(x, block))[:, None] * 127 * scales
    assert (np.abs(np.asarray(found) - expected) <= 2.01 * step + 1e-6 * np.abs(expected)).all()
    assert not np.asarray(found)[0].any()


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize(("first", "end"), [(0, 50), (3, 52), (37, 120)])
def test_a_part_of_the_weight_is_not_copied(first: int, end: int, quantised: bool):
    x, weight = jnp.asarray(numbers(5, 64)), numbers(120, 64, seed=1)
    operands = [jnp.asarray(a) for a in (int8_matmul.quantise(weight) if quantised else (weight,))]
    multiply = int8_matmul.matmul if quantised else matmul.matmul
    step = jax.jit(partial(multiply, kernel=NATIVE, part=(first, end))).lower(x, *operands).compile()
    np.testing.assert_array_equal(step(x, *operands), multiply(x, *operands, kernel=NATIVE)[:, first:end])
    np.testing.assert_allclose(step(x, *operands), multiply(x, *operands, part=(first, end)), rtol=1e-5, atol=1e-4)
    assert "slice" not in step.as_text()


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_not_finite_stays_alone(rows: int, value: float):
    x = numbers(rows, 64)
    values, scales = int8_matmul.quantise_weight(numbers(50, 64, seed=1), 64)
    run = jax.jit(partial(int8_matmul.matmul, kernel=NATIVE, block=64))
    whole = np.asarray(run(x, values, scales))
    x[2, 5] = value
    found = np.asarray(run(x, values, scales))
    assert not np.isfinite(found[2]).any()
    np.testing.assert_array_equal(np.delete(found, 2, 0), np.delete(whole, 2, 0))


def test_what_it_does_not_serve_goes_to_xla():
    x, w = numbers(3, 33).astype(jnp.bfloat16), numbers(5, 33).astype(jnp.bfloat16)
    found = np.asarray(jax.jit(partial(matmul.matmul, kernel=NATIVE))(x, w), np.float32)
    np.testing.assert_allclose(found, x.astype(np.float32) @ w.astype(np.float32).T, atol=0.1)


def test_the_choice():
    assert matmul.choose("auto", make_mesh()) == NATIVE and matmul.choose("xla", make_mesh()) == "xla"
    assert matmul.choose("auto", make_mesh(2)) == "xla", "XLA cannot divide the call"
    with pytest.raises(ConfigError, match="matmul_kernel must be auto, xla, native or triton, got 'cublas'"):
        matmul.choose("cublas", make_mesh())
    with pytest.raises(ConfigError, match="matmul_kernel is 'triton', but the device is .*, not an NVIDIA GPU"):
        matmul.choose("triton", make_mesh())
