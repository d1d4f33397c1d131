"""Products with weights in FP8 on NVIDIA GPUs (`triton_products.fp8`), and codes of activations.

With quantised activations both operands go to the tensor cores as e4m3, for any number of rows. Otherwise codes are
converted in registers, for the few rows of decode, where reading the weights takes the time; for more rows XLA
multiplies with the converted weight.
"""

import jax
import jax.numpy as jnp

from jaxinfer.kernels.matmul.triton_grouped import Tiling
from jaxinfer.kernels.triton import triton_launch
from jaxinfer.kernels.triton.triton_launch import Options, Target

MOST_ROWS = 64
"""Most rows for which codes are converted in registers: for more, they are again for each tile of rows. Not
measured."""
LEAST_CAPABILITY = 89
"""Ada: the first architecture that converts e4m3."""
CONVERTED = 1024
"""Columns of a row that are quantised at a time."""
LEAST_COLUMNS = 32
"""Fewest columns of a group: those of one iteration."""


def suits(x: jax.Array, groups: int, target: Target) -> bool:
    """Return whether the kernel multiplies unquantised rows `[T, K]` with weights of this many groups."""
    group = x.shape[1] // groups
    return (
        target.capability >= LEAST_CAPABILITY
        and x.shape[0] <= MOST_ROWS
        and (groups == 1 or group % LEAST_COLUMNS == 0)
    )


def tiling(rows: int, group: int | None, itemsize: int) -> Tiling:
    """Choose the tiles for `rows` rows of activations of `itemsize` bytes; not measured.

    An iteration has columns of one group, None for one group a row. FP8 tensor cores need 64 rows at least.
    """
    if itemsize == 1:
        return Tiling(64, 64, 128, Options(4, 4)) if rows <= 64 else Tiling(128, 128, 128, Options(8, 3))
    most = 128 if itemsize == 2 else 32
    block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    return Tiling(
        block_m, 64, most if group is None else min(group & -group, most), Options(4, 4 if itemsize == 2 else 2)
    )


def matmul(
    x: jax.Array,
    x_scales: jax.Array | None,
    codes: jax.Array,
    scales: jax.Array,
    dtype: jnp.dtype,
    target: Target,
) -> jax.Array:
    """Multiply rows `[T, K]`, or codes and their scales `[T]`, with a weight `[N, K]` as `fp8_matmul.matmul`."""
    from jaxinfer.kernels.matmul import triton_products  # imports triton

    (rows, inner), columns = x.shape, codes.shape[0]
    group = inner // scales.shape[1]
    tiles = tiling(rows, None if group == inner else group, x.dtype.itemsize)
    found = triton_launch.launch(
        triton_products.fp8,
        dict(x=_bits(x), codes=_bits(codes), x_scales=x_scales, scales=scales),
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


def quantise(x: jax.Array, target: Target) -> tuple[jax.Array, jax.Array]:
    """Quantise rows `[T, K]` as `fp8_matmul.quantise`, in one kernel, where XLA has three."""
    from jaxinfer.kernels.matmul import triton_products  # imports triton

    rows, inner = x.shape
    found = triton_launch.launch(
        triton_products.rows_to_fp8,
        dict(x=x),
        dict(codes=jax.ShapeDtypeStruct(x.shape, jnp.uint8), scales=jax.ShapeDtypeStruct((rows,), jnp.float32)),
        aliases={},
        constants=dict(K=inner, BLOCK=CONVERTED),
        grid=(rows, 1),
        target=target,
        options=Options(4, 2),
    )
    return jax.lax.bitcast_convert_type(found["codes"], jnp.float8_e4m3fn), found["scales"]


def _bits(array: jax.Array) -> jax.Array:
    """Return codes as their bits; other arrays as they are."""
    return jax.lax.bitcast_convert_type(array, jnp.uint8) if array.dtype == jnp.float8_e4m3fn else array
