"""Products in int8 against sums taken term by term, and against the product they stand for."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxinfer.kernels.matmul import int8_matmul

DTYPES = (np.float32, ml_dtypes.bfloat16)


def numbers(*shape: int, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    """Rows of very different sizes."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * 10.0 ** rng.uniform(-3, 3, (shape[0], *[1] * (len(shape) - 1)))).astype(dtype)


def product(
    x: np.ndarray, weight: np.ndarray, scales: np.ndarray, dtype: type | None = None, block: int = 1
) -> np.ndarray:
    run = jax.jit(int8_matmul.matmul, static_argnums=3, static_argnames="block")
    return np.asarray(run(x, weight, scales, dtype, block=block))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "out"), [(1, 48, 97), (2, 5, 3), (7, 64, 32), (33, 130, 65)])
def test_it_is_the_sum_of_its_terms(rows, columns, out, dtype):
    x = numbers(rows, columns, dtype=dtype)
    weight, scales = int8_matmul.quantise(numbers(out, columns, seed=1))
    found = product(x, weight, scales, np.float32)
    assert found.shape == (rows, out) and found.dtype == np.float32
    expected = int8_matmul.reference(x, weight, scales)
    assert (np.abs(found - expected) <= 1e-6 * np.abs(expected).max(axis=1, keepdims=True)).all()
    np.testing.assert_array_equal(product(x, weight, scales), found.astype(dtype))


@pytest.mark.parametrize(
    ("columns", "tp", "block"),
    [(4096, None, 128), (576, None, 64), (33, None, 1), (1536, 1, 64), (1536, 8, 64), (11008, 16, 16), (12, 4, 1)],
)
def test_a_block_divides_the_columns_of_every_shard(columns: int, tp: int | None, block: int):
    assert int8_matmul.rotation(columns, tp) == block
    assert columns // (tp or 1) % block == 0


@pytest.mark.parametrize("block", [1, 2, 16, 128])
def test_host_and_device_rotate_alike_and_twice_is_once_the_block(block: int):
    rows = np.random.default_rng(0).normal(size=(3, 256)).astype(np.float32)
    once = int8_matmul.rotate(rows, block)
    np.testing.assert_allclose(jax.jit(int8_matmul.rotate, static_argnums=1)(rows, block), once, rtol=0, atol=2e-5)
    np.testing.assert_allclose(int8_matmul.rotate(once, block), block * rows, rtol=0, atol=2e-4)
    np.testing.assert_array_equal(int8_matmul.rotate(rows[1:2], block), once[1:2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "out"), [(1, 48, 97), (3, 5, 3), (7, 64, 32), (33, 384, 65)])
def test_rotated_rows_are_multiplied_as_the_reference_does(rows: int, columns: int, out: int, dtype: type):
    x, block = numbers(rows, columns, dtype=dtype), int8_matmul.rotation(columns)
    x[0] = 0
    weight, scales = int8_matmul.quantise_weight(numbers(out, columns, seed=1), block)
    found, expected = product(x, weight, scales, np.float32, block), int8_matmul.reference(x, weight, scales, block)
    # A number half way between two steps may be rounded to either.
    step = int8_matmul.row_scales(int8_matmul.rotate(x, block))[:, None] * 127 * scales
    assert (np.abs(found - expected) <= 2.01 * step + 1e-6 * np.abs(expected)).all()
    assert not found[0].any()


def test_an_outlier_costs_the_other_columns_little():
    """One channel 300 times as large as the others: a scale for the whole row leaves them a step or two."""
    x, weight = (np.random.default_rng(i).normal(size=(32, 512)).astype(np.float32) for i in range(2))
    x[:, 77] *= 300
    weight[:, 77] = 0
    exact, error = x.astype(np.float64) @ weight.T, []
    for block in (1, 128):
        found = product(x, *int8_matmul.quantise_weight(weight, block), block=block)
        error.append(np.sqrt(np.square(found - exact).mean() / np.square(exact).mean()))
    assert error[0] > 0.5 and error[1] < error[0] / 4


def test_what_other_rows_hold_changes_nothing():
    x, (weight, scales) = numbers(8, 128), int8_matmul.quantise_weight(numbers(16, 128, seed=1), 128)
    others = x[::-1].copy()
    others[2] = x[2]
    others[5, 3] = np.nan
    found, expected = (product(rows, weight, scales, block=128) for rows in (others, x))
    np.testing.assert_array_equal(found[2], expected[2])
    assert np.isnan(found[5]).all() and np.isfinite(np.delete(found, 5, 0)).all()


@pytest.mark.parametrize("rows", [1, 9])
def test_the_error_is_at_most_half_a_unit_on_each_side_of_every_term(rows):
    x, weight = numbers(rows, 64), numbers(32, 64, seed=1)
    values, scales = int8_matmul.quantise(weight)
    units = int8_matmul.row_scales(x)
    # (x + dx)(w + dw) - xw, with |dx| and |dw| at most half of a unit.
    bound = (
        np.abs(x).sum(1)[:, None] * scales / 2
        + np.abs(weight).sum(1) * units[:, None] / 2
        + x.shape[1] * units[:, None] * scales / 4
    )
    error = np.abs(product(x, values, scales) - x.astype(np.float64) @ weight.T.astype(np.float64))
    assert (error <= bound * 1.0001).all()
    assert error.max() > 0, "nothing was rounded"


def test_the_largest_magnitude_of_a_row_is_127_units_and_zero_is_zero():
    values, scales = int8_matmul.quantise(np.array([[0, -2, 1], [3, 0, 1e-9], [0, 0, 0]], np.float32))
    np.testing.assert_array_equal(values, [[0, -127, 64], [127, 0, 0], [0, 0, 0]])
    np.testing.assert_allclose(scales, [2 / 127, 3 / 127, 0], rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_host_and_device_quantise_alike(dtype):
    rows = numbers(64, 96, dtype=dtype)
    on_host, on_device = int8_matmul.quantise(rows), jax.jit(int8_matmul.quantise)(rows)
    for host, device in zip(on_host, on_device, strict=True):
        assert isinstance(host, np.ndarray) and host.dtype == device.dtype
        np.testing.assert_array_equal(host, device)


@pytest.mark.parametrize("tiny", [0.0, 1e-44, 1e-37])
def test_a_row_of_almost_nothing_gives_almost_nothing(tiny):
    weight, scales = int8_matmul.quantise(numbers(16, 8, seed=1))
    x = np.stack([np.full(8, tiny, np.float32), np.ones(8, np.float32)])
    found = product(x, weight, scales)
    assert np.abs(found[0]).max() <= 1e-30 and np.abs(found[1]).max() > 1


@pytest.mark.parametrize("shape", [(4, 24), (4, 3, 8)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_numbers_is_nan_and_alone(bad, shape):
    weight, scales = int8_matmul.quantise(numbers(16, 24, seed=1))
    x = numbers(*shape)
    broken = x.copy()
    broken[(2, *[1] * (len(shape) - 1))] = bad
    found, sound = product(broken, weight, scales), product(x, weight, scales)
    assert np.isnan(found[2]).all() and np.isnan(int8_matmul.row_scales(broken)[2]).any()
    np.testing.assert_array_equal(np.delete(found, 2, 0), np.delete(sound, 2, 0))


def test_a_row_of_weights_that_is_not_numbers_is_a_column_of_nan():
    weight = numbers(16, 24, seed=1)
    weight[3, 5] = np.nan
    with np.errstate(invalid="ignore"):
        values, scales = int8_matmul.quantise(weight)
    found = product(numbers(4, 24), values, scales)
    assert np.isnan(found[:, 3]).all() and np.isfinite(np.delete(found, 3, 1)).all()


@pytest.mark.parametrize("rows", [1, 6])
def test_divided_columns_are_quantised_each_for_itself(rows):
    x = numbers(rows, 4, 16) * np.array([1, 100, 1e-3, 0], np.float32)[:, None]
    weight, scales = int8_matmul.quantise(numbers(32, 64, seed=1))
    found = product(x, weight, scales)
    parts = zip(np.moveaxis(x, 1, 0), np.split(weight, 4, axis=1), strict=True)
    expected = sum(int8_matmul.reference(own, columns, scales) for own, columns in parts)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    one = product(x[:, :1], weight[:, :16], scales)
    np.testing.assert_array_equal(one, product(x[:, 0], weight[:, :16], scales))


def test_long_sums_are_exact():
    columns = 1 << 15
    weight, scales = np.full((2, columns), 127, np.int8), np.ones(2, np.float32)
    found = product(np.full((2, columns), 127, np.float32), weight, scales)
    np.testing.assert_array_equal(found, 127.0 * 127.0 * columns)


def test_the_dtype_of_divided_sums_is_that_of_the_activations():
    """An all-reduce of float32 would move twice the bytes of bfloat16."""
    weight, scales = int8_matmul.quantise(numbers(32, 64))
    made = jax.make_jaxpr(int8_matmul.matmul)(jnp.zeros((3, 4, 16), jnp.bfloat16), weight, scales)
    sums = [e for e in made.jaxpr.eqns if e.primitive.name == "reduce_sum"]
    assert [e.outvars[0].aval.dtype for e in sums] == [jnp.bfloat16]


@pytest.mark.parametrize("shape", [(1, 64), (1, 4, 16)])
def test_a_single_row_is_multiplied_as_two(shape):
    """One row is no GEMM to XLA on a CPU: 20 times as long for a head of 32000 x 1024."""
    made = jax.jit(int8_matmul.matmul).lower(jnp.zeros(shape), jnp.zeros((32, 64), jnp.int8), jnp.ones(32)).as_text()
    products = [line for line in made.splitlines() if "dot_general" in line]
    assert len(products) == 1 and "x2x32xi32" in products[0].replace("<2x32", "<x2x32")
