"""Products with weights in FP8 (e4m3): codes of 8 bits, with a scale for a row or for each group of its columns.

Without quantised activations the result is that of the dequantised weight, but for rounding: activations' dtypes hold
codes exactly, so that a scale of a whole row multiplies sums, and no weight is rounded. With quantised activations,
which have a scale a row (a token), both operands are e4m3 (arXiv:2209.05433): `y[t, o] = (q_x[t] . q_w[o]) s_x[t]
s_w[o]`, which GPUs since Hopper multiply twice as fast as bfloat16. Other devices convert both to bfloat16, whose
products are the same. On a CPU the native product of packed weights converts codes in registers
(`native/packed_matmul.cc`).
"""

from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.kernels.matmul import choose, triton_fp8
from jaxinfer.kernels.matmul.choose import NATIVES, STABLE, TRITON, XLA
from jaxinfer.kernels.triton.triton_launch import Target

Array = TypeVar("Array", jax.Array, np.ndarray)

CODE = np.dtype(jnp.float8_e4m3fn)
"""Dtype of codes: 4 bits of exponent, 3 of mantissa, no infinity."""
FLOAT32 = np.dtype(np.float32)
UNIT = np.float32(1 / 448)
"""Scale of a row, per unit of its largest magnitude: the largest code is 448."""
LEAST = np.float32(1e-30)
"""Smallest scale, so that zeros are not divided by zero."""


def row_scales(rows: Array) -> Array:
    """Return the scale of each row, `[..., in]` -> `[...]` float32; NaN for a row with a value that is not finite."""
    xp = rows.__array_namespace__()
    largest = xp.max(xp.abs(rows), axis=-1).astype(np.float32)
    return xp.where(xp.isfinite(largest), xp.maximum(largest * UNIT, LEAST), np.float32(np.nan))


def to_codes(rows: Array, scales: Array) -> Array:
    """Round rows `[..., in]` over their scales `[...]` to codes."""
    return (rows.astype(np.float32) / scales[..., None]).astype(CODE)


def quantise(rows: Array) -> tuple[Array, Array]:
    """Quantise rows `[..., in]`; return codes `[..., in]` and scales `[...]`, whose product approximates them."""
    scales = row_scales(rows)
    return to_codes(rows, scales), scales


def dequantise(codes: jax.Array, scales: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Return the weight `[..., K]` of codes `[..., K]` and scales `[..., groups]`, rounded to `dtype`."""
    groups = codes.astype(jnp.float32).reshape(*scales.shape, -1)
    return (groups * scales.astype(jnp.float32)[..., None]).reshape(codes.shape).astype(dtype)


def matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    dtype: jax.typing.DTypeLike | None = None,
    *,
    kernel: str = XLA,
    part: tuple[int, int] | None = None,
    target: Target | None = None,
    activations: bool = False,
) -> jax.Array:
    """Compute `x W^T -> [T, N]` in `dtype`, by default that of `x`, with float32 sums.

    Args:
        x: `[T, K]`, or `[T, tp, K / tp]` if the columns are divided over devices: then each device quantises its own
            columns.
        codes: `[N, K]`.
        scales: `[N, groups]` of codes; with quantised activations those of a row's groups are equal, or zero where
            its codes are.
        dtype: of the result.
        kernel: "xla" or, where nothing is divided, "native", "stable" or "triton" (`kernels.matmul.choose`).
        part: first and end of the weight's rows to multiply with; None for all.
        target: kind of device, for "triton".
        activations: whether activations are quantised. A row with a NaN or infinity gives a row of NaN.
    """
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    part = part or (0, codes.shape[0])
    if activations:
        return _both(x, codes, scales[slice(*part)], dtype, kernel, part, target)
    x = x.reshape(x.shape[0], -1)
    if kernel == TRITON and target is not None and triton_fp8.suits(x, scales.shape[1], target):
        return triton_fp8.matmul(x, None, codes[slice(*part)], scales[slice(*part)], dtype, target)
    if scales.shape[1] == 1:
        return (_sums(x, codes, kernel, part) * scales[slice(*part), 0].astype(jnp.float32)).astype(dtype)
    if kernel in NATIVES and _native(x, kernel, dtype):
        return _native_product(x, codes, scales, dtype, kernel, part)
    weight = dequantise(codes[slice(*part)], scales[slice(*part)], x.dtype)
    return choose.matmul(x, weight, dtype, kernel=kernel)


def _both(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    dtype: jnp.dtype,
    kernel: str,
    part: tuple[int, int],
    target: Target | None,
) -> jax.Array:
    """Compute `matmul` with quantised activations."""
    shards = x.shape[1] if x.ndim == 3 else 1
    # Scales of padding columns are zero.
    rows = scales.astype(jnp.float32).reshape(len(scales), shards, -1).max(-1)
    if shards == 1 and kernel == TRITON and target is not None and target.capability >= triton_fp8.LEAST_CAPABILITY:
        made, own = triton_fp8.quantise(x.reshape(x.shape[0], -1), target)
        return triton_fp8.matmul(made, own, codes[slice(*part)], rows, dtype, target)
    made, own = quantise(x.reshape(x.shape[0], shards, -1))
    # XLA would leave out a conversion to e4m3 and back.
    made = jax.lax.optimization_barrier(made)
    if shards == 1:
        return (_code_sums(made[:, 0], codes, kernel, part) * own * rows[:, 0]).astype(dtype)
    divided = codes[slice(*part)].reshape(len(rows), shards, -1)
    sums = jax.vmap(partial(_code_sums, kernel=kernel, part=(0, len(rows))), in_axes=1)(made, divided)
    scaled = (sums * own.T[..., None] * rows.T[:, None]).astype(dtype)
    # Not jnp.sum, which adds bfloat16 in float32: the all-reduce would move twice the bytes.
    return jax.lax.reduce_sum(scaled, axes=(0,))


def _code_sums(x: jax.Array, codes: jax.Array, kernel: str, part: tuple[int, int]) -> jax.Array:
    """Multiply codes `[T, K]` with a part of codes `[N, K]` in float32."""

    def in_bfloat16(x: jax.Array, codes: jax.Array) -> jax.Array:
        return _sums(x.astype(jnp.bfloat16), codes, kernel, part)

    def in_fp8(x: jax.Array, codes: jax.Array) -> jax.Array:
        # With another precision cuBLASLt may add up in fewer bits ("fast accumulation").
        options = dict(precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
        return jax.lax.dot_general(x, codes[slice(*part)], (((1,), (1,)), ((), ())), **options)

    return jax.lax.platform_dependent(x, codes, cpu=in_bfloat16, default=in_fp8)


def _sums(x: jax.Array, codes: jax.Array, kernel: str, part: tuple[int, int]) -> jax.Array:
    """Multiply rows `[T, K]` with a part of codes `[N, K]` in float32; the dtype of the rows holds codes exactly."""
    if kernel in NATIVES and _native(x, kernel, FLOAT32):
        return _native_product(x, codes, jnp.ones((len(codes), 1), FLOAT32), FLOAT32, kernel, part)
    return choose.matmul(x, codes[slice(*part)].astype(x.dtype), jnp.float32, kernel=kernel)


def _native(x: jax.Array, kernel: str, dtype: jnp.dtype) -> bool:
    fits = x.dtype in (jnp.bfloat16, jnp.float32) and dtype in (x.dtype, jnp.float32)
    return fits and (kernel == STABLE or not choose.prefers_matrix_units(x))


def _native_product(
    x: jax.Array, codes: jax.Array, scales: jax.Array, dtype: jnp.dtype, kernel: str, part: tuple[int, int]
) -> jax.Array:
    """Multiply with a part of a weight by the native kernel (`native/packed_matmul.cc`)."""
    result = jax.ShapeDtypeStruct((x.shape[0], part[1] - part[0]), dtype)
    group = np.int64(x.shape[1] // scales.shape[1])
    return jax.ffi.ffi_call("jaxinfer_packed_matmul", result)(
        x, codes, scales, jnp.zeros(0, jnp.uint8), first=np.int64(part[0]), group=group, stable=kernel == STABLE
    )
