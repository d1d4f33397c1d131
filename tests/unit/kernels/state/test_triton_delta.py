"""The Triton kernels of the delta rule, interpreted on the CPU, against the plain recurrence."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.interpret import interpreted

from jaxinfer.kernels.state import delta, triton_delta
from jaxinfer.kernels.state.delta import Tokens
from jaxinfer.kernels.state.slots import DecodeSlots, Segments
from jaxinfer.kernels.triton.triton_launch import Target

pytestmark = [pytest.mark.xdist_group("triton"), pytest.mark.slow]

TARGET, SLOTS, NONE = Target(90, 4), 6, 77
"""NONE: a slot id out of range."""
WAYS = {"chunks": triton_delta.prefill, "steps": triton_delta.prefill_steps}


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    with interpreted():
        yield


class Case:
    """Random tokens and states of a layer; `decays` is one for each head or one for each key channel."""

    def __init__(self, count: int, heads: int = 2, key_dim: int = 24, value_dim: int = 12, per_head: bool = False):
        rng = np.random.default_rng(count)  # 24 keys are in both halves of the kernel
        q, k = rng.normal(size=(2, count, heads, key_dim))
        decays = (count, heads, 1 if per_head else key_dim)
        # From none to a full one.
        g = -np.exp(rng.uniform(-7, 5, size=decays)) * (rng.uniform(size=decays) < 0.9)
        g[rng.uniform(size=decays) < 0.02] = -np.inf
        arrays = (
            *(x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k)),
            rng.normal(size=(count, heads, value_dim)),
            g,
            rng.uniform(size=(count, heads, 1)),
        )
        self.tokens = Tokens(*(x.astype(np.float32) for x in arrays))
        self.states = rng.normal(size=(SLOTS, heads, key_dim, value_dim)).astype(np.float32)

    def expected(self, rows: list[tuple[int, int, int, bool]]) -> tuple[np.ndarray, np.ndarray]:
        """Outputs and states after rows of (tokens, source, target, continues) by the recurrence, one token at a time.

        In float64, as the kernels' own rounding is to be seen.
        """
        outputs, after = np.zeros(self.tokens.v.shape), self.states.astype(np.float64)
        at, state = 0, None
        for count, source, target, continues in rows:
            if not continues:
                state = self.states[source].astype(np.float64) if source < SLOTS else np.zeros(self.states.shape[1:])
            for place in range(at, at + count):
                q, k, v, g, beta = (x[place].astype(np.float64) for x in self.tokens)
                state = state * np.exp(g)[..., None]
                update = beta * (v - np.einsum("hkv,hk->hv", state, k))
                state = state + k[..., None] * update[:, None]
                outputs[place] = np.einsum("hkv,hk->hv", state, q)
            at += count
            if target < SLOTS and count:
                after[target] = state
        return outputs, after


def segments(rows: list[tuple[int, int, int, bool]], padding: int = 2) -> Segments:
    counts = [row[0] for row in rows] + [0] * padding
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    sources, targets = ([row[i] for row in rows] + [0] * padding for i in (1, 2))
    continues = np.array([row[3] for row in rows] + [False] * padding)
    return Segments(*(np.array(x, np.int32) for x in (starts, counts, sources, targets)), continues)


def check(way: str, case: Case, rows: list[tuple[int, int, int, bool]]) -> None:
    found, after = jax.jit(partial(WAYS[way], target=TARGET))(case.tokens, case.states, segments(rows))
    outputs, states = case.expected(rows)
    np.testing.assert_allclose(found, outputs, rtol=0, atol=1e-5)  # of padding, too: zeros
    np.testing.assert_allclose(after, states, rtol=0, atol=1e-5)


MIXED = [(1, NONE, 1, False), (16, 2, 2, False), (19, NONE, NONE, False), (7, 3, 4, False), (40, 5, 3, False)]
"""A new sequence, one continued in place, one whose state is dropped, one written to another slot, a longer one."""
CUT = [(20, 2, 4, False), (33, NONE, 5, True), (0, NONE, 0, False), (9, 1, 1, False), (1, 0, 2, True)]
"""A sequence whose state is kept within a chunk, an empty one, and one more that is cut."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("rows", "per_head"), [(MIXED, False), (CUT, True)], ids=["channels", "heads, cut"])
def test_segments_equal_the_recurrence(way: str, rows: list[tuple[int, int, int, bool]], per_head: bool):
    check(way, Case(sum(row[0] for row in rows) + 5, per_head=per_head), rows)


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None)
@given(
    heads=st.integers(1, 2),
    dims=st.tuples(st.sampled_from([4, 8, 24, 40]), st.sampled_from([4, 16, 36, 72])),
    per_head=st.booleans(),
    counts=st.lists(st.tuples(st.integers(0, 24), st.booleans()), min_size=1, max_size=4),
    way=st.sampled_from(list(WAYS)),
)
def test_any_shape_equals_the_recurrence(heads, dims, per_head, counts, way):
    rows = []
    for number, (count, continues) in enumerate(counts):
        # No two rows have one slot.
        rows.append((count, number, number, continues and number > 0))
    total = sum(row[0] for row in rows)
    check(way, Case(total + 3, heads, *dims, per_head), rows)


@pytest.mark.parametrize("way", WAYS)
def test_nan_stays_in_its_sequence(way: str):
    case, rows = Case(30, heads=1), [(5, 1, 1, False), (17, 2, 2, False), (3, 3, 3, False)]
    run = jax.jit(partial(WAYS[way], target=TARGET))
    whole, whole_after = run(case.tokens, case.states, segments(rows))
    broken = Tokens(*(x.copy() for x in case.tokens))
    broken.v[12] = np.nan
    for x in broken:
        x[25:] = np.nan  # padding
    found, after = run(broken, case.states, segments(rows))
    assert np.isnan(found[12:22]).all() and np.isnan(after[2]).all()
    np.testing.assert_array_equal(np.delete(found, np.s_[5:22], 0), np.delete(whole, np.s_[5:22], 0))
    np.testing.assert_array_equal(np.delete(after, 2, 0), np.delete(whole_after, 2, 0))


def test_a_step_token_by_token_has_the_same_bits_wherever_it_is_cut():
    case, run = Case(20, heads=1), jax.jit(partial(triton_delta.prefill_steps, target=TARGET))
    whole, whole_after = run(case.tokens, case.states, segments([(20, 1, 1, False)]))
    cut, cut_after = run(case.tokens, case.states, segments([(13, 1, 3, False), (7, NONE, 1, True)]))
    np.testing.assert_array_equal(whole, cut)
    np.testing.assert_array_equal(whole_after[1], cut_after[1])


@pytest.mark.parametrize("per_head", [False, True], ids=["channels", "heads"])
def test_decode_equals_the_recurrence_and_padding_changes_no_state(per_head: bool):
    case = Case(4, per_head=per_head)
    sources, targets = np.array([3, NONE, 0, 5], np.int32), np.array([1, NONE, 0, 5], np.int32)
    run = jax.jit(partial(triton_delta.decode, target=TARGET))
    found, after = run(case.tokens, case.states, DecodeSlots(sources, targets))
    outputs, states = case.expected([(1, int(s), int(t), False) for s, t in zip(sources, targets, strict=True)])
    outputs[1] = 0
    np.testing.assert_allclose(found, outputs, rtol=0, atol=1e-5)
    np.testing.assert_allclose(after, states, rtol=0, atol=1e-5)


def test_the_oracle_is_the_recurrence_of_the_layers():
    case = Case(30)
    outputs, after = case.expected([(30, 1, 1, False)])
    found, last = delta.recurrence(jax.tree.map(jnp.asarray, case.tokens), jnp.asarray(case.states[1]))
    np.testing.assert_allclose(found, outputs, atol=1e-5)
    np.testing.assert_allclose(last, after[1], atol=1e-5)
