"""Native operations on rows against the layers' own formulas: activations, norms, rope."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.tiny import config

from jaxinfer.functional.taps import Taps
from jaxinfer.kernels import rowwise
from jaxinfer.kernels.matmul import choose
from jaxinfer.kernels.native import build
from jaxinfer.layers.attention import StepContext
from jaxinfer.layers.linear import use_fusion, use_kernel
from jaxinfer.layers.mlp import ACTIVATIONS
from jaxinfer.layers.norms import Scaling, normalise
from jaxinfer.layers.rope import apply_rope, deinterleave
from jaxinfer.loading import weights
from jaxinfer.sharding import make_mesh

pytestmark = pytest.mark.skipif(build.lacking() is not None, reason="the native kernels need AVX2 and a compiler")
ROWS, COLUMNS = 70, 333
"""Neither is a multiple of what the kernels take at a time."""
EPS = 1e-5
SCALINGS = [Scaling(offset, wide) for offset, wide in product((0.0, 1.0), (False, True))]
TOLERANCES = {"float32": 1e-6, "bfloat16": 2**-8}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES)
KINDS = pytest.mark.parametrize("activation", {number: name for name, number in rowwise.GATES.items()}.values())


def values(*shape: int, dtype: str, seed: int = 0, size: float = 1.0) -> np.ndarray:
    made = np.random.default_rng(seed).normal(size=shape) * size
    return made.astype(np.float32).astype(jnp.dtype(dtype))


def floats(x: jax.Array | np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def assert_near(found: jax.Array, expected: np.ndarray | jax.Array, dtype: str, times: float = 1) -> None:
    tolerance = times * TOLERANCES[dtype]
    np.testing.assert_allclose(floats(found), floats(expected), rtol=tolerance, atol=tolerance)


def test_all_activations_have_kernels():
    assert set(rowwise.GATES) == set(ACTIVATIONS)


@KINDS
@DTYPES
def test_gated_activations(activation: str, dtype: str):
    far = np.linspace(-120, 120, 8 * COLUMNS).reshape(4, -1).astype(np.float32).astype(jnp.dtype(dtype))
    both = np.concatenate([values(ROWS, 2 * COLUMNS, dtype=dtype, size=4), far])
    gate, up = both[:, :COLUMNS], both[:, COLUMNS:]
    with jax.enable_x64(True):
        expected = floats(jax.jit(ACTIVATIONS[activation])(floats(gate))) * floats(up)
    found = rowwise.gated(jnp.asarray(both), jnp.asarray(both), activation, COLUMNS, (0, COLUMNS))
    np.testing.assert_allclose(floats(found), expected, rtol=TOLERANCES[dtype], atol=1e-5)
    shifted = jnp.asarray(np.pad(up, ((0, 0), (3, 5))))
    apart = rowwise.gated(jnp.asarray(gate), shifted, activation, COLUMNS, (0, 3))
    np.testing.assert_array_equal(floats(apart), floats(found))


@KINDS
@DTYPES
def test_activations_of_numbers_that_are_not_finite_are_those_of_xla(activation: str, dtype: str):
    """Zeros are not computed, unless the other operand is something else."""
    gate = jnp.asarray(np.array([[np.nan, np.inf, -np.inf, 1e30, -1e30, 0, 0, 0], [0] * 8], jnp.dtype(dtype)))
    up = jnp.asarray(np.array([[1, 1, 1, 1, 1, np.nan, np.inf, 0], [1, np.nan] * 4], jnp.dtype(dtype)))
    found = rowwise.gated(gate, up, activation, 8, (0, 0))
    expected = jax.jit(lambda gate, up: ACTIVATIONS[activation](gate) * up)(gate, up)
    np.testing.assert_array_equal(floats(found), floats(expected))


def test_columns_beyond_the_matrix_are_an_error():
    both = jnp.asarray(np.ones((2, 8), np.float32))
    with pytest.raises(Exception, match="columns of gate or up beyond their matrix"):
        rowwise.gated(both, both, "silu", 5, (0, 4)).block_until_ready()


@DTYPES
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_norms_of_sums(scaling: Scaling, dtype: str):
    x, y = (jnp.asarray(values(ROWS, COLUMNS, dtype=dtype, seed=seed)) for seed in (0, 1))
    scale, how = jnp.asarray(values(COLUMNS, dtype=dtype, seed=2)), rowwise.RmsScaling(EPS, *scaling)

    @jax.jit
    def run(x: jax.Array, y: jax.Array, scale: jax.Array) -> tuple[jax.Array, ...]:
        total, normed = rowwise.add_rms_norm(x, y, scale, how)
        alone = rowwise.rms_norm(total.reshape(2, -1, COLUMNS), scale, how).reshape(ROWS, -1)
        return total, normed, alone, x + y, scaling(normalise(total, EPS), scale, total.dtype)

    total, normed, alone, added, expected = run(x, y, scale)
    np.testing.assert_array_equal(floats(total), floats(added))
    np.testing.assert_array_equal(floats(alone), floats(normed))
    assert_near(normed, expected, dtype, times=2)


def test_a_row_that_is_not_finite_stays_so_and_changes_no_other():
    x = values(3, COLUMNS, dtype="bfloat16")
    x[1, 5], x[2, 7] = np.nan, np.inf
    scale, how = jnp.asarray(values(COLUMNS, dtype="bfloat16", seed=1)), rowwise.RmsScaling(EPS, *Scaling())
    found = floats(rowwise.rms_norm(jnp.asarray(x), scale, how))
    assert np.isfinite(found[0]).all() and np.isnan(found[1]).all() and np.isnan(found[2, 7])


@DTYPES
@pytest.mark.parametrize(
    ("dim", "half", "interleaved", "normed"),
    [(64, 32, False, False), (72, 20, True, False), (72, 20, False, True), (64, 32, True, True)],
)
def test_queries_and_keys_are_normed_and_rotated(dim: int, half: int, interleaved: bool, normed: bool, dtype: str):
    heads, ends, how = (6, 2), (6 * dim, 8 * dim), rowwise.RmsScaling(EPS, *Scaling())
    qkv, turns = values(ROWS, 10 * dim, dtype=dtype), values(ROWS, half, dtype="float32", seed=1)
    scales = tuple(values(dim, dtype=dtype, seed=seed) for seed in (2, 3)) if normed else None

    def turned(part: jax.Array, angles: tuple[jax.Array, ...], scale: jax.Array | None) -> jax.Array:
        part = part.reshape(ROWS, -1, dim)
        part = part if scale is None else Scaling()(normalise(part, EPS), scale, part.dtype)
        return apply_rope(deinterleave(part, 2 * half) if interleaved else part, *angles)

    @jax.jit
    def run(qkv: jax.Array, scales: tuple[jax.Array, ...] | None, *angles: jax.Array) -> tuple[jax.Array, ...]:
        own = scales or (None, None)
        parts = (turned(part, angles, scale) for part, scale in zip(jnp.split(qkv, ends, axis=1), own, strict=False))
        return *rowwise.turn(qkv, *angles, scales, how, heads, dim, interleaved=interleaved), *parts

    q, k, v, expected_q, expected_k = run(qkv, scales, np.cos(turns), np.sin(turns))
    assert (q.shape, k.shape) == (expected_q.shape, expected_k.shape)
    assert_near(q, expected_q, dtype, times=4)  # rounding of angles, of norms, and of results that cancel
    assert_near(k, expected_k, dtype, times=4)
    np.testing.assert_array_equal(floats(v), floats(qkv[:, ends[1] :].reshape(ROWS, 2, dim)))


@DTYPES
def test_a_row_has_the_same_bits_among_any_others_and_padding_gives_zeros(dtype: str):
    how, columns = rowwise.RmsScaling(EPS, *Scaling()), 2 * COLUMNS
    x, y = (values(ROWS, columns, dtype=dtype, seed=seed) for seed in (0, 1))
    scale, angles = jnp.asarray(values(columns, dtype=dtype)), values(ROWS, 11, dtype="float32", seed=2)

    def run(first: int, end: int, real: int) -> list[np.ndarray]:
        live = (np.arange(ROWS) < real)[:, None].astype(x.dtype)
        a, b, wide = (jnp.asarray((part * live)[first:end]) for part in (x, y, np.concatenate([x, y], axis=1)))
        turns = jnp.asarray(angles[first:end])
        made = rowwise.turn(wide, turns, turns, None, how, (2, 1), COLUMNS, interleaved=False)
        results = (rowwise.gated(a, a, "gelu", COLUMNS, (0, COLUMNS)), *rowwise.add_rms_norm(a, b, scale, how), *made)
        return [floats(result) for result in results]

    whole = run(0, ROWS, ROWS)
    for first, end, real in ((0, 1, ROWS), (3, 40, ROWS), (0, ROWS, 5)):
        for found, expected in zip(run(first, end, real), whole, strict=True):
            live = min(end, real) - first
            np.testing.assert_array_equal(found[:live], expected[first : first + live])
            assert not found[live:].any()


def test_other_dtypes_and_implementations_are_left_to_xla():
    half, single = (jnp.asarray(np.ones((1, 2), dtype)) for dtype in (np.float16, np.float32))
    assert rowwise.serves(choose.STABLE, single, single) and not rowwise.serves(choose.NATIVE, half)
    assert not rowwise.serves(choose.NATIVE, single, half) and not rowwise.serves(choose.XLA, single)


@DTYPES
def test_layers_give_the_same_bits_where_their_parts_are_read(dtype: str):
    """Results are near those of XLA, and a part that is read was called."""
    module, tokens = weights.random(config("qwen3") | {"dtype": dtype}, make_mesh(1)), 5
    x = jnp.asarray(values(tokens, module.config.attention.width, dtype=dtype))
    turns = values(tokens, module.config.attention.head_dim // 2, dtype="float32")
    rope = jnp.asarray(np.cos(turns)), jnp.asarray(np.sin(turns))
    at = jnp.asarray(np.arange(tokens, dtype=np.int32))
    step = StepContext(at, jnp.asarray(np.ones(tokens, bool)), at, (), make_mesh(1))

    def run(kernel: str, *paths: str, fused: bool = True) -> tuple[str, list[np.ndarray]]:
        own, taps = nnx.merge(*nnx.split(module)), Taps(paths)
        use_kernel(own, kernel)
        use_fusion(own, fused)
        taps.attach(own)

        def compute(x: jax.Array, rope: tuple[jax.Array, ...]) -> list[jax.Array]:
            layer = own.layers[0]
            total, normed = layer.added(x, 2 * x)
            made = [*layer.attention._project(x, rope, step)[:3], total, normed, layer.mlp.hidden(normed)]
            assert set(taps.captured(x)) == set(paths)
            return made

        lowered = jax.jit(compute).lower(x, rope)
        return lowered.as_text(), [np.asarray(one) for one in lowered.compile()(x, rope)]

    read = ("layers.0.attention.k_norm", "layers.0.mlp.gate_up", "layers.0.mlp_norm")
    (plain, expected), (whole, found) = run(choose.XLA), run(choose.STABLE)
    ways = {"read": run(choose.STABLE, *read), "projections apart": run(choose.STABLE, fused=False)}
    targets = "jaxinfer_turn", "jaxinfer_gated", "jaxinfer_add_rms_norm"
    assert "jaxinfer" not in plain and all(target in whole for target in targets)
    for one, wanted in zip(found, expected, strict=True):
        assert_near(one, wanted, dtype, times=10)
    for name, (_, others) in ways.items():
        for one, other in zip(found, others, strict=True):
            np.testing.assert_array_equal(floats(one), floats(other), name)
