"""Decode attention by a Pallas kernel for Hopper GPUs: the same work as the Triton kernel, launched by Mosaic GPU.

Triton kernels are launched by a custom call of XLA that JAX does not document (`triton_launch`). Pallas' own compiler
for NVIDIA GPUs, Mosaic, is the way that stays if that call goes. Only decode is here; prefill is XLA's.

As in FlashAttention-3 (arXiv:2407.08608) the query heads of a kv head are the rows of the tensor cores' products, of
which there are 64: most of them are padding, which costs less than reading the keys. Keys and values come block by
block through TMA, `STAGES` tiles ahead.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxinfer._utils.log import warn_once
from jaxinfer.errors import ConfigError
from jaxinfer.kernels.attention import xla_attention
from jaxinfer.kernels.attention.mosaic_tiles import DIMS, HEADS, HOPPER, KEYS, LEAST, LOG2E, PROGRAMS, ROWS, Shape
from jaxinfer.kernels.attention.paged import DecodeRows, KVCache, PrefillTiles, Scoring, Slots, viewed, write
from jaxinfer.kernels.triton import triton_launch
from jaxinfer.kernels.triton.triton_launch import Target
from jaxinfer.kernels.triton.triton_work import decode_items, decode_work


@dataclass(frozen=True)
class MosaicAttention:
    """Attention whose decode is a Mosaic GPU kernel, for one kind of device."""

    target: Target
    interpret: Any = None
    """Parameters of Pallas' interpreter of GPU kernels; None to compile."""

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
        stored = write(kv_cache, k, v, slots)
        seen = stored if k is None else viewed(stored, *k.shape[1:])
        if reason := unsupported(seen, q):
            warn_once(
                "attention_kernel='mosaic' decodes some layers with XLA, which copies the blocks it reads", reason
            )
            return xla_attention.decode(q, None, None, seen, None, step, scoring, sinks)[0], stored
        (_, kv_heads, block, _), batch = seen.keys.shape, q.shape[0]
        longest = step.tables.shape[1] * block
        running = max(1, PROGRAMS * self.target.cores // kv_heads)
        items = decode_items(batch, min(longest, scoring.window or longest), running, KEYS)
        work, _ = decode_work(step, scoring, items=items, running=running, block_n=KEYS)
        sums, stats = self._attend(q, seen, step.tables, work, scoring)
        return _combine(q, sums, stats, work, sinks), stored

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
        """Attend as `xla_attention.prefill`."""
        return xla_attention.prefill(q, k, v, kv_cache, slots, step, scoring, sinks, tile=tile)

    def _attend(
        self, q: jax.Array, kv_cache: KVCache, tables: jax.Array, work: jax.Array, scoring: Scoring
    ) -> tuple[jax.Array, jax.Array]:
        """Return weighted sums `[I, K, G, Dv]` of each work item, and maxima and sums of its weights `[I, K, 2, G]`."""
        from jaxinfer.kernels.attention import mosaic_kernel  # imports Mosaic GPU

        blocks, kv_heads, block, dim = kv_cache.keys.shape
        value_dim, items, group = kv_cache.values.shape[3], work.shape[0], q.shape[1] // kv_heads
        padded = -(-group // HEADS) * HEADS
        rows = q.reshape(q.shape[0], kv_heads, group, dim).astype(kv_cache.keys.dtype)
        rows = jnp.pad(rows, ((0, 0), (0, 0), (0, padded - group), (0, 0)))
        shape = Shape(block, dim, value_dim, padded, blocks, tables.shape[1])
        out = (
            jax.ShapeDtypeStruct((items, kv_heads, padded, value_dim), jnp.float32),
            jax.ShapeDtypeStruct((items, kv_heads, 2, padded), jnp.float32),
        )
        call = mosaic_kernel.make(shape, scoring, out, kv_cache.keys.dtype, self.interpret)
        sums, stats = call(work, tables, rows, kv_cache.keys, kv_cache.values)
        return sums[:, :, :group], stats[..., :group]


def check(setting: str, mesh: Mesh) -> None:
    """Check that the devices of a mesh can run the kernel.

    Raises:
        ConfigError: they are no Hopper GPUs; names the setting.
    """
    target, device = triton_launch.target(mesh), mesh.devices.flat[0]
    if target is None or target.capability != HOPPER:
        raise ConfigError(
            f"{setting}='mosaic' needs GPUs of compute capability {HOPPER / 10} (Hopper), the device is "
            f"{device.device_kind} ({device.platform}); use 'auto'"
        )


def unsupported(kv_cache: KVCache, q: jax.Array) -> str | None:
    """Return why the kernel cannot read this cache for queries `[B, H, D]`, or None if it can."""
    if kv_cache.quantised or kv_cache.values is None:
        return "keys and values must be arrays of their own, in 16 bits"
    (_, kv_heads, block, dim), value_dim = kv_cache.keys.shape, kv_cache.values.shape[3]
    if kv_cache.keys.dtype.itemsize != 2:
        return f"keys and values must be bfloat16 or float16, are {kv_cache.keys.dtype}"
    if block % HEADS or KEYS % block:
        return f"block_size must be {HEADS}, 16, 32 or {KEYS}, is {block}"
    if any(d not in DIMS for d in (dim, value_dim)):
        return f"heads must be {' or '.join(map(str, DIMS))} wide, are {dim} and {value_dim}"
    group = q.shape[1] // kv_heads
    return None if group <= ROWS else f"a kv head must have at most {ROWS} query heads, has {group}"


def _combine(q: jax.Array, sums: jax.Array, stats: jax.Array, work: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """Merge the pieces of each row: sums `[I, K, G, Dv]` and stats `[I, K, 2, G]` to `[B, H, Dv]`."""
    batch, heads = q.shape[0], q.shape[1]
    tops, totals = stats[:, :, 0], stats[:, :, 1]
    used = work[:, 3] > 0
    mine = (work[:, 1] == jnp.arange(batch)[:, None]) & used
    top = jnp.where(mine[..., None, None], tops, LEAST).max(axis=1)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(top.shape[1:]) * LOG2E
        top = jnp.maximum(top, sinks)
    shares = jnp.where(used[:, None, None], jnp.exp2(tops - top[work[:, 1]]), 0)
    # A loop over a row's pieces would wait for them; a product adds them up with the rows of zeros of all others.
    mine = mine.astype(jnp.float32)
    live = used[:, None, None, None]
    parts = jnp.einsum("bi,ikgd->bkgd", mine, jnp.where(live, sums * shares[..., None], 0), precision="highest")
    total = jnp.einsum("bi,ikg->bkg", mine, jnp.where(used[:, None, None], totals * shares, 0), precision="highest")
    if sinks is not None:
        total += jnp.exp2(sinks - top)
    out = parts / jnp.where(total == 0, 1, total)[..., None]
    return out.reshape(batch, heads, -1).astype(q.dtype)
