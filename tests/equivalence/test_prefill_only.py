"""Requests that end with their prefill: their results do not depend on how they are computed, and nothing is kept."""

import numpy as np
import pytest
from support.cases import poison
from support.tiny import BLOCK, CHUNK, deterministic_runner, make_engine, make_request, prompt, random_runner

from jaxinfer.engine.engine import Engine
from jaxinfer.engine.request import Request
from jaxinfer.engine.wanted import Kept, Pooled, Wanted
from jaxinfer.functional.taps import LAST
from jaxinfer.sampling_params import SamplingParams

PREFIX = prompt(4 * BLOCK, 5)
LENGTHS = [(1, 1), (BLOCK, 3), (CHUNK, 1), (CHUNK + 1, CHUNK), (9, 40)]
"""Tokens of prompts and completions."""
pytestmark = pytest.mark.xdist_group("deterministic llama")


def score(name: str, ids: list[int], first: int) -> Request:
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    request = make_request(name, ids, params, wanted=Wanted(first))
    request.limit = len(ids)
    return request


def embed(name: str, ids: list[int], captures: object, first: int = 0) -> Request:
    wanted = Wanted(first, (LAST,), captures)
    request = make_request(name, ids, SamplingParams(temperature=0, max_tokens=1), wanted=wanted)
    request.limit = len(ids)
    return request


def run(engine: Engine, requests: list[Request]) -> None:
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
    assert int(engine.manager.pool.num_held) == 0 and not engine.requests
    for request in requests:
        if request.wanted is not None:
            [sequence] = request.sequences
            assert sequence.finish_reason == "length" and sequence.made == 0 and sequence.pending == 0


def scores(request: Request) -> list[float]:
    return np.concatenate([np.asarray(part.chosen) for part in request.prompt_logprobs]).tolist()


def test_a_score_is_what_was_generated_bit_for_bit():
    """Alone, in a batch with requests that sample, with found prefixes, in small chunks and after preemptions."""
    runner = deterministic_runner("llama")
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=11, logprobs=0)
    rollouts = [make_request(str(i), PREFIX[: 3 + 4 * i] + prompt(i, i), params) for i in range(4)]
    run(make_engine(runner), rollouts)
    made = [[own for own, *_ in r.sequences[0].logprobs] for r in rollouts]

    def scored() -> list[Request]:
        return [
            score(f"s{i}", r.prompt.tolist() + r.sequences[0].output_ids.tolist(), len(r.prompt) - 1)
            for i, r in enumerate(rollouts)
        ]

    def others() -> list[Request]:
        return [make_request(f"n{i}", prompt(7 + i, 30 + i), params) for i in range(3)]

    for budget, pool in ((CHUNK, None), (5, None), (CHUNK, 10)):
        engine = make_engine(runner, budget=budget, pool_blocks=pool)
        poison(runner)
        own = scored()
        run(engine, own + others())
        assert [scores(request) for request in own] == made
        assert (engine.scheduler.preempted > 0) == (pool is not None)
        again = scored()
        run(engine, again)
        assert [scores(request) for request in again] == made
        if pool is None:
            assert sum(request.cached_tokens for request in again) > 3 * BLOCK


@pytest.mark.parametrize(("before", "after"), LENGTHS)
def test_only_the_completion_is_scored(before, after):
    runner, ids = deterministic_runner("llama"), prompt(before + after, 9)
    whole, part = score("whole", ids, 0), score("part", ids, before - 1)
    run(make_engine(runner), [whole])
    run(make_engine(runner), [part])
    assert len(scores(part)) == after and scores(part) == scores(whole)[before - 1 :]


def test_prompts_that_begin_alike_are_computed_once():
    runner = deterministic_runner("llama")
    engine = make_engine(runner)
    requests = [score(str(i), PREFIX + prompt(3, i), len(PREFIX)) for i in range(6)]
    run(engine, requests)
    assert sum(r.cached_tokens == len(PREFIX) for r in requests) == 5


def test_hidden_states_do_not_depend_on_how_they_are_computed():
    runner = deterministic_runner("llama", capture=(LAST,))
    lengths = (1, CHUNK, CHUNK + 1, 40)

    def wanted() -> list[tuple[Request, Kept, Request, Pooled]]:
        found = []
        for n in lengths:
            kept, last = Kept(), Pooled(n - 1, mean=False)
            ids = prompt(n, n)
            found.append((embed(f"k{n}", ids, kept), kept, embed(f"p{n}", ids, last, n - 1), last))
        return found

    results = []
    for settings in (dict(), dict(budget=5), dict(pool_blocks=12)):
        engine, own = make_engine(runner, **settings), wanted()
        for request, *_ in own:  # then the others find their prefixes
            engine.add(request)
        run(engine, [last for _, _, last, _ in own])
        states = [kept.arrays()[LAST] for _, kept, _, _ in own]
        assert [len(one) for one in states] == list(lengths)
        for one, (_, _, _, pooled) in zip(states, own, strict=True):
            np.testing.assert_array_equal(pooled.vector().astype(np.float32), one[-1])
        results.append(states)
    for other in results[1:]:
        for one, expected in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(one, expected)


def test_an_engine_that_captures_nothing_has_the_same_programs(monkeypatch):
    """A step for `embed` is a program of its own; others return no hidden states."""
    runner = random_runner()
    engine = make_engine(runner)
    params = SamplingParams(temperature=0, max_tokens=3)
    packed, kept = [], Kept()
    launch = runner._launch
    monkeypatch.setattr(runner, "_launch", lambda key, *given: packed.append(key) or launch(key, *given))
    run(engine, [make_request("a", prompt(5), params)])
    assert packed and not any(getattr(key, "capture", ()) for key in packed)
    run(
        engine, [embed("b", prompt(5), kept), make_request("c", prompt(9), SamplingParams(temperature=0, max_tokens=3))]
    )
    captures = {getattr(key, "capture", ()) for key in packed}
    assert (LAST,) in captures and () in captures and kept.arrays()[LAST].shape[0] == 5


@pytest.mark.parametrize("what", ["hidden states", "log-probabilities"])
def test_new_weights_start_a_prompt_over(what: str):
    """What old weights gave for the first chunks is forgotten."""
    runner, ids = random_runner(), prompt(4 * CHUNK, 2)
    old = list(runner.params)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)

    def wanted() -> tuple[Request, Kept]:
        kept = Kept()
        return embed("a", ids, kept) if what == "hidden states" else make_request("b", ids, params), kept

    def result(request: Request, kept: Kept) -> np.ndarray:
        return kept.arrays()[LAST] if what == "hidden states" else np.array(scores(request))

    def replace(own: list) -> None:
        own[:] = [value * 1.25 for value in own]

    (first, kept), engine = wanted(), make_engine(runner)
    engine.add(first)
    for _ in range(3):
        engine.step()
    assert 0 < first.sequences[0].computed < len(ids)
    engine.control.stop("keep")
    assert engine.control.stopped()
    try:
        engine.control.replace_weights(replace)
        engine.control.resume(recompute=False)
        run(engine, [])
        again, expected = wanted()
        run(make_engine(runner), [again])
    finally:
        runner.params[:] = old
    np.testing.assert_allclose(result(first, kept), result(again, expected), rtol=1e-4, atol=1e-4)
