"""Grouped products on NVIDIA GPUs: tiles of rows of one group, computed on the device, over a grid of static size.

The kernel is `triton_products.grouped`. As many programs are launched as any routing could need; programs without rows
end at once, so the time is proportional to the rows. As the grid is static, the call is part of the step's command
buffer.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxinfer.kernels.matmul import int8_matmul
from jaxinfer.kernels.triton import triton_launch, tuned
from jaxinfer.kernels.triton.triton_launch import Options, Target


@dataclass(frozen=True)
class Tiling:
    """Tile sizes of one product, estimated from shapes; not measured."""

    block_m: int
    """Rows of a group per program."""
    block_n: int
    """Rows of the group's matrix per program."""
    block_k: int
    """Columns of both per loop iteration."""
    options: Options


def tiling(rows: int, groups: int, inner: int, itemsize: int) -> Tiling:
    """Choose the tiles for activations `[rows, inner]` in `groups` groups, whose elements have `itemsize` bytes.

    With few rows per group, reading weights takes the time: row tiles are small and pieces of the matrices long.
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
    """Cut rows into tiles of one group and at most `tile` rows: `[*, 3]` int32 of group, first row, number of rows.

    The number of tiles is the most that `rows` rows may need; unneeded ones come last and have no rows. `offsets` is
    `[E + 1]`.
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
    """Multiply as `grouped.matmul`; rows of no group are not written."""
    from jaxinfer.kernels.matmul import triton_products  # imports triton

    (rows, inner), (groups, columns, _) = x.shape, weight.shape
    itemsize = weight.dtype.itemsize
    mean = 1 << (-(-rows // groups) - 1).bit_length()  # rows of a group, as a power of two
    shape = dict(mean=mean, groups=groups, columns=columns, inner=inner, itemsize=itemsize)
    tiles = tuned.choose("grouped", shape, tiling(rows, groups, inner, itemsize), target)
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
