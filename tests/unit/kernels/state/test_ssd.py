"""Mamba-2's recurrence in chunks, in single steps and as interpreted Triton kernels against its definition."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.interpret import interpreted

from jaxinfer.kernels.state import ssd, triton_ssd
from jaxinfer.kernels.state.slots import DecodeSlots, FullSequences, Segments
from jaxinfer.kernels.state.ssd import Tokens
from jaxinfer.kernels.triton.triton_launch import Target

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("triton")]

G, H, DK, DV, SLOTS, NONE = 2, 4, 40, 20, 7, 77
"""Sizes that fill no tile, keys in both halves of the kernel, two heads a group; NONE: a slot id out of range."""
STRENGTHS = {"none": 0.0, "weak": 1e-3, "strong": 30.0, "mixed": None}
"""Decay strengths: multipliers of log-decays of about 1; mixed: e^-7 to e^4."""
TARGET = Target(90, 4)
PREFILL: dict[str, Callable[..., Any]] = {
    "one by one": partial(ssd.prefill, one_by_one=True),
    "at once": partial(ssd.prefill, one_by_one=False),
    "steps": partial(ssd.prefill_steps, one_by_one=True),
    "triton": partial(triton_ssd.prefill, target=TARGET),
    "triton steps": partial(triton_ssd.prefill_steps, target=TARGET),
}
DECODE: dict[str, Callable[..., Any]] = {
    "one by one": partial(ssd.decode, one_by_one=True),
    "at once": partial(ssd.decode, one_by_one=False),
    "triton": partial(triton_ssd.decode, target=TARGET),
}
CHUNKS = ["one by one", "at once"]


def run(way: str, ways: dict[str, Callable[..., Any]], *operands: Any) -> tuple[np.ndarray, np.ndarray]:
    with interpreted() if way.startswith("triton") else nullcontext():
        return jax.tree.map(np.asarray, _jitted(way, way in DECODE and ways is DECODE)(*operands))


@cache
def _jitted(way: str, decode: bool) -> Callable[..., Any]:
    return jax.jit((DECODE if decode else PREFILL)[way])


@cache
def tokens(count: int, strength: str = "mixed") -> Tokens:
    """Make random tokens; keys are of unit length, so that states stay of order one."""
    rng = np.random.default_rng(count)
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in rng.normal(size=(2, count, G, DK)))
    g, scale = np.log1p(np.exp(rng.normal(size=(count, H, 1)))), STRENGTHS[strength]
    g = -g * (np.exp(rng.uniform(-7, 4, size=g.shape)) if scale is None else scale)
    return Tokens(*(x.astype(np.float32) for x in (q, k, rng.normal(size=(count, H, DV)), g)))


STATES = np.random.default_rng(1).normal(size=(SLOTS, H, DK, DV)).astype(np.float32)


def definition(made: Tokens, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute outputs and the final state in float64, token by token."""
    q, k, v, g = (x.astype(np.float64) for x in made)
    q, k = (np.repeat(x, H // G, axis=1) for x in (q, k))
    state, outputs = state.astype(np.float64), np.zeros(v.shape)
    for at in range(len(v)):
        state = np.exp(g[at])[..., None] * state + k[at][..., None] * v[at][:, None]
        outputs[at] = np.einsum("hkv,hk->hv", state, q[at])
    return outputs, state


def cut(made: Tokens, start: int, stop: int) -> Tokens:
    return Tokens(*(x[start:stop] for x in made))


def segments(rows: list[tuple[int, int, int, bool]], padding: int = 2) -> Segments:
    """Make segments of rows (tokens, source, target, continues), followed by padding rows with slot ids."""
    counts = np.array([row[0] for row in rows] + [0] * padding)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    sources, targets = ([row[i] for row in rows] + [0] * padding for i in (1, 2))
    continues = [row[3] for row in rows] + [False] * padding
    return Segments(*(np.array(x, np.int32) for x in (starts, counts, sources, targets)), np.array(continues))


MIXED = [(1, NONE, 1, False), (32, 2, 2, False), (33, NONE, NONE, False), (7, 3, 4, False), (40, 5, 3, False)]
"""A new sequence, one continued in place, one whose state is dropped, one written to another slot, a longer one."""
CUT = [(20, 2, 4, False), (33, NONE, 5, True), (0, NONE, 0, False), (9, 1, 1, False), (1, 0, 2, True)]
"""A sequence whose state is kept within a chunk, an empty one, and one more that is cut."""


def expected(made: Tokens, rows: list[tuple[int, int, int, bool]]) -> tuple[np.ndarray, np.ndarray]:
    outputs, after, at, state = np.zeros(made.v.shape), STATES.astype(np.float64), 0, None
    for count, source, target, continues in rows:
        if not continues:
            state = STATES[source] if source < SLOTS else np.zeros(STATES.shape[1:])
        outputs[at : at + count], state = definition(cut(made, at, at + count), state)
        at += count
        if target < SLOTS and count:
            after[target] = state
    return outputs, after


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("way", CHUNKS)
def test_chunks_equal_the_definition_over_thousands_of_tokens(way, strength):
    made = tokens(2048, strength)
    wanted, last = definition(made, STATES[3])
    found, after = run(way, PREFILL, made, STATES, segments([(2048, 3, 5, False)]))
    # Without a decay the state grows with the square root of the tokens, and rounding with it.
    scale = max(1, np.abs(last).max())
    close(found / scale, wanted / scale)
    close(after[5] / scale, last / scale)
    assert np.abs(wanted).max() > 0.1


@pytest.mark.parametrize("rows", [MIXED, CUT], ids=["mixed", "cut"])
@pytest.mark.parametrize("way", PREFILL)
def test_segments_equal_the_definition(way, rows):
    total = sum(row[0] for row in rows)
    made = tokens(total + 5)
    found, after = run(way, PREFILL, made, STATES, segments(rows))
    outputs, states = expected(made, rows)
    close(found[:total], outputs[:total])
    close(after, states)
    assert np.isfinite(found).all(), "padding must be finite"


@pytest.mark.parametrize("way", PREFILL)
def test_nan_stays_in_its_sequence(way):
    made, rows = tokens(60), [(5, 1, 1, False), (37, 2, 2, False), (3, 3, 3, False)]
    whole, whole_after = run(way, PREFILL, made, STATES, segments(rows))
    broken = Tokens(*(x.copy() for x in made))
    broken.v[12] = np.nan
    for x in broken:
        x[45:] = np.nan  # padding
    found, after = run(way, PREFILL, broken, STATES, segments(rows))
    assert np.isnan(found[12:42]).all() and np.isnan(after[2]).all()
    own = np.r_[0:5, 42:45]
    np.testing.assert_array_equal(found[own], whole[own])
    np.testing.assert_array_equal(np.delete(after, 2, 0), np.delete(whole_after, 2, 0))


@pytest.mark.parametrize("way", ["steps", "triton steps"])
def test_single_steps_have_the_same_bits_wherever_they_are_cut(way):
    made = tokens(20)
    whole, whole_after = run(way, PREFILL, made, STATES, segments([(20, 1, 1, False)]))
    parts, parts_after = run(way, PREFILL, made, STATES, segments([(13, 1, 3, False), (7, NONE, 1, True)]))
    np.testing.assert_array_equal(whole, parts)
    np.testing.assert_array_equal(whole_after[1], parts_after[1])


@pytest.mark.parametrize("way", DECODE)
def test_decode_equals_the_definition_and_padding_changes_no_state(way):
    made = jax.tree.map(lambda x: np.where(np.arange(4)[:, None, None] == 1, np.nan, x), tokens(4))
    sources, targets = np.array([3, NONE, 0, 6], np.int32), np.array([1, NONE, 0, 6], np.int32)
    found, after = run(way, DECODE, made, STATES, DecodeSlots(sources, targets))
    wanted = STATES.astype(np.float64)
    for row in (0, 2, 3):
        output, wanted[targets[row]] = definition(cut(made, row, row + 1), STATES[sources[row]])
        close(found[row], output[0])
    close(after, wanted)


def test_whole_sequences_equal_the_definition_and_have_a_gradient():
    made, rows, zero = tokens(90), FullSequences(45), np.zeros_like(STATES[0])

    @jax.jit
    def whole(values: jax.Array) -> jax.Array:
        own = jax.tree.map(jnp.asarray, made._replace(v=values))
        return ssd.full_sequences(own, jnp.asarray(STATES), rows, one_by_one=True)[0]

    @jax.jit
    def plain(values: jax.Array) -> jax.Array:
        own = Tokens(*(jnp.asarray(x)[:45] for x in made._replace(v=values)))
        return ssd.recurrence(own, jnp.asarray(zero))[0]

    found = whole(made.v)
    for start in (0, 45):
        close(found[start : start + 45], definition(cut(made, start, start + 45), zero)[0])
    gradients = [jax.jit(jax.grad(lambda v, run=run: jnp.sum(jnp.sin(run(v)[:45]))))(made.v) for run in (whole, plain)]
    np.testing.assert_allclose(*gradients, atol=1e-4)


def test_decode_writes_the_state_in_place():
    """Two states at most beside those of all slots: one that is read, one that is written."""
    shape = jax.ShapeDtypeStruct
    given = Tokens(*(shape((4, *own), jnp.float32) for own in ((1, 64), (1, 64), (8, 32), (8, 1))))
    states, slots = shape((32, 8, 64, 32), jnp.float32), shape((4,), jnp.int32)
    compiled = jax.jit(DECODE["one by one"], donate_argnums=1).lower(given, states, DecodeSlots(slots, slots)).compile()
    state = 4 * 8 * 64 * 32
    assert compiled.memory_analysis().alias_size_in_bytes >= 32 * state
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * state
