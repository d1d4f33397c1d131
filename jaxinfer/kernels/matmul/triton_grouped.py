"""Grouped products on NVIDIA GPUs: tiles of rows of one group, cut on the device, over a grid whose size is static.

The kernel is `triton_products.grouped`. As many programs are launched as any routing of the rows could need; those
without rows end at once, so that reading weights and multiplying is proportional to the rows, and the call lies in the
command buffer of its step, whatever the router says.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxinfer.kernels.matmul import int8_matmul
from jaxinfer.kernels.triton import triton_launch
from jaxinfer.kernels.triton.triton_launch import Options, Target


@dataclass(frozen=True)
class Tiling:
    """The tiles of one product, chosen from shapes by arithmetic; not measured."""

    block_m: int
    """Rows of a group in one program."""
    block_n: int
    """Rows of its matrix."""
    block_k: int
    """Columns of both that a turn of the loop reads."""
    options: Options


def tiling(rows: int, groups: int, inner: int, itemsize: int) -> Tiling:
    """For `[rows, inner]` in so many groups, of elements of so many bytes.

    A few rows a group are bound by reading weights: small tiles of rows, and long pieces of the matrices' rows.
    """
    mean = -(-rows // groups)
    least = 1 << max(0, inner - 1).bit_length()
    if itemsize == 4:  # ordinary multiplications, which hold both operands in registers
        return Tiling(16, 64, min(32, max(16, least)), Options(4, 2))
    wide = 128 * 2 // itemsize
    if mean <= 16:
        return Tiling(16, 64, min(wide, max(32, least)), Options(4, 4))
    if mean <= 64:
        return Tiling(64, 128, min(wide // 2, max(32, least)), Options(4, 3))
    return Tiling(128, 128, min(wide // 2, max(32, least)), Options(8, 3))


def cut(offsets: jax.Array, rows: int, tile: int) -> jax.Array:
    """`[*, 3]` int32 (group, first row, rows) of tiles of at most `tile` rows, as many as `rows` rows may need.

    `offsets` `[E + 1]`. Tiles that are not needed come last and have no rows.
    """
    groups = offsets.shape[0] - 1
    needed = -(-jnp.diff(offsets) // tile)
    ends = jnp.cumsum(needed)
    number = jnp.arange(rows // tile + min(groups, rows), dtype=jnp.int32)
    group = jnp.sum(ends <= number[:, None], axis=1, dtype=jnp.int32)
    group = jnp.minimum(group, groups - 1)
    first = offsets[group] + (number - ends[group] + needed[group]) * tile
    return jnp.stack([group, first, jnp.clip(offsets[group + 1] - first, 0, tile)], axis=1).astype(jnp.int32)


def matmul(
    x: jax.Array, weight: jax.Array, offsets: jax.Array, scales: jax.Array | None, target: Target, block: int = 1
) -> jax.Array:
    """As `grouped.matmul`; what is not computed is not written either."""
    from jaxinfer.kernels.matmul import triton_products  # imports triton

    (rows, inner), (groups, columns, _) = x.shape, weight.shape
    tiles = tiling(rows, groups, inner, weight.dtype.itemsize)
    values, own = (x, None) if scales is None else int8_matmul.quantise(int8_matmul.rotate(x, block))
    work = cut(offsets, rows, tiles.block_m)
    found = triton_launch.launch(
        triton_products.grouped,
        dict(tiles=work, x=values, weight=weight, x_scales=own, scales=scales),
        dict(y=jax.ShapeDtypeStruct((rows, columns), x.dtype)),
        aliases={},
        constants=dict(
            K=inner,
            N=columns,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            BLOCK_K=tiles.block_k,
            PRECISION="ieee" if weight.dtype.itemsize == 4 else "tf32",
        ),
        grid=(-(-columns // tiles.block_n), work.shape[0]),
        target=target,
        options=tiles.options,
    )
    return found["y"]
