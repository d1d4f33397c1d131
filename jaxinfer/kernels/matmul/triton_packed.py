"""Products with weights of 4 bits on NVIDIA GPUs (`triton_products.packed`), for the few rows of decode.

Reading the weights takes the time there. For more rows XLA dequantises the weight once and multiplies it.
"""

import jax
import jax.numpy as jnp

from jaxinfer.kernels.matmul.triton_grouped import Tiling
from jaxinfer.kernels.triton import triton_launch, tuned
from jaxinfer.kernels.triton.triton_launch import Options, Target

MOST_ROWS = 64
"""Most rows for which the kernel is used: for more, values are made again for each tile of rows. Not measured."""


def tiling(rows: int, group: int, itemsize: int) -> Tiling:
    """Choose the tiles for `rows` rows of activations whose elements have `itemsize` bytes; not measured.

    An iteration has the columns of one group where a power of two of them, at least 32, divides it.
    """
    within = group & -group
    block_k = min(within, 128 if itemsize == 2 else 32) if within >= 32 else 32
    block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    return Tiling(block_m, 64, block_k, Options(4, 4 if itemsize == 2 else 2))


def matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
    dtype: jnp.dtype,
    target: Target,
) -> jax.Array:
    """Multiply `[T, K]` with a weight `[N, K]` as `packed_matmul.matmul`."""
    from jaxinfer.kernels.matmul import triton_products  # imports triton

    (rows, inner), columns = x.shape, codes.shape[0]
    group = inner // scales.shape[1]
    itemsize = x.dtype.itemsize
    shape = dict(rows=rows, columns=columns, inner=inner, group=group, itemsize=itemsize, asymmetric=zeros is not None)
    tiles = tuned.choose("packed", shape, tiling(rows, group, itemsize), target)
    halves = jnp.moveaxis(x.reshape(rows, inner // 2, 2), 2, 0)
    found = triton_launch.launch(
        triton_products.packed,
        dict(x=halves, codes=codes, scales=scales, zeros=zeros),
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
        grid=(-(-columns // tiles.block_n), -(-rows // tiles.block_m)),
        target=target,
        options=tiles.options,
    )
    return found["y"]
