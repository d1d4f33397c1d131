"""Delta rule in chunks and single steps against the plain token-by-token recurrence."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.kernels.state import delta, delta_chunks
from jaxinfer.kernels.state.delta import Tokens
from jaxinfer.kernels.state.slots import DecodeSlots, Segments

pytestmark = pytest.mark.slow

H, DK, DV, SLOTS = 2, 16, 12, 7
NO_SLOT = 99
STRENGTHS = {"none": 0.0, "weak": 1e-3, "strong": 30.0, "mixed": None}
"""Decay strengths: multipliers of log-decays of about 1; mixed: e^-7 to e^4, a different one per channel."""

_recurrence = jax.jit(delta.recurrence)
_prefill = {way: jax.jit(partial(delta_chunks.prefill, one_by_one=way)) for way in (True, False)}
_decode = {way: jax.jit(partial(delta.decode, one_by_one=way)) for way in (True, False)}
ways = pytest.mark.parametrize("one_by_one", [True, False], ids=["one by one", "at once"])


@cache
def tokens(count: int, strength: str = "mixed", per_head: bool = False, seed: int = 0) -> Tokens:
    """Make random tokens in NumPy."""
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(2, count, H, DK))
    v = rng.normal(size=(count, H, DV))
    g = np.log1p(np.exp(rng.normal(size=(count, H, 1 if per_head else DK))))
    scale = STRENGTHS[strength]
    g = -g * (np.exp(rng.uniform(-7, 4, size=g.shape)) if scale is None else scale)
    beta = rng.uniform(size=(count, H, 1))
    made = (*(x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k)), v, g, beta)
    return Tokens(*(x.astype(np.float32) for x in made))


@cache
def states() -> np.ndarray:
    """Make distinct states `[N, H, Dk, Dv]`."""
    return np.random.default_rng(1).normal(size=(SLOTS, H, DK, DV)).astype(np.float32)


def cut(made: Tokens, start: int, stop: int) -> Tokens:
    return Tokens(*(x[start:stop] for x in made))


def segments(rows: list[tuple[int, int, int, bool]], padding: int = 2) -> Segments:
    """Make segments of rows (tokens, source, target, continues), followed by padding rows with slot ids."""
    counts = np.array([row[0] for row in rows] + [0] * padding)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    sources, targets = ([row[i] for row in rows] + [0] * padding for i in (1, 2))
    continues = [row[3] for row in rows] + [False] * padding
    return Segments(*(np.array(x, np.int32) for x in (starts, counts, sources, targets)), np.array(continues))


def close(found, expected) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("per_head", [False, True], ids=["channels", "heads"])
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("one_by_one", [True, False], ids=["one by one", "at once"])
def test_chunks_equal_the_recurrence_over_thousands_of_tokens(one_by_one, strength, per_head):
    made = tokens(4096, strength, per_head)
    expected, last = _recurrence(made, states()[3])
    found, after = _prefill[one_by_one](made, states(), segments([(4096, 3, 5, False)]))
    close(found, expected)
    close(after[5], last)
    assert np.abs(expected).max() > 0.1 and np.isfinite(after).all()


def test_the_recurrence_applies_decay_and_updates():
    made = tokens(20)
    kept, _ = _recurrence(made, states()[3])
    gone, _ = _recurrence(made._replace(g=np.full_like(made.g, -np.inf)), states()[3])
    alone, _ = _recurrence(made._replace(g=np.full_like(made.g, -np.inf)), 0 * states()[3])
    assert np.abs(kept - gone).max() > 0.1
    np.testing.assert_array_equal(gone, alone)
    q, k, v, _, beta = made
    np.testing.assert_allclose(gone, (q * k).sum(-1, keepdims=True) * beta * v, atol=1e-5)


@ways
def test_a_full_decay_clears_the_state(one_by_one):
    made = tokens(80)
    made = made._replace(g=np.where(np.arange(80)[:, None, None] == 50, -np.inf, made.g))
    expected, last = _recurrence(made, states()[3])
    found, after = _prefill[one_by_one](made, states(), segments([(80, 3, 3, False)]))
    close(found, expected)
    close(after[3], last)


MIXED = [(1, NO_SLOT, 1, False), (32, 2, 2, False), (33, NO_SLOT, NO_SLOT, False), (7, 3, 4, False), (64, 5, 3, False)]
"""Five sequences: a new one, one continued in place, one whose state is dropped, one written to another slot, ..."""


@ways
def test_batched_sequences_equal_each_alone(one_by_one):
    """Bit for bit, as chunks are aligned to each sequence's own start."""
    total = sum(row[0] for row in MIXED)
    made = tokens(total + 23)
    run = _prefill[one_by_one]
    found, after = run(made, states(), segments(MIXED))
    expected, start = states().copy(), 0
    for count, source, target, _ in MIXED:
        own = cut(made, start, start + count)
        begin = states()[source] if source < SLOTS else np.zeros((H, DK, DV), np.float32)
        outputs, last = _recurrence(own, begin)
        close(found[start : start + count], outputs)
        # Alone, in a step of the same size, at another offset.
        moved = jax.tree.map(lambda x, s=start: np.roll(x, -s, axis=0), made)
        alone, others = run(moved, states(), segments([(count, source, target, False)], padding=len(MIXED) + 1))
        np.testing.assert_array_equal(found[start : start + count], alone[:count])
        if target < SLOTS:
            close(after[target], last)
            np.testing.assert_array_equal(after[target], others[target])
            expected[target] = after[target]
        start += count
    np.testing.assert_array_equal(after, expected)  # unused slots
    assert np.isfinite(found).all(), "padding must be finite"


@ways
def test_a_cut_saves_the_state_and_changes_no_later_output(one_by_one):
    made = tokens(100)
    whole, last = _recurrence(made, states()[2])
    _, middle = _recurrence(cut(made, 0, 48), states()[2])
    rows = [(48, 2, 4, False), (51, NO_SLOT, 5, True), (1, NO_SLOT, 2, True)]
    found, after = _prefill[one_by_one](made, states(), segments(rows))
    close(found, whole)
    close(after[4], middle)
    close(after[2], last)


@ways
def test_nan_stays_in_its_sequence(one_by_one):
    made = tokens(160)
    rows = [(20, 1, 1, False), (30, 2, 2, False), (70, 3, 3, False)]
    whole, whole_after = _prefill[one_by_one](made, states(), segments(rows))
    broken = Tokens(*(np.array(x) for x in made))
    broken.v[25] = np.nan  # the second sequence
    for x in broken:
        x[120:] = np.nan  # padding
    found, after = _prefill[one_by_one](broken, states(), segments(rows))
    assert np.isnan(found[25:50]).all() and np.isnan(after[2]).all()
    own = np.r_[0:20, 50:120]
    np.testing.assert_array_equal(found[own], whole[own])
    np.testing.assert_array_equal(np.delete(after, 2, 0), np.delete(whole_after, 2, 0))


@pytest.mark.parametrize("per_head", [False, True], ids=["channels", "heads"])
@ways
def test_decode_equals_the_recurrence_and_padding_changes_no_state(one_by_one, per_head):
    sources, targets = np.array([3, NO_SLOT, 0, 6], np.int32), np.array([1, NO_SLOT, 0, 6], np.int32)
    made = tokens(4, per_head=per_head)
    made = jax.tree.map(lambda x: np.where(np.arange(4)[:, None, None] == 1, np.nan, x), made)
    found, after = _decode[one_by_one](made, states(), DecodeSlots(sources, targets))
    expected = states().copy()
    for row in (0, 2, 3):
        output, expected[targets[row]] = _recurrence(cut(made, row, row + 1), states()[sources[row]])
        close(found[row], output[0])
    close(after, expected)
    np.testing.assert_array_equal(np.delete(after, [0, 1, 6], 0), np.delete(states(), [0, 1, 6], 0))


def test_decode_writes_the_state_in_place():
    run = jax.jit(partial(delta.decode, one_by_one=True), donate_argnums=1)
    made, given = tokens(4), jnp.array(states())
    compiled = run.lower(made, given, DecodeSlots(np.arange(4), np.arange(4))).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= given.nbytes
    assert compiled.memory_analysis().temp_size_in_bytes < given.nbytes
