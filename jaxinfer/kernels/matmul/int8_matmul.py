"""Matmul in int8: weights quantised at load time, activations at run time; both are rotated first.

`x W^T` with one scale a row of W (an output channel) and one a row of x (a token) is an int8 x int8 -> int32 GEMM
followed by two multiplications: `y[t, o] = (q_x[t] . q_w[o]) s_x[t] s_w[o]` (arXiv:2206.01861, token-wise and
group-wise quantisation; arXiv:2211.10438). int32 holds the sum exactly up to 133,000 columns. Weights stay
`[out, in]`, contracted on the last axis of both sides, which was the fastest form on a CPU.

A few channels of activations are many times larger than the rest, which one scale per row would round to a few steps.
So both operands are first multiplied by a Hadamard matrix H in blocks of b columns (QuaRot, arXiv:2404.00456):
`x W^T = (x H) (W H / b)^T`. This spreads an outlier evenly over its block. `x H` is computed in each matmul; `W H / b`
is quantised and kept. A row of the result depends on its own row of x only.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import hadamard

from jaxinfer.kernels.matmul.choose import NATIVES, STABLE, XLA

Array = TypeVar("Array", jax.Array, np.ndarray)

UNIT = np.float32(1 / 127)
"""Scale of a row, per unit of its largest magnitude. A factor, since XLA turns a division by a constant into a
multiplication and NumPy does not."""
MOST_ROTATED = 128
"""Columns of the largest block. Larger ones reduce the error little and make `x H` more expensive."""
DIVISIONS = 8
"""Blocks of sharded columns are small enough for this many devices, so that 1 to 8 devices use the same weights."""
HOST_VALUES = 1 << 18
"""Values of a weight that the host rotates at a time."""
SMALLEST = float(np.finfo(np.float32).tiny)
"""Rows with smaller scales become zeros: these scales are subnormal, and some devices flush them to zero."""


def rotation(columns: int, tp: int | None = None) -> int:
    """Return the number of columns per block, a power of two; 1 means no rotation.

    Args:
        columns: columns of the whole weight, a multiple of the block.
        tp: number of shards the columns are divided over, each of which holds whole blocks; None if not sharded.
    """
    shards = 1 if tp is None else max(DIVISIONS, tp & -tp)
    return min(MOST_ROTATED, max(1, (columns & -columns) // shards))


def rotate(rows: Array, block: int) -> Array:
    """Multiply rows by Sylvester's Hadamard matrix, which is symmetric and `block` times its own inverse.

    Args:
        rows: `[..., in]`.
        block: columns per block, a power of two that divides `in`.

    Returns:
        `[..., in]` float32.
    """
    if block == 1:
        return rows.astype(np.float32)
    if isinstance(rows, np.ndarray):
        return _rotate_on_host(rows, block)
    matrix = jnp.asarray(hadamard(block), rows.dtype)
    precision = jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None  # bfloat16 times 1 or -1 is exact
    blocks = rows.reshape(*rows.shape[:-1], -1, block)
    made = jnp.einsum("...b,bc->...c", blocks, matrix, precision=precision, preferred_element_type=jnp.float32)
    return made.reshape(rows.shape)


def _rotate_on_host(rows: np.ndarray, block: int, factor: float = 1.0) -> np.ndarray:
    """Rotate in float64, so that the result does not depend on how many rows are read at a time; a piece at a time, so
    that only float32 values of the whole array are in memory.
    """
    made = np.empty(rows.shape, np.float32)
    blocks, result, matrix = rows.reshape(-1, block), made.reshape(-1, block), hadamard(block) * np.float64(factor)
    count = max(1, HOST_VALUES // block)
    with np.errstate(invalid="ignore"):
        for first in range(0, len(blocks), count):
            piece = slice(first, first + count)
            result[piece] = blocks[piece].astype(np.float64) @ matrix
    return made


def rotate_weight(rows: Array, block: int) -> Array:
    """Rotate rows `[..., in]` of a weight that is multiplied with rotated activations."""
    if isinstance(rows, np.ndarray):
        return _rotate_on_host(rows, block, 1 / block)
    return rotate(rows, block) * np.float32(1 / block)


def row_scales(rows: Array) -> Array:
    """Return the scale of each row, its largest magnitude / 127: `[..., in]` -> `[...]` float32.

    The scale of a row with a value that is not finite is NaN.
    """
    xp = rows.__array_namespace__()
    largest = xp.max(xp.abs(rows), axis=-1).astype(np.float32)
    return xp.where(xp.isfinite(largest), largest * UNIT, np.float32(np.nan))


def to_int8(rows: Array, scales: Array) -> Array:
    """Round `[..., in]` to the nearest multiple of each row's scale `[...]`, as int8.

    Rows whose scale is NaN are undefined.
    """
    xp = rows.__array_namespace__()
    usable = scales >= SMALLEST
    inverse = xp.where(usable, 1 / xp.where(usable, scales, np.float32(1)), np.float32(0))
    return xp.rint(rows.astype(np.float32, copy=False) * inverse[..., None]).astype(np.int8)


def quantise_weight(rows: Array, block: int) -> tuple[Array, Array]:
    """Quantise rows `[..., in]` of a weight for `matmul` with blocks of this size."""
    return quantise(rotate_weight(rows, block))


def quantise(rows: Array) -> tuple[Array, Array]:
    """Quantise rows `[..., in]`; return int8 values `[..., in]` and scales `[...]`, whose product approximates them."""
    scales = row_scales(rows)
    return to_int8(rows, scales), scales


def matmul(
    x: jax.Array,
    weight: jax.Array,
    scales: jax.Array,
    dtype: jax.typing.DTypeLike | None = None,
    *,
    kernel: str = XLA,
    part: tuple[int, int] | None = None,
    block: int = 1,
) -> jax.Array:
    """Compute `x W^T` in `dtype`, by default that of `x`.

    A row of `x` with a NaN or infinity gives a row of NaN and changes no other row.

    Args:
        x: `[T, in]`, or `[T, tp, in / tp]` if the columns are divided over devices: then each device quantises its
            own columns, so that the devices exchange nothing but the sum at the end.
        weight: `[out, in]` int8, made by `quantise_weight`.
        scales: scales of the weight's rows, `[out]`.
        kernel: "xla" or, where nothing is divided, "native" or "stable" (`kernels.matmul.choose`).
        part: first and end of the weight's rows to multiply with; None for all.
        block: columns per rotated block (`rotation`), which divides `in / tp`.

    Returns:
        `[T, out]`.
    """
    rows = x.shape[0]
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    first, end = part or (0, weight.shape[0])
    if kernel in NATIVES and _native(x, dtype):
        result = jax.ShapeDtypeStruct((rows, end - first), dtype)
        return jax.ffi.ffi_call("jaxinfer_int8_matmul", result)(
            x.reshape(rows, -1),
            weight,
            scales,
            first=np.int64(first),
            block=np.int64(block),
            stable=kernel == STABLE,
        )
    weight, scales = weight[first:end], scales[first:end]
    x = rotate(x, block)
    if rows == 1:
        # XLA's int8 product of a single row is not a GEMM on a CPU: 30 ms against 1.5 for a head of 32000 x 1024.
        x = jnp.pad(x, ((0, 1), *[(0, 0)] * (x.ndim - 1)))
    if x.ndim == 2 or x.shape[1] == 1:
        return _product(x.reshape(x.shape[0], -1), weight, scales, dtype)[:rows]
    shards = weight.reshape(weight.shape[0], *x.shape[1:])
    partial = jax.vmap(lambda own, columns: _product(own, columns, scales, dtype), in_axes=1)(x, shards)
    # Not jnp.sum, which adds bfloat16 in float32: the all-reduce would move twice the bytes.
    return jax.lax.reduce_sum(partial, axes=(0,))[:rows]


def _native(x: jax.Array, dtype: jnp.dtype) -> bool:
    return x.shape[-1] % 4 == 0 and x.dtype in (jnp.bfloat16, jnp.float32) and dtype in (x.dtype, jnp.float32)


def _product(x: jax.Array, weight: jax.Array, scales: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    quantised, own = quantise(x)
    y = jax.lax.dot_general(quantised, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return (y.astype(jnp.float32) * own[:, None] * scales).astype(dtype)


def reference(x: np.ndarray, weight: np.ndarray, scales: np.ndarray, block: int = 1) -> np.ndarray:
    """Compute `matmul` for `[T, in]` on the host, with sums in float64, as a reference."""
    units, own = quantise(rotate(x, block))
    return (units[:, None, :] * weight.astype(np.float64)).sum(-1) * own[:, None] * scales
