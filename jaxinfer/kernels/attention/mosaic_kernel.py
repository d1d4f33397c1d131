"""The Mosaic GPU kernel of `mosaic_attention`. Importing this module imports Pallas' compiler for NVIDIA GPUs."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxinfer.kernels.attention.mosaic_tiles import KEYS, LEAST, LOG2E, ROWS, STAGES, Shape
from jaxinfer.kernels.attention.paged import Scoring

OUT = "out_type" if "out_type" in inspect.signature(plgpu.kernel).parameters else "out_shape"
"""Keyword argument of `plgpu.kernel` for the shapes of results, which jax 0.12 has renamed."""


def make(shape: Shape, scoring: Scoring, out: Any, dtype: jnp.dtype, interpret: Any) -> Callable[..., Any]:
    """Return the kernel: (work `[I, 8]`, tables `[R, W]`, q `[B, K, G, D]`, keys, values) -> (sums, stats)."""
    items, kv_heads = out[0].shape[:2]
    return plgpu.kernel(
        functools.partial(_attend, shape, scoring, dtype),
        grid=(kv_heads, items),
        grid_names=("head", "item"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        **{OUT: out},
    )


def _attend(
    shape: Shape,
    scoring: Scoring,
    dtype: jnp.dtype,
    work: Any,
    tables: Any,
    q: Any,
    keys: Any,
    values: Any,
    sums: Any,
    stats: Any,
) -> None:
    """Attend of the query heads of one kv head to one piece of a row's keys."""
    item, head = lax.axis_index("item"), lax.axis_index("head")
    row, token, _, used, first, end = (work[item, n] for n in range(6))
    base, heads = first // shape.block * shape.block, pl.ds(0, shape.group)
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def attend(queries: Any, barrier: Any, *scratch: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        piece = _Piece(shape, scoring, keys, values, tables, row, head, base, first, end, queries, *scratch)
        for stage in range(STAGES):
            piece.load(stage)
        plgpu.copy_gmem_to_smem(q.at[token, head], queries.at[heads], barrier)
        plgpu.barrier_wait(barrier)
        return lax.fori_loop(0, piece.tiles, piece.attend, piece.nothing())

    @pl.when(used > 0)
    def _() -> None:
        loaded = plgpu.Barrier(num_arrivals=KEYS // shape.block, num_barriers=STAGES)
        acc, top, total = pl.run_scoped(
            attend,
            plgpu.SMEM((ROWS, shape.dim), dtype, transforms=tiled),
            plgpu.Barrier(),
            plgpu.SMEM((ROWS, KEYS), dtype, transforms=tiled),
            plgpu.SMEM((STAGES, KEYS, shape.dim), dtype, transforms=tiled),
            plgpu.SMEM((STAGES, KEYS, shape.value_dim), dtype, transforms=tiled),
            loaded,
            loaded,
        )

        def store(results: Any, tops: Any, totals: Any) -> None:
            results[...], tops[...], totals[...] = acc, top, total
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(results.at[heads], sums.at[item, head])
            plgpu.copy_smem_to_gmem(tops.at[heads], stats.at[item, head, 0])
            plgpu.copy_smem_to_gmem(totals.at[heads], stats.at[item, head, 1])
            plgpu.wait_smem_to_gmem(0)

        # In the memory of the tiles, so that two programs fit into a multiprocessor.
        pl.run_scoped(
            store,
            plgpu.SMEM((ROWS, shape.value_dim), jnp.float32),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.SMEM((ROWS,), jnp.float32),
        )


class _Piece(NamedTuple):
    """A piece of a row's keys, and how it is read. Arrays are scalars `[]`."""

    shape: Shape
    scoring: Scoring
    keys: Any
    values: Any
    tables: Any
    row: jax.Array
    """Row of the block table."""
    head: jax.Array
    base: jax.Array
    """Position of the first key of the first tile, the beginning of a block."""
    first: jax.Array
    """Position of the first key that is seen."""
    end: jax.Array
    """Position after the last one."""
    queries: Any
    """Queries `[64, D]` in shared memory, of which those of padding are undefined, as their results are."""
    weights: Any
    """Room for the weights of a tile, `[64, 64]`."""
    key_tiles: Any
    """Keys of the tiles that are loaded, `[STAGES, 64, D]`."""
    value_tiles: Any
    """Likewise their values."""
    key_barriers: Any
    """Barriers that the keys of these tiles arrive at."""
    value_barriers: Any

    @property
    def tiles(self) -> jax.Array:
        """Number of tiles."""
        return (self.end - self.base + KEYS - 1) // KEYS

    def load(self, tile: jax.Array | int) -> None:
        """Begin to load a tile, if there is one; behind the last block that block is read again."""
        block, slot = self.shape.block, tile % STAGES

        @pl.when(tile < self.tiles)
        def _() -> None:
            parts = (
                (self.keys, self.key_tiles, self.key_barriers),
                (self.values, self.value_tiles, self.value_barriers),
            )
            for n in range(KEYS // block):
                at = jnp.minimum(self.base + tile * KEYS + n * block, self.end - 1) // block
                where = jnp.clip(self.tables[self.row, at], 0, self.shape.blocks - 1)
                rows = pl.ds(n * block, block)
                for array, tiles, barriers in parts:
                    plgpu.copy_gmem_to_smem(array.at[where, self.head], tiles.at[slot, rows], barriers.at[slot])

    def nothing(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return sums `[64, Dv]`, maxima and sums of weights `[64]` before the first tile."""
        rows = plgpu.Layout.WGMMA.reduce(1)
        return (
            plgpu.layout_cast(jnp.zeros((ROWS, self.shape.value_dim), jnp.float32), plgpu.Layout.WGMMA),
            plgpu.layout_cast(jnp.full((ROWS,), LEAST, jnp.float32), rows),
            plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), rows),
        )

    def attend(
        self, tile: jax.Array, before: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Add a tile to the sums."""
        (acc, top, total), slot = before, tile % STAGES
        start = self.base + tile * KEYS
        plgpu.barrier_wait(self.key_barriers.at[slot])

        def scores(ref: Any) -> jax.Array:
            plgpu.wgmma(ref, self.queries, self.key_tiles.at[slot].transpose((1, 0)))
            return ref[...]

        found = pl.run_scoped(scores, plgpu.ACC((ROWS, KEYS), jnp.float32))
        found = self.scoring.cap(found * self.scoring.scale) * LOG2E
        at = start + plgpu.broadcasted_iota(jnp.int32, (ROWS, KEYS), 1, layout=plgpu.Layout.WGMMA)
        found = jnp.where((at >= self.first) & (at < self.end), found, -jnp.inf)
        new = jnp.maximum(top, found.max(axis=1))
        weights = jnp.exp2(found - lax.broadcast_in_dim(new, found.shape, [0]))
        shrink = jnp.exp2(top - new)
        total = total * shrink + weights.sum(axis=1)
        plgpu.barrier_wait(self.value_barriers.at[slot])
        self._clear(start, self.value_tiles.at[slot])
        self.weights[...] = weights.astype(self.weights.dtype)
        plgpu.commit_smem()

        def weighted(ref: Any) -> jax.Array:
            plgpu.wgmma(ref, self.weights, self.value_tiles.at[slot])
            return ref[...]

        part = pl.run_scoped(weighted, plgpu.ACC((ROWS, self.shape.value_dim), jnp.float32))
        acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0]) + part
        # All warps have read the tile, before the next one takes its place.
        plgpu.commit_smem()
        self.load(tile + STAGES)
        return acc, new, total

    def _clear(self, start: jax.Array, values: Any) -> None:
        """Set values to 0 that are not seen: what another sequence left in a block may be NaN, and 0 x NaN is NaN."""

        @pl.when((start < self.first) | (start + KEYS > self.end))
        def _() -> None:
            shape = (KEYS, self.shape.value_dim)
            at = start + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
            found = values[...]
            values[...] = jnp.where((at >= self.first) & (at < self.end), found, jnp.zeros_like(found))
