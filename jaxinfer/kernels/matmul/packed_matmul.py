"""Products with weights in codes: of 4 bits, as GPTQ, AWQ, compressed-tensors and MXFP4 have them, or in FP8.

A weight is `(code - zero) * scale`, with a scale and a zero point for each group of columns of a row (arXiv:2210.17323,
arXiv:2306.00978). Where the scales are uint8, they are the exponents of MXFP4 (OCP Microscaling Formats), and codes are
floats of 4 bits (e2m1): a weight is `value(code) * 2^(scale - 127)`, and NaN for the exponent 255. Activations are not
quantised: the result is that of the dequantised weight, but for rounding. On a CPU a native product turns codes into
values in registers (`native/packed_matmul.cc`), on an NVIDIA GPU a Triton kernel does for few rows (`triton_packed`).
Elsewhere the weight of one product is dequantised within the step that multiplies it. `grouped.packed` has the products
of experts, `fp8_matmul` those with codes in FP8, which have no zero points.
"""

from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.kernels.matmul import choose, fp8_matmul, triton_packed
from jaxinfer.kernels.matmul.choose import NATIVES, STABLE, TRITON, XLA
from jaxinfer.kernels.triton.triton_launch import Target

Array = TypeVar("Array", jax.Array, np.ndarray)

CODES = 2
"""Codes of 4 bits in a byte."""
MIDDLE = 8
"""Zero point of weights without zero points of their own."""
LEAST_GROUP = 8
"""Fewest columns with a scale of their own; a group has a multiple of it. The native product adds eight columns in each
lane before it scales them, and a scale of 16 bits for fewer would take half as much as the codes."""
BLOCK = 128
"""Columns of a register of codes; the native product reorders columns within as many."""
EXPONENT = "uint8"
"""Dtype of the scales of MXFP4, whose codes are floats."""
DOUBLED = 0xC8643210
"""Twice the magnitude of each of the eight floats, four bits each from the lowest on: 0, 1, 2, 3, 4, 6, 8 and 12."""
DIRECT_ROWS = {"bfloat16": 8, "float32": 4}
"""Most rows that the native product multiplies with codes; for more it unpacks some of the weight's rows at a time."""


@dataclass(frozen=True)
class Packing:
    """How a weight is packed."""

    group: int
    """Columns that share a scale and a zero point."""
    symmetric: bool
    """Whether all zero points are `MIDDLE` and not stored."""
    scale_dtype: str
    """Dtype of the scales: that of the checkpoint, which `float16` and `bfloat16` represent; `EXPONENT` for MXFP4."""
    fp8: bool = False
    """Whether codes are FP8 (e4m3) and not integers of 4 bits."""
    activations: bool = False
    """Whether activations are quantised to FP8, too; a row has one scale, which all of its groups have."""

    @property
    def codes(self) -> int:
        """Codes in a byte."""
        return 1 if self.fp8 else CODES

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 8 // self.codes


class Packed(NamedTuple):
    """A packed weight `[N, K]`, or a stack `[E, N, K]`."""

    codes: jax.Array
    """`[..., K / 2]` uint8: columns 2i (low half) and 2i + 1. Or `[..., K]` float8_e4m3fn."""
    scales: jax.Array
    """`[..., K / group]`."""
    zeros: jax.Array | None = None
    """`[..., K / group]` uint8; None if all are `MIDDLE`, and for floats."""

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.codes.shape[-1] * (1 if self.fp8 else CODES) // self.scales.shape[-1]

    @property
    def fp8(self) -> bool:
        """Whether codes are FP8."""
        return self.codes.dtype == fp8_matmul.CODE

    @property
    def floats(self) -> bool:
        """Whether codes are floats and scales exponents (MXFP4)."""
        return self.scales.dtype == jnp.uint8

    @property
    def operands(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The arrays, with an empty one in place of zero points that are not stored, for the native product."""
        return self.codes, self.scales, jnp.zeros(0, jnp.uint8) if self.zeros is None else self.zeros


def pack(codes: Array) -> Array:
    """Pack codes `[..., K]`, integers of 0 to 15, into bytes `[..., K / 2]`."""
    codes = codes.astype(np.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4


def quantise(rows: jax.Array, packing: Packing) -> Packed:
    """Round rows `[..., K]` to the nearest codes, between the least and greatest value of each group.

    For FP8, and for random weights and tests: tools that make checkpoints of 4 bits choose codes with more care.
    """
    if packing.fp8:
        return _quantise_to_fp8(rows, packing)
    groups = rows.astype(jnp.float32).reshape(*rows.shape[:-1], -1, packing.group)
    if packing.scale_dtype == EXPONENT:
        return _quantise_to_floats(groups, rows.shape)
    low, high = jnp.minimum(groups.min(-1), 0), jnp.maximum(groups.max(-1), 0)
    if packing.symmetric:
        largest = jnp.maximum(high / (MIDDLE - 1), -low / MIDDLE)
    scales = (largest if packing.symmetric else (high - low) / 15).astype(packing.scale_dtype)
    usable = jnp.where(scales > 0, scales.astype(jnp.float32), 1)
    zeros = jnp.full(scales.shape, MIDDLE, jnp.uint8)
    if not packing.symmetric:
        zeros = jnp.clip(jnp.rint(-low / usable), 0, 15).astype(jnp.uint8)
    codes = jnp.clip(jnp.rint(groups / usable[..., None]) + zeros[..., None], 0, 15)
    return Packed(pack(codes.reshape(rows.shape)), scales, None if packing.symmetric else zeros)


def _quantise_to_floats(groups: jax.Array, shape: tuple[int, ...]) -> Packed:
    """Round groups `[..., K / group, group]` of rows of this shape to floats whose largest is at most 8 (MXFP4)."""
    largest = jnp.max(jnp.abs(groups), axis=-1)
    exponents = jnp.clip(jnp.floor(jnp.log2(jnp.where(largest > 0, largest, 1))) - 2 + 127, 1, 254).astype(jnp.uint8)
    sizes = jnp.abs(groups) / exponents_to_scales(exponents)[..., None]
    bounds = jnp.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])  # between the magnitudes
    codes = jnp.sum(sizes[..., None] > bounds, axis=-1).astype(jnp.uint8) | (groups < 0).astype(jnp.uint8) << 3
    return Packed(pack(codes.reshape(shape)), exponents)


def exponents_to_scales(exponents: jax.Array) -> jax.Array:
    """Return the scales of MXFP4's exponents, float32: their bits are those of the exponent; 255 is NaN."""
    bits = exponents.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(bits << 23 | (bits == 255).astype(jnp.uint32) << 22, jnp.float32)


def _quantise_to_fp8(rows: jax.Array, packing: Packing) -> Packed:
    count = rows.shape[-1] // packing.group
    if packing.activations:
        codes, scales = fp8_matmul.quantise(rows)
        scales = jnp.repeat(scales[..., None], count, axis=-1)
    else:
        codes, scales = fp8_matmul.quantise(rows.reshape(*rows.shape[:-1], count, packing.group))
    return Packed(codes.reshape(rows.shape), scales.astype(packing.scale_dtype))


def dequantise(packed: Packed, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Return the weight `[..., K]`, computed in float32 and rounded to `dtype`."""
    if packed.fp8:
        return fp8_matmul.dequantise(packed.codes, packed.scales, dtype)
    codes, scales, zeros = packed
    whole = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(*scales.shape, packed.group)
    if packed.floats:
        sizes = jnp.uint32(DOUBLED) >> (4 * (whole & 7)).astype(jnp.uint32) & 15
        values = jnp.where(whole & 8, -0.5, 0.5) * sizes.astype(jnp.float32)
        scales = exponents_to_scales(scales)
    else:
        values = whole.astype(jnp.float32) - (MIDDLE if zeros is None else zeros.astype(jnp.float32)[..., None])
    values = values * scales.astype(jnp.float32)[..., None]
    return values.reshape(*codes.shape[:-1], -1).astype(dtype)


def matmul(
    x: jax.Array,
    packed: Packed,
    dtype: jax.typing.DTypeLike | None = None,
    *,
    kernel: str = XLA,
    part: tuple[int, int] | None = None,
    target: Target | None = None,
    activations: bool = False,
) -> jax.Array:
    """Compute `[T, K] x [N, K]^T -> [T, N]` in `dtype`, by default that of `x`, with float32 sums.

    Args:
        x: `[T, K]`, or `[T, tp, K / tp]` if the columns are divided over devices.
        packed: the weight.
        dtype: of the result.
        kernel: "xla" or, where nothing is divided, "native", "stable" or "triton" (`kernels.matmul.choose`).
        part: first and end of the weight's rows to multiply with; None for all.
        target: kind of device, for "triton".
        activations: whether activations are quantised (`fp8_matmul.matmul`).
    """
    if packed.fp8:
        how = dict(kernel=kernel, part=part, target=target, activations=activations)
        return fp8_matmul.matmul(x, packed.codes, packed.scales, dtype, **how)
    x = x.reshape(x.shape[0], -1)
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    first, end = part or (0, packed.codes.shape[0])
    if kernel in NATIVES and is_native(x, packed, dtype):
        operands, group = packed.operands, np.int64(packed.group)
        if kernel == STABLE or not choose.prefers_matrix_units(x):
            result = jax.ShapeDtypeStruct((x.shape[0], end - first), dtype)
            return jax.ffi.ffi_call("jaxinfer_packed_matmul", result)(
                x, *operands, first=np.int64(first), group=group, stable=kernel == STABLE
            )
        blocks = -(-x.shape[1] // BLOCK)
        whole = jax.ShapeDtypeStruct((end - first, blocks * BLOCK), x.dtype)
        weight = jax.ffi.ffi_call("jaxinfer_unpack", whole)(*operands, first=np.int64(first), group=group)
        return choose.matmul(_ordered(x, blocks), weight, dtype)
    own = Packed(*(None if one is None else one[first:end] for one in packed))
    if kernel == TRITON and target is not None and x.shape[0] <= triton_packed.MOST_ROWS:
        return triton_packed.matmul(x, *own, dtype, target)
    return choose.matmul(x, dequantise(own, x.dtype), dtype)


def _ordered(x: jax.Array, blocks: int) -> jax.Array:
    """Return the columns of x `[T, K]` bfloat16 in the order of unpacked weights, zeros at the end: `[T, K']`."""
    x = jnp.pad(x, ((0, 0), (0, blocks * BLOCK - x.shape[1])))
    return x.reshape(len(x), blocks, BLOCK // 4, 4).swapaxes(2, 3).reshape(len(x), -1)


def is_native(x: jax.Array, packed: Packed, dtype: jnp.dtype) -> bool:
    """Return whether the native product takes these operands."""
    kinds = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.uint8)
    fits = packed.group % LEAST_GROUP == 0 and packed.scales.dtype in kinds
    return fits and x.dtype in (jnp.bfloat16, jnp.float32) and dtype in (x.dtype, jnp.float32)
