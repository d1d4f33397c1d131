"""XLA attention over a paged cache against the reference, and the reference against attention without a cache."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from support.attention import CHUNKS, PLAIN, SHAPES, Case, same_cache

from jaxinfer.kernels.attention import paged, xla_attention
from jaxinfer.kernels.attention.paged import KVCache, Slots
from jaxinfer.kernels.attention.xla_attention import TILE

P = PLAIN.block


def dense(case: Case, q: np.ndarray, row: int, position: int) -> np.ndarray:
    """Attend with one query to its sequence's keys and values, without a cache, in float64."""
    shape = case.shape
    first = shape.first_key(position)
    own = [np.repeat(a[first : position + 1], shape.heads // shape.kv_heads, axis=1) for a in case.dense[row]]
    own = own if shape.codes is None else [rounded(a, shape.codes) for a in own]
    keys, values = own[0], own[0][..., : shape.value_dim] if shape.latent else own[1]
    scores = np.einsum("hd,shd->hs", np.asarray(q, np.float64), keys) * shape.dim**-0.5
    if shape.softcap:
        scores = shape.softcap * np.tanh(scores / shape.softcap)
    weights = np.exp(scores)
    total = weights.sum(axis=-1, keepdims=True)
    if shape.sinks:
        total = total + np.exp(np.asarray(case.sinks, np.float64))[:, None]
    return np.einsum("hs,shd->hd", weights / total, values)


def rounded(x: np.ndarray, codes: str) -> np.ndarray:
    """Round `[..., D]` to one byte an element, with a bfloat16 scale for each vector of D, in NumPy."""
    dtype, largest = {"int8": (np.int8, 127), "fp8": (ml_dtypes.float8_e4m3fn, 448)}[codes]
    scales = (np.abs(x).max(axis=-1, keepdims=True) / largest).astype(ml_dtypes.bfloat16).astype(np.float64)
    return (np.rint(x / scales) if codes == "int8" else x / scales).astype(dtype).astype(np.float64) * scales


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape.dtype != "bfloat16"])
def test_the_reference_equals_attention_without_a_cache(name: str):
    case = Case(SHAPES[name], [1, 6, 9], [1, 4, 3])
    q, k, v, rows, positions = case.step(padding=1)
    found, _ = case.expected(q, k, v, rows, positions)
    for i in range(len(rows) - 1):
        np.testing.assert_allclose(found[i], dense(case, q[i], rows[i], positions[i]), atol=1e-5)
    assert not found[-1].any(), "padding gives 0"


@pytest.mark.parametrize(
    ("name", "width", "keys", "spare"),
    [("plain", None, xla_attention.DECODE_KEYS, None), ("plain", None, 2 * P + 1, 3), ("window", None, 2 * P + 1, 3)]
    + [(name, 7, P, 0) for name in SHAPES],
)
def test_decode_equals_the_reference(monkeypatch: pytest.MonkeyPatch, name: str, width, keys, spare):
    """Lengths around block boundaries, and padding rows whose tables hold arbitrary ids.

    With one or several pieces per row, with exactly enough room for pieces and with spare room.
    """
    monkeypatch.setattr(xla_attention, "DECODE_KEYS", keys)
    shape = SHAPES[name]
    lengths = [1, P - 1, P, P + 1, 2 * P - 1, 2 * P, 2 * P + 1, 4 * P + 2]
    case = Case(shape, lengths, [1] * len(lengths), width=width)
    q, k, v, rows, positions = case.step(padding=2)
    seen = [n - shape.first_key(n - 1) // P * P for n in lengths]
    items = None if spare is None else sum(-(-n // xla_attention.item_keys(P)) for n in seen) + spare
    # A new function, as cached traces used another piece size.
    run = jax.jit(lambda *args: xla_attention.decode(*args, shape.scoring, case.sinks, items=items))
    found, kv_cache = run(q, k, v, case.kv_cache, case.slots(rows, positions), case.decode_rows(padding=2))
    expected, expected_cache = case.expected(q, k, v, rows, positions)
    case.close(found, expected)
    same_cache(kv_cache, expected_cache, case.shape.wide)
    assert not np.asarray(found[-2:], np.float32).any(), "padding gives 0"


@pytest.mark.parametrize(
    ("chunks", "name", "keys"),
    [(chunks, "plain", 2 * P) for chunks in CHUNKS]
    + [("several", name, 2 * P) for name in SHAPES if name != "plain"]
    + [("several", "plain", xla_attention.PREFILL_KEYS), ("several", "window", xla_attention.PREFILL_KEYS)],
)
def test_prefill_equals_the_reference(monkeypatch: pytest.MonkeyPatch, chunks: str, name: str, keys: int):
    """Chunks of several sequences beside padding tokens and rows; the online softmax in one or many parts."""
    monkeypatch.setattr(xla_attention, "PREFILL_KEYS", keys)
    shape = SHAPES[name]
    case = Case(shape, [start + count for start, count in CHUNKS[chunks]], [count for _, count in CHUNKS[chunks]])
    q, k, v, rows, positions = case.step(padding=5)
    run = jax.jit(lambda *args: xla_attention.prefill(*args, shape.scoring, case.sinks, tile=TILE))
    found, kv_cache = run(q, k, v, case.kv_cache, case.slots(rows, positions), case.prefill_tiles(TILE, padding=5))
    expected, expected_cache = case.expected(q, k, v, rows, positions)
    case.close(found[:-5], expected[:-5])
    same_cache(kv_cache, expected_cache, case.shape.wide)
    assert np.isfinite(np.asarray(found, np.float32)).all(), "padding must be finite"


def test_writes_of_padding_are_dropped():
    empty, ones = jnp.zeros((3, 2, P, 8)), jnp.ones((4, 2, 8))
    slots = Slots(jnp.array([0, 2, 3, 7]), jnp.array([1, 3, 0, 2]))
    written = paged.write(KVCache(empty, empty), ones, 2 * ones, slots)
    for array, value in zip(written[:2], (1, 2), strict=True):
        assert (array[0, :, 1] == value).all() and (array[2, :, 3] == value).all()
        assert array.sum() == value * 2 * 2 * 8
