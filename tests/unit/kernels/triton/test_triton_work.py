"""Inputs of the Triton attention kernel: work items from lengths, tiles from shapes."""

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.kernels.attention.paged import DecodeRows, PrefillTiles, Scoring
from jaxinfer.kernels.triton import triton_tiles, triton_work
from jaxinfer.kernels.triton.triton_tiles import Layout

BATCH = 8


@partial(jax.jit, static_argnames=("scoring", "items", "running", "block_n"))
def _work(rows: DecodeRows, scoring: Scoring, **sizes: int) -> tuple[jax.Array, jax.Array]:
    return triton_work.decode_work(rows, scoring, **sizes)


def work(
    lengths: Sequence[int], *, running: int, block_n: int = 16, window: int | None = None, chunked: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Compute work items and spans of a decode step."""
    items = triton_work.decode_items(len(lengths), 1 << 22, running, block_n)
    rows = DecodeRows(*jax.device_put((np.zeros((len(lengths), 1), np.int32), np.array(lengths, np.int32))))
    items, spans = _work(rows, Scoring(1.0, window, chunked=chunked), items=items, running=running, block_n=block_n)
    return np.asarray(items), np.asarray(spans)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(
    lengths=st.lists(st.integers(0, 200) | st.integers(0, 200_000), min_size=BATCH, max_size=BATCH),
    windowed=st.sampled_from([(None, False), (100, False), (100, True)]),
    running=st.sampled_from([1, 264]),
)
def test_the_pieces_are_all_live_keys_in_order(lengths: list[int], windowed: tuple[int | None, bool], running: int):
    window, chunked = windowed
    items, spans = work(lengths, window=window, chunked=chunked, running=running)
    assert (items[:, 3] == 1).sum() == spans[:, 1].sum(), "all pieces fit"
    for row, (length, (first, count)) in enumerate(zip(lengths, spans, strict=True)):
        own = items[first : first + count]
        assert (own[:, 0] == row).all() and (own[:, 2] == length - 1).all() and (own[:, 7] == (count > 1)).all()
        starts, ends = own[:, 4], own[:, 5]
        least = 0 if window is None else max(0, length - window)
        least = (length - 1) // 100 * 100 if chunked else least
        assert list(starts) == [least, *ends[:-1]][:count]
        assert (ends > starts).all() and (count == 0 if length == 0 else ends[-1] == length)


@pytest.mark.parametrize(
    ("lengths", "pieces"),
    [([1000], 63), ([100_000], 264), ([4096] * 64, 5), ([64] * 8, 4), ([2_000_000] * 1024, 1)],
    ids=["short", "one long sequence", "equal rows", "little", "a sum near the limit of int32"],
)
def test_pieces_fill_the_slots(lengths: list[int], pieces: int):
    _, spans = work(lengths, running=264)
    assert spans[0, 1] == pytest.approx(pieces, rel=0.1)


def test_prefill_items_are_in_reverse_order_and_the_rest_is_padding():
    # Two sequences: the second chunk starts at position 7, token 5; 3 padding tokens.
    tiles = np.array([[0, 0, 0, 4], [0, 4, 4, 1], [1, 5, 7, 4], [0, 0, 0, 0], [0, 0, 0, 0]], np.int32)
    step = PrefillTiles(*jax.device_put((np.zeros((2, 8), np.int32), tiles, np.int32(3))))
    items = triton_work.prefill_work(step, Scoring(1.0, window=3), tokens=12, tile=2)
    chunks = triton_work.prefill_work(step, Scoring(1.0, window=5, chunked=True), tokens=12, tile=2)
    assert np.asarray(chunks)[::-1, 4].tolist() == [0, 0, 5, 0, 0]
    # row, token, position, queries, first key, end, first key of the chunk, unused
    assert np.asarray(items)[::-1, :7].tolist() == [
        [0, 0, 0, 4, 0, 4, 0],
        [0, 4, 4, 1, 2, 5, 0],
        [1, 5, 7, 4, 5, 11, 7],
        [0, 9, 0, 2, 0, 0, 0],
        [0, 11, 0, 1, 0, 0, 0],
    ]


LAYERS = {
    "Llama 3 8B": (32, 8, 128, 128, False),
    "Gemma 2 9B": (16, 8, 256, 256, False),
    "Falcon 7B": (71, 1, 64, 64, False),
    "Phi 3 mini": (32, 32, 96, 96, False),
    "DeepSeek V3": (128, 1, 576, 512, True),
    "DeepSeek V3, not absorbed": (128, 128, 192, 128, False),
}


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_tiles_cover_the_layout_and_fit_the_device(name: str, decode: bool, itemsize: int):
    heads, kv_heads, dim, value_dim, latent = LAYERS[name]
    group = heads // kv_heads
    queries = 1 if decode else triton_tiles.tile(group, value_dim, itemsize)
    tiles = triton_tiles.tiling(Layout(heads, kv_heads, dim, value_dim, latent, itemsize, queries, decode))
    assert tiles.main + tiles.rest >= dim and tiles.value_columns >= value_dim
    assert tiles.main >= value_dim or not latent
    assert tiles.block_m >= queries * tiles.members and tiles.parts(group) * tiles.members >= group
    accumulated = tiles.block_m * (tiles.value_columns + tiles.block_n)
    assert accumulated / (32 * tiles.options.warps) <= 160, "of the 255 registers of a thread"
    read = tiles.block_n * (tiles.main + tiles.rest + (0 if latent else tiles.value_columns))
    assert 2 * read * itemsize <= 96 << 10, "of 227 KiB shared memory"
