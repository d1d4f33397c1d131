"""Attention to keys that are all in the cache, in every implementation, against the reference."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from support.attention import PLAIN, Case, Shape, same_cache
from support.interpret import interpreted
from support.native import require_native_kernels

from jaxinfer.kernels.attention import native_attention, paged, xla_attention
from jaxinfer.kernels.attention.paged import DecodeRows, PrefillTiles
from jaxinfer.kernels.attention.triton_attention import TritonAttention
from jaxinfer.kernels.triton import triton_tiles
from jaxinfer.kernels.triton.triton_launch import Target

pytestmark = pytest.mark.slow

P = PLAIN.block
SHAPES = {
    "plain": PLAIN,
    "one head a key": replace(PLAIN, heads=4, kv_heads=4),
    "bfloat16, sinks, softcap": replace(PLAIN, dtype="bfloat16", sinks=True, softcap=2.0),
    "blocks of one": replace(PLAIN, block=1),
    "narrow values": replace(PLAIN, value_dim=6),
    "int8 codes, bfloat16": replace(PLAIN, codes="int8", dtype="bfloat16"),
}
SPANS = [(0, 0), (0, 1), (0, P), (3, 3), (0, 4 * P + 1), (P - 1, 2 * P + 1), (2 * P, 9 * P), (5, 6), (0, 9 * P + 3)]
"""Key spans that a sequence's queries see: none, around block boundaries, all."""
QUERIES = [1, 2, 1, 3, 9, 1, 4, 5, 2]
TILE = 4


@pytest.fixture(scope="module", params=["xla", "native", "triton"])
def kernel(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "xla":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(xla_attention, "PREFILL_KEYS", 2 * P)
            patch.setattr(xla_attention, "DECODE_KEYS", 2 * P)
            yield xla_attention
    elif request.param == "native":
        require_native_kernels()
        yield native_attention
    else:
        with interpreted() as patch:
            patch.setattr(triton_tiles, "TURN_BYTES", 2048)
            yield TritonAttention(Target(90, 2))


def cached(shape: Shape) -> SimpleNamespace:
    """Make sequences whose visible keys are in a cache that is NaN everywhere else."""
    lengths = [end for _, end in SPANS]
    case = Case(shape, lengths, [0] * len(lengths))
    kv_cache = jax.tree.map(np.array, case.kv_cache)
    marked = kv_cache[2:] if kv_cache.quantised else kv_cache[:2]
    for row, (first, _) in enumerate(SPANS):
        for at in range(first):
            for array in marked:
                array[case.tables[row, at // shape.block], :, at % shape.block] = np.nan
    kv_cache = jax.device_put(kv_cache)
    return SimpleNamespace(
        case=case, kv_cache=kv_cache, tables=jax.device_put(case.tables), shape=shape, sinks=case.sinks
    )


def queries(work: SimpleNamespace, rows: np.ndarray) -> tuple[jax.Array, np.ndarray]:
    """Make the queries of these rows and the reference's result."""
    shape = work.shape
    q = np.random.default_rng(1).normal(size=(len(rows), shape.heads, shape.dim)).astype(np.float32)
    q = jax.device_put(q.astype(shape.dtype))
    spans = np.array(SPANS, np.int32)[rows]
    expected = jax.jit(paged.reference, static_argnums=5)(
        q, work.kv_cache, work.tables, rows, np.zeros(len(rows), np.int32), shape.scoring, work.sinks, spans
    )
    return q, np.asarray(expected, np.float32)


@pytest.mark.parametrize("name", SHAPES)
def test_decode_sees_a_span_of_the_cache(kernel: Any, name: str):
    work = cached(SHAPES[name])
    q, expected = queries(work, np.arange(len(SPANS)))
    starts, ends = np.array(SPANS, np.int32).T
    step = DecodeRows(work.tables, jax.device_put(ends), 0, jax.device_put(starts))
    run = jax.jit(
        lambda q, kv_cache, step: kernel.decode(q, None, None, kv_cache, None, step, work.shape.scoring, work.sinks)
    )
    found, kv_cache = run(q, work.kv_cache, step)
    work.case.close(found, expected)
    same_cache(kv_cache, work.kv_cache)
    assert not expected[0].any() and not expected[3].any() and expected[1].any(), "0 without visible keys"


@pytest.mark.parametrize("name", SHAPES)
def test_all_queries_of_a_tile_see_the_same_span(kernel: Any, name: str):
    """Whatever the queries' positions, which are unrelated to those of the keys."""
    work = cached(SHAPES[name])
    rows = np.repeat(np.arange(len(SPANS)), QUERIES)
    q, expected = queries(work, rows)
    tiles, spans, token = [], [], 0
    for row, count in enumerate(QUERIES):
        for first in range(0, count, TILE):
            size = min(TILE, count - first)
            tiles.append((row, token, 70 + first, size))
            spans.append(SPANS[row])
            token += size
    unused = 3
    tiles, spans = (np.pad(np.array(a, np.int32), ((0, unused), (0, 0))) for a in (tiles, spans))
    step = PrefillTiles(*jax.device_put((work.tables, tiles, np.int32(len(tiles) - unused), spans)))
    run = jax.jit(
        lambda q, kv_cache, step: kernel.prefill(
            q, None, None, kv_cache, None, step, work.shape.scoring, work.sinks, tile=TILE
        )
    )
    found, kv_cache = run(q, work.kv_cache, step)
    work.case.close(found, expected)
    same_cache(kv_cache, work.kv_cache)
