"""The fast paths over a paged cache against the oracle, and the oracle against attention without a cache."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.functional import TILE, prefill_batch
from jaxinfer.kernels import paged_attention as paged
from jaxinfer.kernels.paged_attention import DecodeRows, Lane, PrefillTiles

D, P = 8, 4
HEADS = [(4, 4), (6, 2), (8, 1)]
"""Query heads and kv heads: one to one, groups of three, all on one."""
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


oracle = jax.jit(partial(paged.reference, scale=D**-0.5))


class Case:
    """Sequences of given lengths in a cache whose every other place is NaN."""

    def __init__(self, lengths, heads, kv_heads, dtype, *, width=None, seed=0):
        rng = np.random.default_rng(seed)
        self.lengths, self.heads, self.dtype = lengths, heads, jnp.dtype(dtype)
        width = width or max(1, -(-max(lengths) // P))
        self.blocks = len(lengths) * width + 3
        ids = rng.permutation(self.blocks)
        self.tables = np.zeros((len(lengths), width), np.int32)
        lanes = np.full((2, self.blocks, kv_heads, P, D), np.nan, np.float32)
        self.dense = []
        for row, length in enumerate(lengths):
            self.tables[row] = ids[row * width : (row + 1) * width]
            self.dense.append(rng.normal(size=(2, length, kv_heads, D)).astype(np.float32))
            for at in range(length):
                lanes[:, self.tables[row, at // P], :, at % P] = self.dense[row][:, at]
        self.lane = Lane(*lanes.astype(self.dtype))
        self.rng = rng

    def queries(self, count):
        return self.rng.normal(size=(count, self.heads, D)).astype(self.dtype)

    def close(self, found, expected):
        assert found.dtype == self.dtype
        np.testing.assert_allclose(
            np.asarray(found, np.float32), np.asarray(expected, np.float32), atol=TOLERANCE[self.dtype.name]
        )


def reference(case, q, rows, positions):
    return oracle(q, case.lane, case.tables, rows, positions)


def dense(case, q, row, position):
    """One query over its sequence's own keys and values, no cache, in float64."""
    keys, values = (np.repeat(a[: position + 1], case.heads // a.shape[1], axis=1) for a in case.dense[row])
    scores = np.einsum("hd,shd->hs", np.asarray(q, np.float64), keys) * D**-0.5
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("hs,shd->hd", weights / weights.sum(axis=-1, keepdims=True), values)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_the_oracle_is_attention_without_a_cache(heads, kv_heads):
    case = Case([1, 6, 9], heads, kv_heads, "float32")
    rows, positions = np.array([0, 1, 1, 2, 2, 0]), np.array([0, 5, 2, 8, 3, -1])
    q = case.queries(6)
    found = np.asarray(reference(case, q, rows, positions))
    for i in range(5):
        np.testing.assert_allclose(found[i], dense(case, q[i], rows[i], positions[i]), atol=1e-5)
    assert not found[5].any(), "padding gives 0"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize(
    ("width", "keys", "spare"),
    [pytest.param(None, paged.DECODE_KEYS, None, marks=pytest.mark.slow), (7, P, 0), (None, 2 * P + 1, 3)],
)
def test_decode_is_the_oracle(monkeypatch, dtype, heads, kv_heads, width, keys, spare):
    """Every length around the ends of blocks, and rows of padding whose tables name anything.

    In one piece a row or in several, with room for no more pieces than there are and with room to spare.
    """
    monkeypatch.setattr(paged, "DECODE_KEYS", keys)
    lengths = [1, P - 1, P, P + 1, 2 * P - 1, 2 * P, 2 * P + 1, 4 * P + 2]
    case = Case(lengths, heads, kv_heads, dtype, width=width)
    q = case.queries(len(lengths) + 2)
    tables = np.concatenate([case.tables, np.zeros((1, case.tables.shape[1]), np.int32), case.tables[:1]])
    rows = DecodeRows(tables, np.array([*lengths, 0, 0], np.int32))
    items = None if spare is None else sum(-(-n // paged.item_keys(P)) for n in lengths) + spare
    # A new function, as what was traced before read pieces of another size.
    found = jax.jit(lambda *args: paged.decode(*args, D**-0.5, items))(q, case.lane, rows)
    expected = reference(case, q[: len(lengths)], np.arange(len(lengths), dtype=np.int32), np.array(lengths) - 1)
    found = np.asarray(found)
    case.close(found[: len(lengths)], np.asarray(expected))
    assert not found[len(lengths) :].astype(np.float32).any(), "padding gives 0"


CHUNKS = {
    "one whole prompt": [(0, 11)],
    "one token": [(0, 1)],
    "the rest of a prompt": [(P + 1, 6)],
    "several": [(0, P), (0, P + 1), (2 * P, 1), (P - 1, 9), (3 * P, 2 * P)],
    "more than a tile": [(3, TILE + 5), (0, 2)],
    "exactly a tile": [(0, TILE), (1, TILE - 1), (2, TILE + 1)],
}


@pytest.mark.parametrize(
    ("chunks", "heads", "kv_heads", "dtype"),
    [(chunks, 6, 2, "float32") for chunks in CHUNKS]
    + [("several", *heads, dtype) for heads in HEADS for dtype in ("float32", "bfloat16")],
)
@pytest.mark.parametrize("keys", [pytest.param(paged.PREFILL_KEYS, marks=pytest.mark.slow), 2 * P])
def test_prefill_is_the_oracle(monkeypatch, dtype, heads, kv_heads, chunks, keys):
    """Chunks of several sequences beside padding tokens and padding rows; the online softmax in one part or in many."""
    monkeypatch.setattr(paged, "PREFILL_KEYS", keys)
    chunks = CHUNKS[chunks]
    case = Case([start + count for start, count in chunks], heads, kv_heads, dtype)
    tokens = sum(count for _, count in chunks)
    batch = prefill_batch(
        [(np.zeros(count, np.int32), start, 0) for start, count in chunks], case.tables, tokens=tokens + 5,
        rows=len(chunks) + 2,
    )  # fmt: skip
    q = case.queries(tokens + 5)
    step = PrefillTiles(batch.tables, batch.tiles, batch.count)
    found = jax.jit(lambda *args: paged.prefill(*args, scale=D**-0.5, tile=TILE))(q, case.lane, step)
    expected = reference(case, q, batch.rows, batch.positions)
    found, expected = np.asarray(found), np.asarray(expected)
    case.close(found[:tokens], expected[:tokens])
    assert np.isfinite(np.asarray(found, np.float32)).all(), "padding is a number"


def test_writes_of_padding_are_dropped():
    lane = Lane(jnp.zeros((3, 2, P, D)), jnp.zeros((3, 2, P, D)))
    ones = jnp.ones((4, 2, D))
    written = paged.write(lane, ones, 2 * ones, jnp.array([0, 2, 3, 7]), jnp.array([1, 3, 0, 2]))
    for lane, value in zip(written, (1, 2), strict=True):
        assert (lane[0, :, 1] == value).all() and (lane[2, :, 3] == value).all()
        assert lane.sum() == value * 2 * 2 * D
