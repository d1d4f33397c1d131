"""The delta rule in chunks and by single steps against the plain recurrence, one token after another."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.kernels.state import delta
from jaxinfer.kernels.state.delta import Tokens
from jaxinfer.kernels.state.slots import DecodeSlots, Segments

pytestmark = pytest.mark.slow

H, DK, DV, SLOTS = 2, 16, 12, 7
NOWHERE = 99
STRENGTHS = {"none": 0.0, "weak": 1e-3, "strong": 30.0, "mixed": None}
"""Of decay: what multiplies a token's log-decay of about 1; mixed: from e^-7 to e^4, each channel its own."""

_recurrence = jax.jit(delta.recurrence)
_prefill = {way: jax.jit(partial(delta.prefill, one_by_one=way)) for way in (True, False)}
_decode = {way: jax.jit(partial(delta.decode, one_by_one=way)) for way in (True, False)}
ways = pytest.mark.parametrize("one_by_one", [True, False], ids=["one by one", "at once"])


@cache
def tokens(count: int, strength: str = "mixed", per_head: bool = False, seed: int = 0) -> Tokens:
    """Random ones, NumPy."""
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
    """`[N, H, Dk, Dv]`, none of them like another."""
    return np.random.default_rng(1).normal(size=(SLOTS, H, DK, DV)).astype(np.float32)


def cut(made: Tokens, start: int, stop: int) -> Tokens:
    return Tokens(*(x[start:stop] for x in made))


def segments(rows: list[tuple[int, int, int, bool]], padding: int = 2) -> Segments:
    """Rows of (tokens, source, target, continues), one after another, and rows of padding that name a slot."""
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
def test_chunks_are_the_recurrence_over_thousands_of_tokens(one_by_one, strength, per_head):
    made = tokens(4096, strength, per_head)
    expected, last = _recurrence(made, states()[3])
    found, after = _prefill[one_by_one](made, states(), segments([(4096, 3, 5, False)]))
    close(found, expected)
    close(after[5], last)
    assert np.abs(expected).max() > 0.1 and np.isfinite(after).all()


def test_the_recurrence_forgets_as_it_is_told():
    made = tokens(20)
    kept, _ = _recurrence(made, states()[3])
    gone, _ = _recurrence(made._replace(g=np.full_like(made.g, -np.inf)), states()[3])
    alone, _ = _recurrence(made._replace(g=np.full_like(made.g, -np.inf)), 0 * states()[3])
    assert np.abs(kept - gone).max() > 0.1
    np.testing.assert_array_equal(gone, alone)
    q, k, v, _, beta = made
    np.testing.assert_allclose(gone, (q * k).sum(-1, keepdims=True) * beta * v, atol=1e-5)


@ways
def test_nothing_of_before_is_left_behind_a_decay_of_all(one_by_one):
    made = tokens(80)
    made = made._replace(g=np.where(np.arange(80)[:, None, None] == 50, -np.inf, made.g))
    expected, last = _recurrence(made, states()[3])
    found, after = _prefill[one_by_one](made, states(), segments([(80, 3, 3, False)]))
    close(found, expected)
    close(after[3], last)


MIXED = [(1, NOWHERE, 1, False), (32, 2, 2, False), (33, NOWHERE, NOWHERE, False), (7, 3, 4, False), (64, 5, 3, False)]
"""Of five sequences: a beginning, one that goes on in its slot, one that is thrown away, one that leaves its slot,
..."""


@ways
def test_sequences_side_by_side_are_as_each_alone(one_by_one):
    """Bit for bit: chunks are cut from each sequence's own start, whatever lies beside it."""
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
        # Alone, in a step of the same size, where it begins elsewhere.
        moved = jax.tree.map(lambda x, s=start: np.roll(x, -s, axis=0), made)
        alone, others = run(moved, states(), segments([(count, source, target, False)], padding=len(MIXED) + 1))
        np.testing.assert_array_equal(found[start : start + count], alone[:count])
        if target < SLOTS:
            close(after[target], last)
            np.testing.assert_array_equal(after[target], others[target])
            expected[target] = after[target]
        start += count
    np.testing.assert_array_equal(after, expected)  # slots that none names
    assert np.isfinite(found).all(), "padding is a number"


@ways
def test_a_cut_inside_a_sequence_leaves_its_state_there_and_changes_nothing_behind(one_by_one):
    made = tokens(100)
    whole, last = _recurrence(made, states()[2])
    _, middle = _recurrence(cut(made, 0, 48), states()[2])
    rows = [(48, 2, 4, False), (51, NOWHERE, 5, True), (1, NOWHERE, 2, True)]
    found, after = _prefill[one_by_one](made, states(), segments(rows))
    close(found, whole)
    close(after[4], middle)
    close(after[2], last)


@ways
def test_what_is_not_a_number_stays_in_its_sequence(one_by_one):
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
def test_decode_is_the_recurrence_and_padding_changes_no_state(one_by_one, per_head):
    sources, targets = np.array([3, NOWHERE, 0, 6], np.int32), np.array([1, NOWHERE, 0, 6], np.int32)
    made = tokens(4, per_head=per_head)
    made = jax.tree.map(lambda x: np.where(np.arange(4)[:, None, None] == 1, np.nan, x), made)
    found, after = _decode[one_by_one](made, states(), DecodeSlots(sources, targets))
    expected = states().copy()
    for row in (0, 2, 3):
        output, expected[targets[row]] = _recurrence(cut(made, row, row + 1), states()[sources[row]])
        close(found[row], output[0])
    close(after, expected)
    np.testing.assert_array_equal(np.delete(after, [0, 1, 6], 0), np.delete(states(), [0, 1, 6], 0))


def test_decode_writes_where_the_state_lies():
    run = jax.jit(partial(delta.decode, one_by_one=True), donate_argnums=1)
    made, given = tokens(4), jnp.array(states())
    compiled = run.lower(made, given, DecodeSlots(np.arange(4), np.arange(4))).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= given.nbytes
    assert compiled.memory_analysis().temp_size_in_bytes < given.nbytes
