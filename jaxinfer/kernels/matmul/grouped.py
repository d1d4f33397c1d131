"""Products of rows with the matrix of their own group: the experts of a mixture.

Rows are sorted by group, and the work is proportional to the number of rows: matrices of groups without rows are not
read, and rows of no group come last and are not computed. (`lax.ragged_dot` is dense over the groups on a CPU.)
CPUs use the native product (`native/matmul.cc`), NVIDIA GPUs the Triton kernel (`triton_grouped`), and other devices a
loop in XLA over tiles of rows.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.kernels.matmul import int8_matmul, packed_matmul, triton_grouped, triton_packed
from jaxinfer.kernels.matmul.choose import NATIVES, RAGGED, STABLE, TRITON, XLA
from jaxinfer.kernels.matmul.choose import matmul as dense
from jaxinfer.kernels.matmul.packed_matmul import Packed
from jaxinfer.kernels.triton.triton_launch import Target

KEYS = 1 << 31
"""Number of non-negative int32 keys."""
LEAST_TILE, MOST_TILE = 8, 128
"""Bounds of the rows per tile of the loop in XLA; a tile is multiplied with one matrix."""


class Dispatch(NamedTuple):
    """Pairs of a token and an expert, sorted by expert."""

    tokens: jax.Array
    """Token of each row, `[R]` int32, R = T * k, sorted by expert; pairs without an expert come last."""
    experts: jax.Array
    """Expert of each row, `[R]` int32; any expert for pairs without one."""
    places: jax.Array
    """Row of each pair, `[T, k]` int32."""
    offsets: jax.Array
    """First row of each expert, then the end of the last one, `[E + 1]` int32."""


def dispatch(chosen: jax.Array, experts: int) -> Dispatch:
    """Sort the pairs of each token and its chosen experts `[T, k]` by expert; numbers from `experts` on mean none.

    Pairs of one expert stay in the order of the tokens.
    """
    pairs, per_token = chosen.size, chosen.shape[1]
    owners = chosen.reshape(-1).astype(jnp.int32)
    owners = jnp.where((owners >= 0) & (owners < experts), owners, experts)
    number = jnp.arange(pairs, dtype=jnp.int32)
    if has_one_key(experts, pairs):  # which is sorted faster than keys with a payload; no two are equal
        keys = jnp.sort(owners * pairs + number)
        order, sorted_owners = keys % pairs, keys // pairs
    else:
        order = jnp.argsort(owners, stable=True).astype(jnp.int32)
        sorted_owners = owners[order]
    places = jnp.zeros_like(number).at[order].set(number, unique_indices=True, mode="promise_in_bounds")
    offsets = jnp.sum(owners < jnp.arange(experts + 1, dtype=jnp.int32)[:, None], axis=1, dtype=jnp.int32)
    return Dispatch(order // per_token, jnp.minimum(sorted_owners, experts - 1), places.reshape(chosen.shape), offsets)


def has_one_key(experts: int, pairs: int) -> bool:
    """Return whether the expert of a pair and the number of the pair fit into one int32."""
    return (experts + 1) * pairs <= KEYS


def combine(y: jax.Array, weights: jax.Array, places: jax.Array, end: jax.Array) -> jax.Array:
    """Sum the weighted outputs of each token's experts: `[T, M]` in the dtype of `y`.

    The sum is taken in float32 in the order of the pairs, so that it is deterministic.

    Args:
        y: outputs of the experts `[R, M]`, sorted by expert; rows from `end` on are not read.
        weights: `[T, k]` float32.
        places: `[T, k]`, see `Dispatch`.
        end: `[]`, last entry of `Dispatch.offsets`.
    """
    rows = y[jnp.minimum(places, y.shape[0] - 1)].astype(jnp.float32)
    rows = jnp.where((places < end)[..., None], rows * weights[..., None], 0)
    return jax.lax.reduce_sum(rows, axes=(1,)).astype(y.dtype)


def matmul(
    x: jax.Array,
    weight: jax.Array,
    offsets: jax.Array,
    scales: jax.Array | None = None,
    *,
    kernel: str = XLA,
    target: Target | None = None,
    block: int = 1,
) -> jax.Array:
    """Compute `y[r] = x[r] W[e]^T` for the rows r in `offsets[e] .. offsets[e + 1]`.

    Args:
        x: `[R, in]`.
        weight: `[E, out, in]`; int8 with `scales`, else in the dtype of `x`.
        offsets: `[E + 1]` int32, ascending from 0 to at most R.
        scales: scales of the rows of an int8 weight, `[E, out]` float32 (`int8_matmul`).
        kernel: "native", "stable", "triton" or "xla" (`kernels.matmul.choose`), or "ragged", without scales.
        target: kind of device, for "triton".
        block: columns per rotated block of an int8 weight.

    Returns:
        `[R, out]` in the dtype of `x`, with sums taken in float32; rows from `offsets[E]` on are undefined.
    """
    if kernel == TRITON and target is not None:
        return triton_grouped.matmul(x, weight, offsets, scales, target, block)
    if kernel in NATIVES and _native(x, weight):
        result = jax.ShapeDtypeStruct((x.shape[0], weight.shape[1]), x.dtype)
        if scales is None:
            return jax.ffi.ffi_call("jaxinfer_grouped_matmul", result)(x, weight, offsets, stable=kernel == STABLE)
        return jax.ffi.ffi_call("jaxinfer_grouped_int8_matmul", result)(
            x, weight, scales, offsets, block=np.int64(block)
        )

    if kernel == RAGGED:
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        return jax.lax.ragged_dot(x, weight.swapaxes(1, 2), jnp.diff(offsets), precision=precision)

    def product(rows: jax.Array, group: jax.Array) -> jax.Array:
        if scales is None:
            return dense(rows, weight[group])
        return int8_matmul.matmul(rows, weight[group], scales[group], block=block)

    return _tiles(x, offsets, weight.shape[1], product)


def packed(
    x: jax.Array, weight: Packed, offsets: jax.Array, *, kernel: str = XLA, target: Target | None = None
) -> jax.Array:
    """Compute `matmul` with a weight `[E, out, in]` in codes of 4 bits.

    Args and the result are those of `matmul`. A kernel makes values in registers; XLA dequantises the matrix of each
    tile.
    """
    if kernel == TRITON and target is not None:
        return triton_packed.matmul(x, *weight, x.dtype, target, offsets)
    if kernel in NATIVES and packed_matmul.is_native(x, weight, x.dtype):
        result = jax.ShapeDtypeStruct((x.shape[0], weight.codes.shape[1]), x.dtype)
        return jax.ffi.ffi_call("jaxinfer_grouped_packed_matmul", result)(
            x, *weight.operands, offsets, group=np.int64(weight.group), stable=kernel == STABLE
        )

    def product(rows: jax.Array, group: jax.Array) -> jax.Array:
        own = Packed(*(None if one is None else one[group] for one in weight))
        return dense(rows, packed_matmul.dequantise(own, rows.dtype))

    return _tiles(x, offsets, weight.codes.shape[1], product)


def _native(x: jax.Array, weight: jax.Array) -> bool:
    if weight.dtype == jnp.int8:
        return x.shape[1] % 4 == 0 and x.dtype in (jnp.bfloat16, jnp.float32)
    return x.dtype == weight.dtype and (x.dtype == jnp.float32 or x.dtype == jnp.bfloat16 and x.shape[1] % 2 == 0)


def _tiles(
    x: jax.Array, offsets: jax.Array, columns: int, product: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """Multiply tile by tile, each of rows of one group; the loop runs once per tile that has rows."""
    rows, groups = x.shape[0], offsets.shape[0] - 1
    tile = min(MOST_TILE, max(LEAST_TILE, 1 << (rows // groups).bit_length()))
    tiles = -(-jnp.diff(offsets) // tile)
    ends = jnp.cumsum(tiles)
    x = jnp.pad(x, ((0, tile), (0, 0)))

    def turn(number: jax.Array, y: jax.Array) -> jax.Array:
        group = jnp.sum(ends <= number)
        first = offsets[group] + (number - ends[group] + tiles[group]) * tile
        made = product(jax.lax.dynamic_slice_in_dim(x, first, tile), group)
        # Rows beyond the group's end are overwritten by the tiles that follow.
        return jax.lax.dynamic_update_slice_in_dim(y, made, first, 0)

    return jax.lax.fori_loop(0, ends[-1], turn, jnp.zeros((rows + tile, columns), x.dtype))[:rows]


def reference(x: np.ndarray, weight: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Reference implementation of `matmul` in float64, row by row; rows of no group are zero."""
    y = np.zeros((x.shape[0], weight.shape[1]))
    for group, (first, last) in enumerate(pairwise(offsets)):
        y[first:last] = x[first:last].astype(np.float64) @ weight[group].astype(np.float64).T
    return y
