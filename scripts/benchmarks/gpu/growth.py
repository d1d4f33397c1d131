"""Compare caches that grow by one token per step: paged, contiguous with reserved capacity, and concatenated."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import models
from benchmarks.gpu.context import Context, Figures
from benchmarks.gpu.timing import measure
from jaxinfer import functional
from jaxinfer.functional import DecodeBatch, Program
from jaxinfer.kernels.attention import choose as attention
from jaxinfer.kernels.attention import paged
from jaxinfer.kernels.attention.paged import DecodeRows, KVCache, Scoring, Slots
from jaxinfer.models.base import LanguageModel
from jaxinfer.sharding import make_mesh

BLOCK = 16
WARM = 4
"""Warm-up steps, the first of which compiles."""


@dataclass(frozen=True)
class Contiguous:
    """Attention over caches `[B, K, S, D]`, one array row per sequence: a `KVCache` of B blocks of S positions."""

    grows: bool
    """Whether every step allocates new arrays, as concatenation does, or writes in place."""

    def decode(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        kv_cache: KVCache,
        slots: Slots,
        step: DecodeRows,
        scoring: Scoring,
        sinks: jax.Array | None = None,
        *,
        items: int | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """See `xla_attention.decode`; computes a plain softmax over all S positions."""
        kv_cache = self._append(kv_cache, k, v) if self.grows else paged.write(kv_cache, k, v, slots)
        batch, heads, dim = q.shape
        kv_heads, length = kv_cache.keys.shape[1:3]
        grouped = q.reshape(batch, kv_heads, heads // kv_heads, dim)
        scores = scoring.scale * jnp.einsum(
            "bkgd,bksd->bkgs", grouped, kv_cache.keys, preferred_element_type=jnp.float32
        )
        live = jnp.arange(length) < step.lengths[:, None]
        weights = jax.nn.softmax(jnp.where(live[:, None, None], scores, -jnp.inf), axis=-1).astype(q.dtype)
        out = jnp.einsum("bkgs,bksd->bkgd", weights, kv_cache.values, preferred_element_type=jnp.float32)
        return out.reshape(batch, heads, dim).astype(q.dtype), kv_cache

    def _append(self, kv_cache: KVCache, k: jax.Array, v: jax.Array) -> KVCache:
        """Return new arrays that end with the new token. The oldest token is dropped, so that shapes stay the same
        and one program suffices; reads and writes equal those of a concatenation to S positions, less one token.
        """

        def join(array: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.concatenate([array[:, :, 1:], new[:, :, None].astype(array.dtype)], axis=2)

        return KVCache(join(kv_cache.keys, k), join(kv_cache.values, v))


@contextmanager
def _served_by(kernel: Any) -> Iterator[None]:
    """Trace steps with another attention implementation."""
    with mock.patch.object(attention, "implementation", lambda name, mesh, **how: kernel):
        yield


def run(context: Context) -> Figures:
    """Measure a decode step of a 1 B-shaped Llama from 3072 to 4096 positions with each cache, in milliseconds."""
    start, new = context.size((3072, 1024), (24, 8))
    module = models.random(context.size(models.LLAMA_1B, models.TOY), make_mesh())
    program, params = functional.split(module, make_mesh())
    figures: Figures = {"kernel": program.kernel, "start": start, "new": new}
    for batch in context.size((1, 8), (2,)):
        figures |= _compare(module, program, params, batch, start, new)
        context.save(figures)
    batch = context.size(8, 2)
    return figures | {
        "concatenation_over_paged": figures[f"concatenation_over_paged b={batch}"],
        "static_over_paged": figures[f"static_over_paged b={batch}"],
    }


def _compare(
    module: LanguageModel, program: Program, params: list[jax.Array], batch: int, start: int, new: int
) -> Figures:
    """Compare the three caches for one number of sequences."""
    width = -(-(start + new) // BLOCK)
    tables = np.arange(batch * width, dtype=np.int32).reshape(batch, width)
    whole = np.arange(batch, dtype=np.int32)[:, None]
    in_blocks = _growing(program, params, _cache(program, batch * width, BLOCK), tables, start, new)
    with _served_by(Contiguous(grows=False)):
        program, cache = replace(program, kernel="static"), _cache(program, batch, start + new)
        static = _growing(program, params, cache, whole, start, new)
    lengths = sorted({start, start + new // 2, start + new})
    with _served_by(Contiguous(grows=True)):
        joined = [_joining(replace(program, kernel="grown"), params, batch, length) for length in lengths]
    return {
        f"paged_ms b={batch}": 1e3 * in_blocks,
        f"static_ms b={batch}": 1e3 * static,
        **{f"concatenation_ms b={batch} at {n}": 1e3 * taken for n, taken in zip(lengths, joined, strict=True)},
        f"concatenation_over_paged b={batch}": mean(joined) / in_blocks,
        f"static_over_paged b={batch}": static / in_blocks,
    }


def _cache(program: Program, blocks: int, size: int) -> list[KVCache]:
    """Return a cache of random keys and values, in place of a prompt's."""
    fill = jax.jit(models.values, static_argnums=(1, 2))
    cache = functional.init_cache(program, blocks, size)
    flat, tree = jax.tree.flatten(cache)
    shape, dtype = flat[0].shape, flat[0].dtype
    del cache
    return jax.tree.unflatten(tree, [fill(jnp.uint32(i), shape, dtype) for i in range(len(flat))])


def _step(program: Program, params: Any, cache: list[KVCache], batch: DecodeBatch) -> tuple[jax.Array, list[KVCache]]:
    logits, cache = functional.decode(program, params, cache, batch)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache


def _growing(
    program: Program, params: list[jax.Array], cache: list[KVCache], tables: np.ndarray, start: int, new: int
) -> float:
    """Return the seconds per step while every sequence grows from `start` by `new` tokens; the cache is donated."""
    step, tokens = jax.jit(_step, static_argnums=0, donate_argnums=2), jnp.zeros(len(tables), jnp.int32)
    begun = 0.0
    for position in range(start - WARM, start + new):
        if position == start:
            jax.block_until_ready(tokens)
            begun = time.perf_counter()
        at = np.full(len(tables), position, np.int32)
        tokens, cache = step(program, params, cache, DecodeBatch(tokens, at, tables))
    jax.block_until_ready(tokens)
    return (time.perf_counter() - begun) / new


def _joining(program: Program, params: list[jax.Array], batch: int, length: int) -> float:
    """Return the seconds of a step that ends at `length` positions; nothing is donated, as concatenation needs the
    old arrays.
    """
    step, cache = jax.jit(_step, static_argnums=0), _cache(program, batch, length)
    rows = DecodeBatch(
        np.zeros(batch, np.int32), np.full(batch, length - 1, np.int32), np.arange(batch, dtype=np.int32)[:, None]
    )
    return measure(lambda: step(program, params, cache, rows)).median
