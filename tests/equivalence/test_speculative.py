"""Speculative decoding gives the tokens of decoding one at a time, whatever is drafted and however much is right."""

from concurrent.futures import Future
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from support.cases import EDGES, GREEDY, SEEDED, alone, mixed, poison, requests
from support.tiny import (
    BLOCK,
    ROWS,
    divided_runner,
    hybrid_runner,
    make_engine,
    make_request,
    prompt,
    random_runner,
    run,
)

from jaxinfer.engine.runner.batch import VERIFY
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.engine.sequence_state import Status
from jaxinfer.engine.speculation import drafter
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.speculative_config import SpeculativeConfig

pytestmark = pytest.mark.xdist_group("llama")

CONFIG = SpeculativeConfig(num_speculative_tokens=6)
TOKENS = 16


@cache
def speculative(base: Runner) -> Runner:
    """Return a runner with the same programs that verifies drafts, too."""
    shapes = replace(base.shapes, verify_buckets=(TOKENS,))
    return Runner(base.program, base.params, shapes, programs=base.programs)


@pytest.fixture
def oracle(monkeypatch):
    """Drafts of right tokens up to a random place: `oracle[prompt] = output` for each sample of a request."""
    known, rng = {}, np.random.default_rng(0)

    def draft(tokens, count, longest, shortest):
        for (given, _), output in known.items():
            made = len(tokens) - len(given)
            if tuple(tokens[: len(given)]) == given and output[:made] == tokens[len(given) :].tolist():
                found = np.array(output[made : made + count], np.int32)
                found[rng.integers(0, len(found) + 2) :] += 1  # wrong from here on, or not at all
                return found
        return np.empty(0, np.int32)

    monkeypatch.setattr(drafter, "find_draft", draft)
    monkeypatch.setattr(drafter.Payoff, "note_verify", lambda *_: None)
    return known


def learn(oracle, wanted, expected):
    """Let drafts be parts of these outputs."""
    for request, samples in zip(wanted, expected, strict=True):
        for index, output in enumerate(samples):
            oracle[tuple(request.prompt.tolist()), index] = output


def make(base, **host):
    return make_engine(speculative(base), speculative=CONFIG, **host)


def counts(engine):
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    return [engine.metrics.counters[f"spec_decode_{name}"] for name in names]


@pytest.mark.parametrize(
    "host",
    [{}, {"decode_steps": 4}, {"budget": 5}, {"pool_blocks": 14}, {"prefix_caching": False}],
    ids=["default", "several decode steps", "small budget", "preempting", "no prefix cache"],
)
def test_greedy_and_seeded_tokens_are_those_without(oracle, host):
    base, wanted = random_runner(), mixed(EDGES)
    expected = alone(base, wanted)
    learn(oracle, wanted, expected)
    engine = make(base, **host)
    poison(engine.runner)
    assert run(engine, wanted) == expected
    drafts, drafted, accepted = counts(engine)
    assert drafts > 10 and 0 < accepted < drafted
    assert (engine.scheduler.preempted > 0) == ("pool_blocks" in host)


def test_drafts_are_verified_by_a_step_of_two_programs(oracle):
    base, wanted = divided_runner(), mixed(EDGES)
    expected = alone(random_runner(), wanted)
    learn(oracle, wanted, expected)
    engine = make(base)
    assert run(engine, wanted) == expected
    drafts, drafted, accepted = counts(engine)
    assert drafts > 10 and 0 < accepted < drafted


def test_fewer_steps_are_taken(oracle):
    base, wanted = random_runner(), requests([9], SamplingParams(temperature=0, max_tokens=22, ignore_eos=True))
    expected = alone(base, wanted)
    oracle[tuple(wanted[0].prompt.tolist()), 0] = expected[0][0]
    engine = make(base)
    engine.add(wanted[0])
    steps = 0
    while engine.has_work:
        engine.step()
        steps += 1
    assert wanted[0].sequences[0].output_ids.tolist() == expected[0][0]
    assert steps < 22 and counts(engine)[2] >= 22 - steps


def test_samples_forks_and_cached_prefixes(oracle):
    base = random_runner()
    params = SamplingParams(temperature=0.3, seed=11, max_tokens=10, n=3)
    wanted = [make_request(str(i), prompt(length, 7), params) for i, length in enumerate((BLOCK, 2 * BLOCK + 2, 11))]
    wanted.append(make_request("again", prompt(2 * BLOCK + 2, 7), params))
    expected = alone(base, wanted)
    learn(oracle, wanted, expected)
    engine = make(base)
    assert run(engine, wanted[:2]) + run(engine, wanted[2:]) == expected
    assert counts(engine)[2] > 0 and wanted[-1].cached_tokens > 0, "published blocks have the right keys and values"


def test_published_blocks_serve_an_engine_without_drafts(oracle):
    """What drafts wrote beyond the accepted tokens must not be in the prefix cache."""
    base = random_runner()
    [first] = wanted = requests([BLOCK + 1], SamplingParams(temperature=0, max_tokens=3 * BLOCK, ignore_eos=True))
    expected = alone(base, wanted)
    learn(oracle, wanted, expected)
    engine = make(base)
    assert run(engine, wanted) == expected
    whole = [*first.prompt.tolist(), *expected[0][0]]
    oracle.clear()
    again = make_request("again", whole, GREEDY)
    assert run(engine, [again]) == alone(base, [again])
    assert again.cached_tokens == len(whole) // BLOCK * BLOCK - (BLOCK if len(whole) % BLOCK == 0 else 0)


def test_rows_without_drafts_take_part(oracle):
    """Penalties and log-probabilities beside drafted rows; those with penalties get no draft."""
    base, greedy = random_runner(), {"temperature": 0, "max_tokens": 10, "ignore_eos": True}
    every = [greedy, greedy | {"repetition_penalty": 1.3}, greedy | {"logprobs": 3}, greedy | {"min_tokens": 4}]
    wanted = [make_request(str(i), prompt(9, i), SamplingParams(**params)) for i, params in enumerate(every)]
    expected = alone(base, wanted)
    learn(oracle, wanted, expected)
    engine = make(base)
    assert run(engine, wanted) == expected and counts(engine)[2] > 0
    logged = make_request("alone", wanted[2].prompt.tolist(), wanted[2].params)
    run(make_engine(base), [logged])
    mine, theirs = wanted[2].sequences[0].logprobs, logged.sequences[0].logprobs
    assert [one[1] for one in mine] == [one[1] for one in theirs]
    np.testing.assert_allclose([one[0] for one in mine], [one[0] for one in theirs], atol=1e-5)


@pytest.mark.parametrize("kind", ["beams", "grammar"])
def test_nothing_is_drafted_beside_searches_and_grammars(kind, oracle):
    may_draft = make(random_runner()).scheduler.drafter.may_draft
    one, two = (make_request(name, prompt(5), GREEDY) for name in "ab")
    assert may_draft([one.sequences[0]])
    setattr(two, kind, object())
    assert not may_draft([one.sequences[0], two.sequences[0]])


@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_stop_token_in_a_draft_ends_the_sequence(oracle, at):
    base, [free] = random_runner(), requests([9], GREEDY)
    output = alone(base, [free])[0][0]
    stop = make_request("stop", free.prompt.tolist(), replace(GREEDY, stop_token_ids=[output[at]]))
    learn(oracle, [free], [[output]])
    engine = make(base)
    assert run(engine, [stop]) == [[output[: output.index(output[at]) + 1]]]
    assert stop.sequences[0].finish_reason == "stop"


def test_an_abort_with_drafts_in_flight(oracle):
    base, wanted = random_runner(), mixed(EDGES[:4])
    expected = alone(base, wanted)
    learn(oracle, wanted, expected)
    engine = make(base)
    for request in wanted:
        engine.add(request)
    while counts(engine)[0] == 0 or engine.pipeline.flight is None or engine.pipeline.flight.plan.drafts is None:
        engine.step()
    engine.abort(wanted[0].id)
    while engine.has_work:
        engine.step()
    assert wanted[0].sequences[0].status is Status.FINISHED
    assert [[s.output_ids.tolist() for s in r.sequences] for r in wanted[1:]] == expected[1:]
    assert engine.manager.pool.num_held == 0


def test_steps_without_drafts_follow_one_with_drafts_in_flight(oracle):
    base, wanted = random_runner(), mixed(EDGES[:3])
    expected = alone(base, wanted)
    learn(oracle, wanted, expected)
    engine = make(base)
    for request in wanted:
        engine.add(request)
    while engine.has_work:
        engine.step()
        flight = engine.pipeline.flight
        if flight is not None and flight.plan.drafts is not None:
            engine.scheduler.drafter.payoff.pause = 2  # as a beam search that begins in the same step, too
    assert [[s.output_ids.tolist() for s in r.sequences] for r in wanted] == expected
    assert counts(engine)[0] > 2


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("alternating", marks=pytest.mark.xdist_group("hybrids")),
        pytest.param("gemma4", marks=[pytest.mark.slow, pytest.mark.xdist_group("gemma4")]),
    ],
)
def test_sliding_windows(oracle, name):
    """In Gemma 4 with layers that attend to another one's keys."""
    base = random_runner(name) if name == "gemma4" else hybrid_runner(name)
    wanted = requests([3, 12, 17, 30], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    expected = alone(base, wanted)
    learn(oracle, wanted, expected)
    engine = make(base)
    poison(engine.runner)
    assert run(engine, wanted) == expected and counts(engine)[2] > 0


def test_more_rows_than_a_step_verifies(oracle):
    """If the rows alone fill the step nothing is drafted."""
    base, wanted = random_runner(), mixed(EDGES[:ROWS])
    expected = alone(base, wanted)
    learn(oracle, wanted, expected)
    engine = make(base)
    engine.scheduler.drafter._most = 2
    assert run(engine, wanted) == expected


def test_drafts_wait_for_their_program(oracle, monkeypatch):
    base, wanted = random_runner(), requests([9], SEEDED)
    expected = alone(base, wanted)
    learn(oracle, wanted, expected)
    engine, asked = make(base), []
    engine.runner.compiled_aside = lambda: None
    never, start = Future(), engine.runner.programs.start

    def compile_aside(key, done):
        if getattr(key, "kind", "") != VERIFY:
            return start(key, done)
        asked.append(key)
        return never

    monkeypatch.setattr(engine.runner.programs, "start", compile_aside)
    try:
        assert run(engine, wanted) == expected
        assert asked and counts(engine)[0] == 0
        engine.runner.programs.failed.add(asked[0])
        count = len(asked)
        assert run(engine, requests([9], SEEDED)) == expected
        assert len(asked) == count, "a program that does not compile is not compiled again and again"
    finally:
        engine.runner.compiled_aside = None
        engine.runner.programs.failed.clear()
