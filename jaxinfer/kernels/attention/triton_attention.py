"""Attention over the paged cache on NVIDIA GPUs: one Triton kernel for decode and chunked prefill.

The kernel is `triton_kernels.attend`; `triton_tiles` chooses tiles from shapes, `triton_work` computes work items from
lengths, and `triton_launch` launches it in the program. The kernel also writes the cache: programs read the step's own
keys and values from k and v, never from the cache, and one of them writes them to the cache. A sequence must therefore
not read from the cache what another one writes in the same step (the engine publishes a block after dispatching the
step that fills it).
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.kernels.attention.paged import DecodeRows, KVCache, PrefillTiles, Scoring, Slots
from jaxinfer.kernels.triton import triton_launch
from jaxinfer.kernels.triton.triton_launch import Options, Target
from jaxinfer.kernels.triton.triton_tiles import Layout, power, tiling
from jaxinfer.kernels.triton.triton_work import decode_items, decode_work, prefill_work

SLOTS_A_CORE = 2
"""Decode programs that run concurrently on a multiprocessor; all tilings leave shared memory for two."""
PIECES = 16
"""Split-K pieces that `combine` reads at a time."""


@dataclass(frozen=True)
class TritonAttention:
    """Triton attention for one kind of device."""

    target: Target
    deterministic: bool = False
    """Whether a query's result from `prefill` does not depend on its tile: keys are read in pieces that begin at the
    same positions for every tile, and all pieces with a mask, as the compiler may round otherwise without."""

    def decode(
        self,
        q: jax.Array,
        k: jax.Array | None,
        v: jax.Array | None,
        kv_cache: KVCache,
        slots: Slots | None,
        step: DecodeRows,
        scoring: Scoring,
        sinks: jax.Array | None = None,
        *,
        items: int | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Attend as `xla_attention.decode`; `items` is ignored: pieces are computed from lengths on the device."""
        layout = _layout(q, kv_cache, scoring, tile=1, decode=True)
        tiles = tiling(layout)
        batch, group = q.shape[0], layout.heads // layout.kv_heads
        running = max(1, SLOTS_A_CORE * self.target.cores // (layout.kv_heads * tiles.parts(group)))
        longest = step.tables.shape[1] * kv_cache.keys.shape[2]
        items = decode_items(batch, min(longest, scoring.window or longest), running, tiles.block_n)
        work, spans = decode_work(step, scoring, items=items, running=running, block_n=tiles.block_n)
        found = self._attend((q, k, v), kv_cache, slots, step.tables, work, scoring, sinks, layout)
        whole = self._launch(
            "combine",
            dict(spans=spans, sums=found["sums"], stats=found["stats"], sinks=sinks, out=found["out"]),
            dict(whole=_shape(found["out"])),
            aliases={"out": "whole"},
            grid=(layout.heads, batch),
            options=Options(4, 2),
            constants=dict(H=layout.heads, DV=layout.value_dim, V_COLUMNS=power(layout.value_dim), PIECES=PIECES),
        )
        return whole["whole"], kv_cache if k is None else KVCache(found["new_keys"], found["new_values"])

    def prefill(
        self,
        q: jax.Array,
        k: jax.Array | None,
        v: jax.Array | None,
        kv_cache: KVCache,
        slots: Slots | None,
        step: PrefillTiles,
        scoring: Scoring,
        sinks: jax.Array | None = None,
        *,
        tile: int,
    ) -> tuple[jax.Array, KVCache]:
        """Attend as `xla_attention.prefill`; fastest with tiles of `tile()` queries; outputs of padding are 0."""
        layout = _layout(q, kv_cache, scoring, tile=tile, decode=False)
        align = tiling(layout).block_n if self.deterministic else 1
        work = prefill_work(step, scoring, tokens=q.shape[0], tile=tile, align=align)
        found = self._attend((q, k, v), kv_cache, slots, step.tables, work, scoring, sinks, layout)
        return found["out"], kv_cache if k is None else KVCache(found["new_keys"], found["new_values"])

    def _attend(
        self,
        qkv: tuple[jax.Array, jax.Array | None, jax.Array | None],
        kv_cache: KVCache,
        slots: Slots | None,
        tables: jax.Array,
        work: jax.Array,
        scoring: Scoring,
        sinks: jax.Array | None,
        layout: Layout,
    ) -> dict[str, Any]:
        """Launch the kernel over work items."""
        (q, k, v), tiles, dtype = qkv, tiling(layout), kv_cache.keys.dtype
        blocks, kv_heads, block, dim = kv_cache.keys.shape
        shape, items = jax.ShapeDtypeStruct, work.shape[0]
        heads, value_dim = layout.heads, layout.value_dim
        out_shape = shape((q.shape[0], heads, value_dim), q.dtype)
        q, k, v, places = _beside(*(None if x is None else x.astype(dtype) for x in (q, k, v)))
        blocks_of, offsets = (None, None) if slots is None else slots
        operands = dict(
            items=work,
            tables=tables,
            blocks=blocks_of,
            offsets=offsets,
            q=q,
            k=k,
            v=v,
            keys=kv_cache.keys,
            values=kv_cache.values,
            sinks=sinks,
        )
        written = [None if array is None or k is None else _shape(array) for array in kv_cache]
        results = dict(
            out=out_shape,
            new_keys=written[0],
            new_values=written[1],
            sums=shape((items, heads, value_dim), jnp.float32) if layout.decode else None,
            stats=shape((items, 2, heads), jnp.float32) if layout.decode else None,
        )
        constants = dict(
            SCALE=scoring.scale,
            WINDOW=scoring.window,
            SOFTCAP=scoring.softcap,
            H=heads,
            K=kv_heads,
            MEMBERS=tiles.members,
            D=dim,
            DV=value_dim,
            MAIN=tiles.main,
            REST=tiles.rest,
            K_COLUMNS=power(dim),
            V_COLUMNS=tiles.value_columns,
            N=blocks,
            P=block,
            W=tables.shape[1],
            TILE=power(layout.tile, 1),
            UNMASKED=not (layout.decode or self.deterministic) and scoring.window is None,
            K_ALIGN=math.gcd(16, dim * layout.itemsize),
            V_ALIGN=math.gcd(16, value_dim * layout.itemsize),
            **places,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            PRECISION="ieee" if layout.itemsize == 4 else "tf32",
        )
        return self._launch(
            "attend",
            operands,
            results,
            aliases={} if k is None else {"keys": "new_keys", "values": "new_values"},
            constants=constants,
            grid=(kv_heads * tiles.parts(heads // kv_heads), items),
            options=tiles.options,
        )

    def _launch(self, name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        from jaxinfer.kernels.triton import triton_kernels  # imports triton

        return triton_launch.launch(getattr(triton_kernels, name), *args, target=self.target, **kwargs)


def _beside(
    q: jax.Array, k: jax.Array | None, v: jax.Array | None
) -> tuple[jax.Array, jax.Array | None, jax.Array | None, dict[str, int]]:
    """Return queries, keys and values for the kernel with their offsets and strides, concatenated if their widths are
    equal.

    They come from one GEMM through rope: as one array XLA computes them with one kernel, as three arrays with three.
    """
    parts = [x for x in (q, k, v) if x is not None]
    rows = [math.prod(x.shape[1:]) for x in parts]
    firsts = [0] * len(parts)
    if v is not None and v.shape[2] == q.shape[2]:
        firsts = [0, rows[0], rows[0] + rows[1]]
        q = k = v = jnp.concatenate(parts, axis=1)
        rows = [sum(rows)] * 3
    # Without values (MLA) the keys' offsets stand in for them.
    firsts, rows = (firsts + firsts[-1:] * 2)[:3], (rows + rows[-1:] * 2)[:3]
    names = ("Q", "K", "V")
    return (
        q,
        k,
        v,
        {
            **{f"{name}_FIRST": first for name, first in zip(names, firsts, strict=True)},
            **{f"{name}_ROW": row for name, row in zip(names, rows, strict=True)},
        },
    )


def _shape(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _layout(q: jax.Array, kv_cache: KVCache, scoring: Scoring, *, tile: int, decode: bool) -> Layout:
    latent = kv_cache.values is None
    value_dim = scoring.value_dim if latent else kv_cache.values.shape[3]
    itemsize = jnp.dtype(kv_cache.keys.dtype).itemsize
    return Layout(q.shape[1], kv_cache.keys.shape[1], kv_cache.keys.shape[3], value_dim, latent, itemsize, tile, decode)
