"""The sampler against a NumPy implementation that handles one row at a time."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.engine.sampling import drawing
from jaxinfer.engine.sampling.drawing import BAD_TOKEN, BLOCK, exponential, token_bits
from jaxinfer.engine.sampling.sampler import Edits, logprobs, reported, sample
from jaxinfer.engine.sampling.sampling_rows import Level, SamplingRows, pack_rows, unpack_rows
from jaxinfer.sampling_params import MAX_NGRAM

V, R, L = 40, 64, 24
MARGIN = 1e-4
"""Rows in which a filter decides by less than this are skipped, as float32 may decide differently."""

step = jax.jit(sample, static_argnums=3, static_argnames="switched")


def rows(batch: int, **values) -> SamplingRows:
    """Rows with neutral parameters except these; each row has its own key."""
    fields = dict(
        row=np.arange(batch),
        position=np.full(batch, 10),
        key=np.arange(2 * batch).reshape(batch, 2) * 7919,
        temperature=np.ones(batch),
        top_k=np.zeros(batch),
        top_p=np.ones(batch),
        min_p=np.zeros(batch),
        presence=np.zeros(batch),
        frequency=np.zeros(batch),
        repetition=np.ones(batch),
        edited=np.zeros(batch),
        prompt_length=np.full(batch, 4),
        logprobs=np.zeros(batch),
        ngram=np.zeros(batch),
        forced_first=np.zeros(batch),
        forced_last=np.zeros(batch),
        last_position=np.zeros(batch),
        rule=np.zeros(batch),
    ) | {name: np.broadcast_to(value, (batch, *np.shape(value)[1:])) for name, value in values.items()}
    return unpack_rows(jnp.asarray(pack_rows(SamplingRows(**fields))))


def one(settings: SamplingRows, i: int) -> SamplingRows:
    return SamplingRows(*(np.asarray(field)[i] for field in settings))


def raced(left: np.ndarray, r: SamplingRows) -> tuple[int, float]:
    """The token with logits `left` that wins the race, and its relative margin."""
    key = jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(r.key), impl="threefry2x32"), r.position)
    first, second = (int(word) for word in jax.random.key_data(key))
    bits = (np.arange(V) + first) % 2**32
    bits = (bits ^ (bits >> 16)) * 0x21F0AAAD % 2**32
    bits = ((bits ^ (bits >> 15)) + second) * 0x735A2D97 % 2**32
    bits = bits ^ (bits >> 15)
    with np.errstate(over="ignore"):
        times = -np.log1p(-(bits + 0.5) / 2**32) * np.exp(left.max() - left.astype(np.float64))
    winner, other = np.sort(times)[:2]
    return int(np.argmin(times)), other / winner - 1


def filtered(logits: np.ndarray, r: SamplingRows) -> tuple[np.ndarray, float]:
    """Logits that temperature, min-p, top-k and top-p keep, -inf elsewhere; and the margin of the decision."""
    scaled = (logits / r.temperature).astype(np.float64)
    kept = np.ones(V, bool)
    ratio = np.exp(scaled - scaled.max())
    kept &= ratio >= r.min_p
    margin = np.abs(ratio - r.min_p).min() if r.min_p > 0 else 1.0
    if r.top_k > 0:  # including ties with the last
        kept &= scaled >= np.sort(scaled)[::-1][min(r.top_k, V) - 1]
    if r.top_p < 1:
        left = np.where(kept, np.exp(scaled - scaled.max()), 0)
        left /= left.sum()
        nucleus = np.zeros(V, bool)
        for token in np.argsort(-left, kind="stable"):
            before = left[nucleus].sum()
            margin = min(margin, abs(before - r.top_p))
            if before >= r.top_p:
                break
            nucleus[token] = True
        kept &= scaled >= scaled[nucleus].min()  # including ties with the last
    return np.where(kept, logits / np.float32(r.temperature), -np.inf), margin


def edited(logits: np.ndarray, r: SamplingRows, history: np.ndarray, bias: np.ndarray) -> np.ndarray:
    logits = (logits + bias).astype(np.float32)
    known, made = history[: r.position], history[r.prompt_length : r.position]
    for token in range(V):
        if token in known:
            logits[token] = logits[token] / r.repetition if logits[token] > 0 else logits[token] * r.repetition
        count = int((made == token).sum())
        logits[token] -= r.frequency * count
        logits[token] -= r.presence * (count > 0)
    return logits


def hold(tokens, logits, settings, edit=None) -> int:
    """Compare every row with a clear decision; return their number."""
    clear = 0
    for i, token in enumerate(np.asarray(tokens)):
        r = one(settings, i)
        own = np.asarray(logits)[i]
        if edit is not None and r.edited:
            own = edited(own, r, *(np.asarray(part)[int(r.row)] for part in edit))
        expected, margin = int(np.argmax(own)), 1.0
        if r.temperature > 0:
            left, margin = filtered(own, r)
            expected, apart = raced(left, r)
            margin = min(margin, apart)
        if margin > MARGIN:
            clear += 1
            assert token == expected, (i, r)
    return clear


def random_logits(batch: int, seed: int, *, ties: bool = False) -> np.ndarray:
    values = np.random.default_rng(seed).normal(0, 2, (batch, V)).astype(np.float32)
    return np.round(values) if ties else values


@pytest.mark.parametrize("level", Level)
def test_greedy_is_the_largest_logit_at_every_level(level):
    logits = random_logits(R, 0)
    edits = Edits(jnp.zeros((R, L), jnp.int32), jnp.zeros((R, V)))
    tokens, _ = step(logits, rows(R, temperature=0, top_k=3, min_p=0.5), edits, level)
    np.testing.assert_array_equal(tokens, logits.argmax(axis=-1))


@pytest.mark.parametrize("by_blocks", [False, True])
def test_argmax_is_the_first_of_ties(by_blocks):
    """Over several blocks of the vocabulary and a partial one."""
    rng = np.random.default_rng(7)
    logits = rng.integers(-3, 4, (64, 2 * BLOCK + 37)).astype(np.float32)
    logits[3], logits[4, 200], logits[5, :] = -np.inf, np.nan, -1e30
    found = jax.jit(drawing.largest, static_argnums=1)(logits, by_blocks)
    expected = logits.argmax(axis=-1)
    expected[[3, 4]] = BAD_TOKEN
    np.testing.assert_array_equal(found, expected)


def test_exponential_numbers_are_accurate_at_both_ends():
    """The relative error is below 1e-6 from the smallest possible number to the largest."""
    around = [2**i + d for i in range(33) for d in (-2, -1, 0, 1)]
    bits = np.append(np.random.default_rng(0).integers(0, 2**32, 100000), [b for b in around if 0 <= b < 2**32])
    found = np.asarray(jax.jit(exponential)(bits.astype(np.uint32)))
    np.testing.assert_allclose(found, -np.log1p(-(bits + 0.5) / 2**32), rtol=1e-6)


def test_random_bits_of_neighbouring_tokens_positions_and_keys_are_independent():
    """Correlations, and chi-square tests of pairs, with keys that differ in one bit and consecutive positions."""
    keys = np.array([[0, 0], *([1 << i, 0] for i in range(32)), *([0, 1 << i] for i in range(31))])
    for each in (rows(64, key=keys), rows(64, key=0 * keys, position=np.arange(64))):
        bits = np.asarray(jax.jit(token_bits, static_argnums=1)(each, 1 << 14))
        for values in (bits / 2.0**32, bits % 2**16 / 2.0**16):  # by high and by low bits
            centred = (values - 0.5) * np.sqrt(12)
            between = centred @ centred.T / centred.shape[1]
            assert np.abs(between - np.diag(np.diag(between))).max() < 5.5 / np.sqrt(1 << 14)
            for step in (1, 2, 128):
                pairs = np.histogram2d(values[:, step:].ravel(), values[:, :-step].ravel(), 32, [(0, 1)] * 2)[0]
                expected = pairs.sum() / 1024
                assert ((pairs - expected) ** 2 / expected).sum() < 1023 + 5 * np.sqrt(2 * 1023)


@pytest.mark.parametrize(("noise", "most"), [(1e-5, 0.0005), (5e-2, 0.06)])
def test_noise_on_the_logits_changes_few_draws(noise, most):
    """Other rows of a batch change the rounding of a row's logits; this may only decide near ties."""
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 2, (2000, 500)).astype(np.float32)
    moved = logits + rng.normal(0, noise, logits.shape).astype(np.float32)
    settings = rows(2000, position=np.arange(2000), key=np.zeros((1, 2)))
    draws = [np.asarray(step(each, settings, None, Level.RANDOM)[0]) for each in (logits, moved)]
    assert (draws[0] != draws[1]).mean() <= most


def test_a_larger_vocabulary_of_impossible_tokens_changes_no_draw():
    logits = random_logits(R, 3)
    padded = np.pad(logits, ((0, 0), (0, 300)), constant_values=-np.inf)
    draws = [np.asarray(step(each, rows(R), None, Level.RANDOM)[0]) for each in (logits, padded)]
    np.testing.assert_array_equal(*draws)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_filters_equal_their_definition(seed, ties):
    rng = np.random.default_rng(seed)
    batch = 256
    settings = rows(
        batch,
        temperature=rng.choice([0, 0.3, 1.0, 2.5], batch),
        top_k=rng.choice([0, 1, 2, 5, V, 10 * V], batch),
        top_p=rng.choice([1.0, 0.999, 0.8, 0.37, 1e-3], batch),
        min_p=rng.choice([0, 0.03, 0.41, 1.0], batch),
        position=rng.integers(1, 1000, batch),
    )
    logits = random_logits(batch, seed + 10, ties=ties)
    tokens, _ = step(logits, settings, None, Level.TRUNCATED)
    assert hold(tokens, logits, settings) > batch // 2


def test_min_p_alone_needs_no_truncation():
    rng = np.random.default_rng(4)
    settings = rows(128, temperature=rng.choice([0.5, 1.5], 128), min_p=rng.choice([0, 0.1, 0.6], 128))
    logits = random_logits(128, 5)
    low, _ = step(logits, settings, None, Level.RANDOM)
    high, _ = step(logits, settings, None, Level.TRUNCATED)
    np.testing.assert_array_equal(low, high)
    assert hold(low, logits, settings) > 64


@pytest.mark.parametrize(
    ("fields", "left"),
    [
        (dict(top_k=3), {0, 1, 2, 3}),  # 2 and 3 tie for third place
        (dict(top_k=2), {0, 1}),
        (dict(top_p=0.5), {0}),
        (dict(top_p=0.8), {0, 1}),
        (dict(top_p=0.95), {0, 1, 2, 3}),  # 2 is needed, 3 ties with it
        (dict(top_k=2, top_p=0.9), {0, 1}),  # of those left by top-k
        (dict(min_p=0.15), {0, 1}),
        (dict(min_p=1.0), {0}),
        (dict(min_p=0.09, top_k=1), {0}),
        (dict(temperature=0.25, top_p=0.97), {0}),
    ],
)
def test_filters_of_an_explicit_distribution(fields, left):
    """Probabilities 0.6, 0.24, 0.06, 0.06 and 0.04, sampled often enough to see every kept token."""
    logits = np.full((1, V), -1e9, np.float32)
    logits[0, :5] = np.log([0.6, 0.24, 0.06, 0.06, 0.04])
    batch = 512
    tokens, _ = step(np.repeat(logits, batch, axis=0), rows(batch, **fields), None, Level.TRUNCATED)
    assert set(np.asarray(tokens).tolist()) == left


def test_penalties_and_biases_are_their_definition():
    rng = np.random.default_rng(7)
    batch = R
    edits = Edits(
        jnp.asarray(rng.integers(0, 12, (R, L)), jnp.int32),
        jnp.asarray(rng.choice([0, 0, 0, 1.5, -2.0, -np.inf], (R, V)), jnp.float32),
    )
    settings = rows(
        batch,
        row=rng.permutation(batch),
        temperature=rng.choice([0, 0.7], batch),
        edited=rng.choice([0, 1, 1], batch),
        presence=rng.choice([0, 0.9, -1.1], batch),
        frequency=rng.choice([0, 0.4, -0.3], batch),
        repetition=rng.choice([1.0, 1.7, 0.6], batch),
        position=rng.integers(4, L, batch),
        prompt_length=rng.integers(1, 5, batch),
        top_k=rng.choice([0, 6], batch),
        top_p=rng.choice([1, 0.9], batch),
    )
    logits = random_logits(batch, 8)
    tokens, after = step(logits, settings, edits, Level.EDITED)
    assert hold(tokens, logits, settings, edits) > batch // 2
    written = np.array(edits.history)
    written[np.asarray(settings.row), np.asarray(settings.position)] = np.asarray(tokens)
    np.testing.assert_array_equal(after.history, written)
    np.testing.assert_array_equal(after.bias, edits.bias)


ASKED = {
    "nothing": dict(temperature=0),
    "random": dict(temperature=np.array([0, 0.7, 1.5, 1] * (R // 4)), min_p=0.02),
    "truncated": dict(temperature=np.array([0, 0.7, 1.5, 1] * (R // 4)), top_k=5, top_p=0.9),
    "edited": dict(temperature=0, edited=np.array([0, 1] * (R // 2)), presence=1.5),
    "all": dict(
        temperature=np.array([0, 0.7] * (R // 2)),
        top_k=np.array([0, 9, 3, 0] * (R // 4)),
        edited=np.array([1, 1, 0, 0] * (R // 4)),
        frequency=0.9,
    ),
}


@pytest.mark.parametrize("asked", ASKED)
def test_switched_programs_sample_the_same_tokens(asked):
    rng = np.random.default_rng(9)
    edits = Edits(
        jnp.asarray(rng.integers(0, 12, (R, L)), jnp.int32), jnp.asarray(rng.normal(0, 1, (R, V)), jnp.float32)
    )
    settings, logits = rows(R, **ASKED[asked]), random_logits(R, 11)
    logits[5, 3] = np.nan
    tokens, after = step(logits, settings, edits, Level.EDITED, switched=True)
    expected, history = step(logits, settings, edits, Level.EDITED)
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_array_equal(after.history, history.history)
    assert tokens[5] == BAD_TOKEN


def test_a_switched_greedy_step_skips_random_numbers_and_thresholds():
    """Random numbers and threshold searches are inside of branches, and nothing is sorted."""
    edits = Edits(jnp.zeros((R, L), jnp.int32), jnp.zeros((R, V)))
    closed = jax.make_jaxpr(partial(sample, level=Level.EDITED, switched=True))(random_logits(R, 1), rows(R), edits)
    outside = {equation.primitive.name for equation in closed.jaxpr.eqns}
    assert "cond" in outside and not outside & {"while", "random_bits", "threefry2x32", "random_fold_in", "exp"}
    assert "random_fold_in" in str(closed) and " sort[" not in str(closed)


def repeats(known: list[int], n: int) -> set[int]:
    """Tokens that would repeat an n-gram of `known`, found by enumeration."""
    grams = {tuple(known[i : i + n]) for i in range(len(known) - n + 1)}
    return {token for token in range(V) if n and (*known[len(known) - n + 1 :], token) in grams}


@pytest.mark.parametrize("switched", [False, True])
def test_no_tokens_come_twice_in_the_same_order(switched):
    """Rows with different n or none, and histories from empty to full."""
    rng = np.random.default_rng(3)
    history, position = rng.integers(0, 3, (R, L)).astype(np.int32), np.arange(R) % (L + 1)
    position[-1], ngram = L - 1, np.arange(R) % 6
    history[-1], ngram[-1] = np.arange(L) % 4, MAX_NGRAM  # the maximum n
    logits = random_logits(R, 4)
    logits[:, :4] += 50
    edits = Edits(jnp.asarray(history), jnp.zeros((R, V)))
    asked = rows(R, position=position, ngram=ngram, temperature=0, edited=1, prompt_length=0)
    tokens, _ = step(logits, asked, edits, Level.EDITED, switched=switched)
    forbidden = [
        repeats(history[i, :at].tolist(), int(n)) for i, (at, n) in enumerate(zip(position, ngram, strict=True))
    ]
    for row, (token, banned) in enumerate(zip(np.asarray(tokens).tolist(), forbidden, strict=True)):
        left = logits[row].copy()
        left[list(banned)] = -np.inf
        assert token == left.argmax(), (row, banned)
    assert forbidden[-1] == {(L - 1) % 4} and sum(map(bool, forbidden)) > R // 4


@pytest.mark.parametrize("level", Level)
def test_forced_tokens_come_at_their_places_alone(level):
    logits = random_logits(5, 8)
    logits[3] = np.nan
    edits = Edits(jnp.zeros((R, L), jnp.int32), jnp.zeros((R, V)))
    asked = rows(
        5,
        temperature=np.array([0, 1, 0, 0, 0]),
        prompt_length=4,
        position=np.array([4, 4, 5, 4, 9]),
        forced_first=8,
        forced_last=np.array([0, 0, 0, 0, 1]),
        last_position=9,
    )
    tokens, _ = step(logits, asked, edits, level)
    assert np.asarray(tokens).tolist() == [7, 7, int(logits[2].argmax()), BAD_TOKEN, 0]


def test_a_row_of_padding_writes_no_history():
    edits = Edits(jnp.full((R, L), 3, jnp.int32), jnp.zeros((R, V)))
    _, after = step(random_logits(4, 0), rows(4, row=R, position=0), edits, Level.EDITED)
    np.testing.assert_array_equal(after.history, edits.history)


@pytest.mark.parametrize("level", Level)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_rows_are_bad_and_their_neighbours_are_not(level, value):
    logits = random_logits(8, 1)
    edits = Edits(jnp.zeros((R, L), jnp.int32), jnp.zeros((R, V)))
    settings = rows(8, temperature=np.array([0, 1] * 4))
    good, _ = step(logits, settings, edits, level)
    ruined = logits.copy()
    ruined[3] = value
    if value != -np.inf:
        ruined[6, 5] = value
    tokens = np.asarray(step(ruined, settings, edits, level)[0])
    bad = [3] if value == -np.inf else [3, 6]
    assert (tokens[bad] == BAD_TOKEN).all()
    rest = [i for i in range(8) if i not in bad]
    np.testing.assert_array_equal(tokens[rest], np.asarray(good)[rest])


def test_a_row_with_every_token_masked_is_bad():
    edits = Edits(jnp.zeros((R, L), jnp.int32), jnp.full((R, V), -jnp.inf))
    tokens, _ = step(random_logits(2, 1), rows(2, edited=np.array([1, 0])), edits, Level.EDITED)
    assert tokens[0] == BAD_TOKEN and tokens[1] >= 0


def test_noise_depends_on_key_and_position_alone():
    """They do not depend on the index in the batch, the row of the state, or the neighbours' parameters."""
    logits = np.repeat(random_logits(1, 2), 6, axis=0)
    keys = np.array([[1, 2], [1, 2], [1, 3], [2, 2], [1, 2], [1, 2]])
    settings = rows(6, key=keys, position=np.array([5, 5, 5, 5, 6, 5]), row=np.array([0, 9, 2, 3, 4, 5]), temperature=3)
    draws = [np.asarray(step(logits, settings, None, Level.RANDOM)[0])]
    for extra in range(1, 20):
        more = settings._replace(position=settings.position + 10 * extra)
        draws.append(np.asarray(step(logits, more, None, Level.RANDOM)[0]))
    table = np.stack(draws, axis=1)
    assert (table[0] == table[1]).all() and (table[0] == table[5]).all()
    for other in (2, 3, 4):
        assert (table[0] != table[other]).any()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_random_draws_follow_the_distribution(temperature):
    """Chi-square test over all tokens with 20,000 draws, with keys as the engine derives them."""
    count = 20000
    logits = random_logits(1, 3)[0]
    keys = np.stack([np.random.SeedSequence([seed, 0]).generate_state(2) for seed in range(count // 100)])
    settings = rows(
        count,
        key=np.repeat(keys, 100, axis=0),
        position=np.tile(np.arange(100), count // 100),
        temperature=temperature,
    )
    tokens, _ = step(np.repeat(logits[None], count, axis=0), settings, None, Level.RANDOM)
    found = np.bincount(np.asarray(tokens), minlength=V)
    weights = np.exp(logits / temperature - (logits / temperature).max())
    expected = count * weights / weights.sum()
    common = expected >= 5
    found = np.append(found[common], found[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    chi = ((found - expected) ** 2 / np.maximum(expected, 1e-9))[expected > 1].sum()
    freedom = len(expected) - 1
    assert chi < freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize(("count", "switched"), [(4, True), (1, False), (20, False)])
def test_logprobs_and_ranks(count, switched):
    logits = random_logits(16, 6)
    tokens = np.random.default_rng(0).integers(0, V, 16).astype(np.int32)
    found = jax.jit(partial(logprobs, count=count, switched=switched))(logits, tokens)
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    order = np.argsort(-exact, axis=-1, kind="stable")
    np.testing.assert_allclose(found.chosen, exact[np.arange(16), tokens], atol=1e-5)
    np.testing.assert_array_equal(found.rank, [1 + (exact[i] > exact[i, t]).sum() for i, t in enumerate(tokens)])
    np.testing.assert_array_equal(found.top_ids, order[:, :count])
    np.testing.assert_allclose(found.top, np.take_along_axis(exact, order[:, :count], axis=-1), atol=1e-5)


def test_packed_rows_round_trip():
    settings = dict(
        row=np.array([3, R]),
        position=np.array([0, 2**31 - 1]),
        key=np.array([[0, 2**32 - 1], [5, 2**31]], np.uint32),
        temperature=np.array([0, 1e-2], np.float32),
        top_k=np.array([0, 7]),
        top_p=np.array([1, 0.1], np.float32),
        min_p=np.array([0, 1], np.float32),
        presence=np.array([-2, 2], np.float32),
        frequency=np.array([0.1, -0.1], np.float32),
        repetition=np.array([1, 1e-3], np.float32),
        edited=np.array([0, 1]),
        prompt_length=np.array([1, 9]),
        logprobs=np.array([1, 0]),
        ngram=np.array([0, 3]),
        forced_first=np.array([0, 7]),
        forced_last=np.array([2**31 - 1, 0]),
        last_position=np.array([0, 99]),
        rule=np.array([0, 31]),
    )
    back = unpack_rows(jnp.asarray(pack_rows(SamplingRows(**settings))))
    for name, value in settings.items():
        np.testing.assert_array_equal(getattr(back, name), value, err_msg=name)


@pytest.mark.parametrize("switched", [False, True])
@pytest.mark.parametrize("level", Level)
def test_reported_logits_are_what_tokens_are_drawn_by(level, switched):
    """At every level: temperature and min-p, top-k and top-p, then penalties and biases; and a forced token."""
    rng = np.random.default_rng(int(level))
    edits = Edits(
        jnp.asarray(rng.integers(0, 12, (R, L)), jnp.int32),
        jnp.asarray(rng.choice([0, 0, 1.5, -np.inf], (R, V)), jnp.float32),
    )
    asked = dict(
        temperature=0 if level == Level.GREEDY else rng.choice([0, 0.7, 1.6], R),
        min_p=rng.choice([0, 0.05], R),
        forced_last=np.where(np.arange(R) == 5, 8, 0),
        last_position=10,
    )
    if level >= Level.TRUNCATED:
        asked |= dict(top_k=rng.choice([0, 6], R), top_p=rng.choice([1, 0.8], R))
    if level >= Level.EDITED:
        asked |= dict(edited=rng.choice([0, 1], R), presence=0.9, frequency=0.4, repetition=1.7)
    settings, logits = rows(R, **asked), random_logits(R, 21)
    _, after = step(logits, settings, edits if level >= Level.EDITED else None, level, switched=switched)
    found, raw = (
        np.asarray(reported(jnp.asarray(logits), jnp.asarray(logits), settings, after, level, mode, switched=switched))
        for mode in ("processed_logits", "raw_logits")
    )
    np.testing.assert_array_equal(raw, logits)
    clear = 0
    for i in range(R):
        r, own = one(settings, i), logits[i]
        if level >= Level.EDITED and r.edited:
            own = edited(own, r, *(np.asarray(part)[i] for part in edits))
        left, margin = filtered(own, r) if r.temperature > 0 else (own, 1.0)
        if i == 5:
            left, margin = np.where(np.arange(V) == 7, 0, -np.inf), 1.0
        if margin > MARGIN:
            clear += 1
            np.testing.assert_allclose(found[i], left, rtol=1e-5, atol=1e-5, err_msg=str(r))
    assert clear > R // 2


def test_log_probabilities_of_removed_tokens_are_minus_infinity():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    kept = jnp.where(jnp.arange(3) < 2, logits, -jnp.inf)
    found = logprobs(kept, jnp.array([0]), 3, mode="processed_logprobs")
    np.testing.assert_allclose(found.top[0], [np.log(0.625), np.log(0.375), -np.inf], rtol=1e-5)
    assert found.chosen[0] == found.top[0, 0] and found.rank[0] == 1
    assert logprobs(kept, jnp.array([1]), 0, mode="raw_logits").chosen[0] == logits[0, 1]
