"""Measure the device's peak bandwidth and matmul rate, the reference of other rows."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from benchmarks.gpu.context import Context, Figures, peak_bandwidth
from benchmarks.gpu.models import values
from benchmarks.gpu.timing import measure

MATMULS = {
    "square": (8192, 8192, 8192),
    "qkv": (4096, 6144, 4096),
    "out": (4096, 4096, 4096),
    "gate_up": (4096, 28672, 4096),
    "down": (4096, 4096, 14336),
}
"""Product sizes (rows, columns, depth): a large one, and those of an 8 B Llama layer over 4096 tokens."""


def run(context: Context) -> Figures:
    """Measure the bandwidth of copying and reading a large array, and the rates of bfloat16 products of random
    matrices.
    """
    elements = context.size(1 << 31, 1 << 16)
    array = jax.jit(lambda: values(jnp.uint32(1), (elements >> 10, 1 << 10), jnp.bfloat16))()
    bytes_ = array.nbytes
    copies = {
        "copy": measure(lambda array=array: _copy(array)).median,
        "add": measure(lambda array=array: _add(array)).median,
    }
    read = measure(lambda array=array: _read(array)).median
    figures = {
        "copied_bytes": bytes_,
        "read_gb_per_second": bytes_ / read / 1e9,
        # The faster of the two ways to copy, as shares of it are stricter.
        "copy_gb_per_second": 2 * bytes_ / min(copies.values()) / 1e9,
        **{f"{name}_kernel_gb_per_second": 2 * bytes_ / seconds / 1e9 for name, seconds in copies.items()},
    }
    peak = peak_bandwidth()
    if peak is not None:
        figures["copy_share_of_peak"] = 1e9 * figures["copy_gb_per_second"] / peak
    context.save(figures)
    del array
    for name, sizes in context.size(MATMULS, {"square": (64, 64, 64)}).items():
        figures[f"matmul_{name}_tflops"] = matmul_rate(sizes) / 1e12
    return figures


_copy, _add, _read = jax.jit(jnp.copy), jax.jit(lambda a: a + 1), jax.jit(lambda a: jnp.sum(a, dtype=jnp.float32))


def matmul_rate(sizes: Sequence[int]) -> float:
    """Return floating-point operations per second of `[rows, depth] x [columns, depth]^T` in bfloat16."""
    rows, columns, depth = sizes

    @jax.jit
    def make() -> tuple[jax.Array, jax.Array]:
        return values(jnp.uint32(2), (rows, depth), jnp.bfloat16), values(jnp.uint32(3), (columns, depth), jnp.bfloat16)

    @jax.jit
    def multiply(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.dot_general(x, y, (((1,), (1,)), ((), ())))

    x, y = make()
    return 2 * rows * columns * depth / measure(lambda: multiply(x, y)).median
