"""Measure the machine's memory bandwidth and matmul rates through JAX, with JAX's threads."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

ROWS = 512
"""Rows M of the product: a large prefill chunk."""
RATES = {"bfloat16": None, "float32": None, "int8": jnp.int32}
"""Dtypes of the product, each with its accumulation dtype (None: the same)."""


def measure(size: int, width: int, repeats: int) -> dict[str, float]:
    """Measure gigabytes and teraoperations per second, the best of `repeats` passes.

    Args:
        size: bytes of the array that is read, and of the one that is updated in place.
        width: K and N of the product `[512, K] x [N, K]`, the weight layout of a prefill.
        repeats: passes of each measurement.
    """
    array = jnp.ones((size // 4096, 1024), jnp.float32)
    read = _best(jax.jit(lambda x: x.sum(axis=1)), (array,), repeats)
    return {
        "read_gigabytes_per_second": size / read / 1e9,
        "copy_gigabytes_per_second": 2 * size / _best_in_place(array, repeats) / 1e9,
        **{
            f"{name}_matmul_teraops_per_second": _matmul_rate(jnp.dtype(name), total, width, repeats) / 1e12
            for name, total in RATES.items()
        },
    }


def _matmul_rate(dtype: jnp.dtype, total: Any, width: int, repeats: int) -> float:
    """Measure multiplications and additions per second."""
    rows, weights = jnp.ones((ROWS, width), dtype), jnp.ones((width, width), dtype)

    @jax.jit
    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=total)

    return 2 * ROWS * width * width / _best(product, (rows, weights), repeats)


def _best(function: Callable[..., jax.Array], arguments: tuple[jax.Array, ...], repeats: int) -> float:
    """Return the seconds of the fastest pass, without compilation."""
    jax.block_until_ready(function(*arguments))
    return min(_seconds(function, arguments)[0] for _ in range(repeats))


def _best_in_place(array: jax.Array, repeats: int) -> float:
    """Return the seconds to update an array in place; a fresh output would measure the system's page faults."""
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    array = jax.block_until_ready(step(array))
    best = float("inf")
    for _ in range(repeats):
        seconds, array = _seconds(step, (array,))
        best = min(best, seconds)
    return best


def _seconds(function: Callable[..., jax.Array], arguments: tuple[jax.Array, ...]) -> tuple[float, jax.Array]:
    started = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return time.perf_counter() - started, result
