"""The stable native product: a row has the same bits whatever the number of rows, and padding of zeros is skipped."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import random_runner

from jaxinfer.config import EngineConfig
from jaxinfer.engine.sizing import deterministic
from jaxinfer.errors import ConfigError
from jaxinfer.kernels.matmul import choose, grouped
from jaxinfer.kernels.native import build

native = pytest.mark.skipif(build.lacking() is not None, reason="the native kernels need AVX2 and a compiler")
ROWS = 70
"""More than two times as many as are multiplied as dot products at a time."""


def operands(dtype: str, columns: int = 90) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 2)
    shapes = (ROWS, 200), (columns, 200)
    return tuple(jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True))


@native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_has_the_same_bits_among_any_number_of_rows(dtype: str):
    x, weight = operands(dtype)
    whole = choose.matmul(x, weight, kernel=choose.STABLE)
    for count in (1, 3, 32, 33, 64):
        some = choose.matmul(x[:count], weight, kernel=choose.STABLE)
        np.testing.assert_array_equal(np.asarray(some, np.float32), np.asarray(whole[:count], np.float32))
    np.testing.assert_allclose(
        np.asarray(whole, np.float32), np.asarray(x, np.float32) @ np.asarray(weight, np.float32).T, rtol=2e-2, atol=0.2
    )


@native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_zeros_at_the_end_are_skipped_and_others_keep_their_bits(dtype: str):
    """A norm with negative weights makes -0 of padding; were such a row computed, NaN in the weights would show."""
    x, weight = operands(dtype)
    signs = jnp.where(jnp.arange(x.shape[1]) % 3 == 0, -1, 1).astype(dtype)
    padded = jnp.where((jnp.arange(ROWS) < 5)[:, None], x, 0) * signs
    skipped = choose.matmul(padded, jnp.full_like(weight, jnp.nan), kernel=choose.STABLE)
    assert np.isnan(np.asarray(skipped[:5], np.float32)).all()
    assert not np.asarray(skipped[5:], np.float32).any()
    x = x * signs
    found = choose.matmul(padded, weight, kernel=choose.STABLE)
    np.testing.assert_array_equal(
        np.asarray(found[:5], np.float32), np.asarray(choose.matmul(x[:5], weight, kernel=choose.STABLE), np.float32)
    )
    assert not np.asarray(found[5:], np.float32).any()


@native
def test_a_row_has_the_same_bits_in_a_group_of_any_size():
    x, weight = operands("bfloat16")
    whole = grouped.matmul(x, weight[None], jnp.array([0, ROWS]), kernel=choose.STABLE)
    parts = grouped.matmul(x, jnp.stack([weight] * 3), jnp.array([0, 2, 40, ROWS]), kernel=choose.STABLE)
    np.testing.assert_array_equal(np.asarray(whole, np.float32), np.asarray(parts, np.float32))


@pytest.mark.parametrize("name", ["decode_buckets", "prefill_buckets"])
def test_buckets_are_refused(name: str):
    program = replace(random_runner().program, deterministic=True)
    with pytest.raises(ConfigError, match=f"{name} is .8., but deterministic=True.*max_num_batched_tokens"):
        deterministic.settings(EngineConfig(deterministic=True, **{name: [8]}), program)
    settings = deterministic.settings(EngineConfig(deterministic=True, max_num_seqs=199), program)
    assert settings.max_num_batched_tokens == 199


@native
def test_steps_are_larger_where_padding_is_skipped():
    program = replace(random_runner().program, deterministic=True, kernel="native", dtype=jnp.dtype("float32"))
    tokens = {
        kernel: deterministic.settings(EngineConfig(deterministic=True, matmul_kernel=kernel), program)
        for kernel in ("native", "xla")
    }
    assert tokens["native"].max_num_batched_tokens > tokens["xla"].max_num_batched_tokens
