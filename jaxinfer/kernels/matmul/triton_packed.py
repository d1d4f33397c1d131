"""Products with weights of 4 bits on NVIDIA GPUs (`triton_products.packed`): experts', and dense ones of few rows.

Reading the weights takes the time of few rows. For more rows XLA dequantises a dense weight once and multiplies it;
for experts the values would be those of all of them, of which a step may need few.
"""

import jax
import jax.numpy as jnp

from jaxinfer.kernels.matmul.triton_grouped import Tiling, cut
from jaxinfer.kernels.triton import triton_launch, tuned
from jaxinfer.kernels.triton.triton_launch import Options, Target

MOST_ROWS = 64
"""Most rows of a dense product for which the kernel is used: for more, values are made again for each tile of rows. Not
measured."""


def tiling(rows: int, group: int, inner: int, itemsize: int) -> Tiling:
    """Choose the tiles for `rows` rows of activations `[*, inner]` whose elements have `itemsize` bytes; not measured.

    An iteration has the columns of one group or of several whole ones, and a whole part of the inner dimension, where a
    power of two of columns, at least 32, allows that.
    """
    if itemsize == 4:  # ordinary multiplications, which hold both operands in registers
        return Tiling(16, 64, 32, Options(4, 2))
    within = group & -group
    most = 128 if group == within else max(32, min(within, 128))
    block_k = next((size for size in (128, 64, 32) if size <= most and inner % size == 0), most)
    if rows <= 32:
        return Tiling(16 if rows <= 16 else 32, 64, block_k, Options(4, 4))
    if rows <= 64:
        return Tiling(64, 64, block_k, Options(4, 3))
    return Tiling(128, 128, min(block_k, 64), Options(8, 3))


def matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
    dtype: jnp.dtype,
    target: Target,
    offsets: jax.Array | None = None,
) -> jax.Array:
    """Multiply `[T, K]` with a weight `[N, K]` as `packed_matmul.matmul` or, by group, `[E, N, K]` (`grouped.packed`).

    `offsets`: `[E + 1]`, first row of each group.
    """
    from jaxinfer.kernels.matmul import triton_products  # imports triton

    (rows, inner), (*stack, columns, _) = x.shape, codes.shape
    group, itemsize = inner // scales.shape[-1], x.dtype.itemsize
    shape = dict(rows=rows, columns=columns, inner=inner, group=group, itemsize=itemsize, asymmetric=zeros is not None)
    if offsets is not None:  # rows of an expert, as a power of two
        mean = 1 << (-(-rows // stack[0]) - 1).bit_length()
        shape |= dict(rows=mean, experts=stack[0], floats=scales.dtype == jnp.uint8)
    tiles = tuned.choose("packed", shape, tiling(shape["rows"], group, inner, itemsize), target)
    work = None if offsets is None else cut(offsets, rows, tiles.block_m)
    halves = jnp.moveaxis(x.reshape(rows, inner // 2, 2), 2, 0)
    found = triton_launch.launch(
        triton_products.packed,
        dict(tiles=work, x=halves, codes=codes, scales=scales, zeros=zeros),
        dict(y=jax.ShapeDtypeStruct((rows, columns), dtype)),
        aliases={},
        constants=dict(
            ROWS=rows,
            K=inner,
            N=columns,
            GROUP=group,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            BLOCK_K=tiles.block_k,
            PRECISION="ieee" if x.dtype.itemsize == 4 else "tf32",
        ),
        grid=(-(-columns // tiles.block_n), -(-rows // tiles.block_m) if work is None else work.shape[0]),
        target=target,
        options=tiles.options,
    )
    return found["y"]
