"""Attention over the paged cache on NVIDIA GPUs: one Triton kernel for decode and chunked prefill.

The kernel is `triton_kernels.attend`; `triton_tiles` chooses tiles from shapes, `triton_work` computes work items from
lengths, and `triton_launch` launches it in the program. The kernel also writes the cache: programs read the step's own
keys and values from k and v, never from the cache, and one of them writes them to the cache. A sequence must therefore
not read from the cache what another one writes in the same step (the engine publishes a block after dispatching the
step that fills it).
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.kernels.attention.paged import DecodeRows, KVCache, PrefillTiles, Scoring, Slots, seen_shape
from jaxinfer.kernels.attention.quantised_cache import FP8, quantise
from jaxinfer.kernels.triton import triton_launch, tuned
from jaxinfer.kernels.triton.triton_launch import Options, Target
from jaxinfer.kernels.triton.triton_tiles import Layout, Tiling, power, tiling
from jaxinfer.kernels.triton.triton_work import decode_items, decode_work, prefill_work

PIECES = 16
"""Split-K pieces that `combine` reads at a time."""
NEW = {f"new_{name}": name for name in KVCache._fields}
"""Results of the kernel by the cache array in whose memory they are."""


@dataclass(frozen=True)
class TritonAttention:
    """Triton attention for one kind of device."""

    target: Target
    deterministic: bool = False
    """Whether a query's result from `prefill` does not depend on its tile: keys are read in pieces that begin at the
    same positions for every tile, and all pieces with a mask, since the compiler may round differently in code without
    one."""

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
        layout = _layout(q, v, kv_cache, scoring, tile=1, decode=True)
        tiles = self._tiling(layout)
        batch, group = q.shape[0], layout.heads // layout.kv_heads
        running = max(1, tiles.decode_programs * self.target.cores // (layout.kv_heads * tiles.parts(group)))
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
        return whole["whole"], found["kv_cache"]

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
        layout = _layout(q, v, kv_cache, scoring, tile=tile, decode=False)
        align = self._tiling(layout).block_n if self.deterministic else 1
        work = prefill_work(step, scoring, tokens=q.shape[0], tile=tile, align=align)
        found = self._attend((q, k, v), kv_cache, slots, step.tables, work, scoring, sinks, layout)
        return found["out"], found["kv_cache"]

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
        """Launch the kernel over work items; the result has its arrays by name, and the cache as `kv_cache`."""
        (q, k, v), tiles = qkv, self._tiling(layout)
        blocks, kv_heads, block, dim = seen_shape(kv_cache, k)
        shape, items = jax.ShapeDtypeStruct, work.shape[0]
        heads, value_dim = layout.heads, layout.value_dim
        out_shape = shape((q.shape[0], heads, value_dim), q.dtype)
        given, places = _beside(q, k, v, kv_cache)
        blocks_of, offsets = (None, None) if slots is None else slots
        operands = dict(
            items=work,
            tables=tables,
            blocks=blocks_of,
            offsets=offsets,
            **given,
            **kv_cache._asdict(),
            sinks=sinks,
        )
        written = {} if k is None else NEW
        results = dict(
            out=out_shape,
            **{new: getattr(kv_cache, name) if new in written else None for new, name in NEW.items()},
            sums=shape((items, heads, value_dim), jnp.float32) if layout.decode else None,
            stats=shape((items, 2, heads), jnp.float32) if layout.decode else None,
        )
        constants = dict(
            SCALE=scoring.scale,
            WINDOW=scoring.window,
            CHUNKED=scoring.chunked,
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
            WIDE=dim // kv_cache.keys.shape[3],
            W=tables.shape[1],
            TILE=power(layout.tile, 1),
            UNMASKED=not (layout.decode or self.deterministic) and (scoring.window is None or scoring.chunked),
            K_ALIGN=math.gcd(16, dim * kv_cache.keys.dtype.itemsize),
            V_ALIGN=math.gcd(16, value_dim * kv_cache.keys.dtype.itemsize),
            **places,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            PRECISION="ieee" if layout.itemsize == 4 else "tf32",
            FP8=kv_cache.keys.dtype == FP8,
        )
        found = self._launch(
            "attend",
            operands,
            results,
            aliases={name: new for new, name in written.items()},
            constants=constants,
            grid=(kv_heads * tiles.parts(heads // kv_heads), items),
            options=tiles.options,
        )
        return found | {"kv_cache": KVCache(*map(found.get, written)) if written else kv_cache}

    def _tiling(self, layout: Layout) -> Tiling:
        return tuned.choose("attend", vars(layout), tiling(layout), self.target)

    def _launch(self, name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        from jaxinfer.kernels.triton import triton_kernels  # imports triton

        return triton_launch.launch(getattr(triton_kernels, name), *args, target=self.target, **kwargs)


def _beside(
    q: jax.Array, k: jax.Array | None, v: jax.Array | None, kv_cache: KVCache
) -> tuple[dict[str, jax.Array | None], dict[str, int]]:
    """Return queries, keys and values for the kernel as the cache stores them, with their offsets and strides.

    They come from one GEMM through rope: as one array XLA computes them with one kernel, as three arrays with three. So
    they are concatenated if their widths are equal; codes, which are not of the queries' dtype, without the queries.
    """
    parts = {name: x for name, x in (("q", q), ("k", k), ("v", v)) if x is not None}
    joined = [name for name in parts if name != "q" or not kv_cache.quantised]
    if v is None or v.shape[2] != q.shape[2]:
        joined = []
    rows = {name: math.prod(x.shape[1:]) for name, x in parts.items()}
    firsts, row = dict.fromkeys(parts, 0), sum(rows[name] for name in joined)
    for before, name in itertools.pairwise(joined):
        firsts[name] = firsts[before] + rows[before]
    rows |= dict.fromkeys(joined, row)
    if joined:
        parts |= dict.fromkeys(joined, jnp.concatenate([parts[name] for name in joined], axis=1))
    if kv_cache.quantised:
        made = {id(x): quantise(x, kv_cache.keys.dtype) for name, x in parts.items() if name != "q"}
        codes = {name: made[id(x)] for name, x in parts.items() if name != "q"}
        parts |= {name: own.codes for name, own in codes.items()}
        parts |= {f"{name}_scales": own.scales for name, own in codes.items()}
    else:
        parts = {name: x.astype(kv_cache.keys.dtype) for name, x in parts.items()}
    # Without keys (cross-attention) or values (MLA) other offsets stand in for theirs.
    places = {f"{name}_FIRST": firsts.get(name.lower(), firsts.get("k", 0)) for name in "QKV"}
    places |= {f"{name}_ROW": rows.get(name.lower(), rows.get("k", rows["q"])) for name in "QKV"}
    return dict.fromkeys(("q", "k", "v", "k_scales", "v_scales")) | parts, places


def _shape(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _layout(
    q: jax.Array, v: jax.Array | None, kv_cache: KVCache, scoring: Scoring, *, tile: int, decode: bool
) -> Layout:
    latent = kv_cache.values is None
    value_dim = scoring.value_dim if latent else (kv_cache.values if v is None else v).shape[-1]
    itemsize = jnp.dtype(q.dtype if kv_cache.quantised else kv_cache.keys.dtype).itemsize
    kv_heads = (kv_cache.keys if v is None else v).shape[1]
    dim = q.shape[2]
    return Layout(q.shape[1], kv_heads, dim, value_dim, latent, itemsize, tile, decode, kv_cache.quantised)
