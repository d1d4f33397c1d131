"""Triton attention, interpreted on the CPU, against the reference."""

from collections.abc import Iterator
from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.attention import CHUNKS, PLAIN, SHAPES, Case, Shape, same_cache
from support.interpret import interpreted

from jaxinfer.kernels.attention.triton_attention import TritonAttention
from jaxinfer.kernels.triton import triton_tiles
from jaxinfer.kernels.triton.triton_launch import Target

pytestmark = pytest.mark.slow

P = PLAIN.block
MORE_SHAPES = {
    "nothing is padded": Shape(heads=32, kv_heads=2, dim=16, block=16),
    "float16, heads that are no power of two": Shape(heads=15, kv_heads=3, dim=24, dtype="float16"),
    "more heads on one than a program has rows": Shape(heads=40, kv_heads=1),
    "keys in two parts": Shape(heads=2, kv_heads=1, dim=40, value_dim=20),
    "latent in two parts, sinks": Shape(heads=2, kv_heads=1, dim=40, value_dim=30, latent=True, sinks=True),
    "latent wider than the first part": Shape(heads=2, kv_heads=1, dim=40, value_dim=36, latent=True),
    "blocks of one": Shape(block=1, window=9),
    "chunks of more than a tile's keys": Shape(window=37, chunked=True),
    "fp8 codes of keys in two parts": Shape(heads=2, kv_heads=1, dim=40, value_dim=20, codes="fp8"),
}
ALL = SHAPES | MORE_SHAPES
NAMES = list(ALL)
"""Few cases: the interpreter takes about a second for each."""


@pytest.fixture(scope="module", autouse=True)
def attention() -> Iterator[type[TritonAttention]]:
    """Use small tiles: 16 keys per iteration in float32, 32 in 16 bits."""
    with interpreted() as patch:
        patch.setattr(triton_tiles, "TURN_BYTES", 2048)
        yield TritonAttention


def chunked(name: str, chunks: str) -> Case:
    return Case(ALL[name], [sum(chunk) for chunk in CHUNKS[chunks]], [count for _, count in CHUNKS[chunks]])


def check_decode(case: Case, *, cores: int, padding: int = 2) -> None:
    q, k, v, rows, positions = case.step(padding=padding)
    slots, step = case.slots(rows, positions), case.decode_rows(padding=padding)
    kernel, scoring = TritonAttention(Target(90, cores)), case.shape.scoring
    run = jax.jit(lambda *args: kernel.decode(*args, scoring, case.sinks))  # one program instead of one per operation
    found, kv_cache = run(q, k, v, case.kv_cache, slots, step)
    expected, expected_cache = case.expected(q, k, v, rows, positions)
    case.close(found, expected)
    same_cache(kv_cache, expected_cache, case.shape.wide)
    assert not np.asarray(found[len(found) - padding :], np.float32).any(), "padding gives 0"


def check_prefill(case: Case, *, tile: int, padding: int = 5) -> None:
    q, k, v, rows, positions = case.step(padding=padding)
    slots, step = case.slots(rows, positions), case.prefill_tiles(tile, padding=padding)
    kernel, scoring = TritonAttention(Target(90, 1)), case.shape.scoring
    run = jax.jit(lambda *args: kernel.prefill(*args, scoring, case.sinks, tile=tile))
    found, kv_cache = run(q, k, v, case.kv_cache, slots, step)
    expected, expected_cache = case.expected(q, k, v, rows, positions)
    case.close(found, expected)
    same_cache(kv_cache, expected_cache, case.shape.wide)


@pytest.mark.parametrize("name", NAMES)
def test_decode_equals_the_reference(name: str):
    """Rows of one and of several pieces beside a padding row whose table holds arbitrary ids."""
    lengths = [1, 2 * P, 17, 75]
    check_decode(Case(ALL[name], lengths, [1] * len(lengths)), cores=4, padding=1)


@pytest.mark.parametrize("cores", [1, 2, 64])
def test_decode_with_the_fewest_and_the_most_pieces(cores: int):
    case = Case(PLAIN, [80, 2, 49, 33], [1] * 4, width=23)
    check_decode(case, cores=cores, padding=1)


@pytest.mark.parametrize("name", NAMES)
def test_prefill_of_several_chunks_equals_the_reference(name: str):
    check_prefill(chunked(name, "several"), tile=4)


@pytest.mark.parametrize(
    ("chunks", "tile"),
    [(chunks, size) for chunks in CHUNKS for size in (32, 1)],
)
def test_prefill_in_tiles_of_any_size_equals_the_reference(chunks: str, tile: int):
    check_prefill(chunked("plain", chunks), tile=tile)


@pytest.mark.parametrize("tile", [8, 32])
def test_prefill_over_the_ends_of_chunks_equals_the_reference(tile: int):
    """Of a tile within a chunk the first keys are read without a mask, of one over its end with one."""
    chunks = [(20, 25), (70, 9), (36, 3)]
    shape = MORE_SHAPES["chunks of more than a tile's keys"]
    check_prefill(Case(shape, [sum(chunk) for chunk in chunks], [count for _, count in chunks]), tile=tile)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Draw a small attention layer."""
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 5), (2, 2), (3, 1), (1, 17)]))
    dim, latent = draw(st.sampled_from([4, 8, 16, 20, 40])), draw(st.booleans())
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    return Shape(
        heads=kv_heads * group,
        kv_heads=kv_heads,
        dim=dim,
        block=draw(st.sampled_from([1, 2, 3, 4, 8, 16, 32])),
        dtype=dtype,
        codes=None if dtype == "float16" else draw(st.sampled_from([None, "int8", "fp8"])),
        latent=latent,
        window=draw(st.none() | st.integers(1, 60)),
        chunked=draw(st.booleans()),
        softcap=draw(st.none() | st.just(2.0)),
        sinks=draw(st.booleans()),
        value_dim=draw(st.integers(1, dim)) if latent or draw(st.booleans()) else None,
    )


ANY = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)


@ANY
@given(shape=shapes(), lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4), cores=st.integers(1, 8))
def test_any_decode_equals_the_reference(shape: Shape, lengths: list[int], cores: int):
    check_decode(Case(shape, lengths, [1] * len(lengths)), cores=cores)


@ANY
@given(
    shape=shapes(),
    tile=st.sampled_from([1, 3, 8]),
    chunks=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=3),
)
def test_any_prefill_equals_the_reference(shape: Shape, chunks: list[tuple[int, int]], tile: int):
    check_prefill(Case(shape, [a + b for a, b in chunks], [b for _, b in chunks]), tile=tile)


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_nan_stays_in_its_row(kind: str):
    fresh = [1, 1, 1] if kind == "decode" else [2, 3, 2]
    case = Case(replace(PLAIN, sinks=True), [40, 37, 3], fresh)
    q, k, v, rows, positions = case.step()
    bad = np.zeros(q.shape[0], bool)
    bad[rows == 1] = True
    k = k.at[int(np.flatnonzero(bad)[0])].set(np.nan)
    kernel, scoring, slots = TritonAttention(Target(90, 8)), case.shape.scoring, case.slots(rows, positions)
    if kind == "decode":
        step, run = case.decode_rows(), lambda *args: kernel.decode(*args, scoring, case.sinks)[0]
    else:
        step, run = case.prefill_tiles(8), lambda *args: kernel.prefill(*args, scoring, case.sinks, tile=8)[0]
    found = np.asarray(jax.jit(run)(q, k, v, case.kv_cache, slots, step))
    assert np.isnan(found[bad]).all()
    assert np.isfinite(found[~bad]).all()
