"""Estimate of a step's workspace from its jaxpr."""

import jax
import jax.numpy as jnp

from jaxinfer.engine.sizing.workspace import peak_bytes

X = jax.ShapeDtypeStruct((10, 100), jnp.float32)
SIZE = 4 * 10 * 100


def peak(function) -> int:
    return peak_bytes(jax.make_jaxpr(function)(X))


def test_values_count_while_they_are_live():
    assert peak(lambda x: x) == 0
    assert peak(lambda x: x + 1) == SIZE
    assert peak(lambda x: jnp.sin(jnp.sin(jnp.sin(jnp.sin(x))))) == 2 * SIZE, (
        "input and output of one operation are live together"
    )
    assert peak(lambda x: jnp.sin(x) * jnp.cos(x) * jnp.tan(x)) == 3 * SIZE
    assert peak(lambda x: jnp.concatenate([x] * 5).sum()) == 5 * SIZE + 4


def test_nested_functions_count_at_their_call():
    inner = jax.jit(lambda x: jnp.concatenate([x] * 7).sum())
    assert peak(lambda x: jnp.cos(inner(jnp.sin(x)) + x)) >= SIZE + 7 * SIZE
    assert peak(lambda x: jax.lax.fori_loop(0, 9, lambda _, y: jnp.concatenate([y] * 4)[:10], x)) >= 4 * SIZE
