"""Faults inside the engine: of a single request, of a step, and interrupts at any point."""

import logging

import numpy as np
import pytest
from support.cases import GREEDY, SEEDED, alone, mixed
from support.tiny import BLOCK, CHUNK, make_engine, make_request, prompt, run

from jaxinfer.engine.runner import lowering, programs
from jaxinfer.engine.runner.keys import Install
from jaxinfer.engine.sequence_state import Status
from jaxinfer.sampling_params import SamplingParams

pytestmark = pytest.mark.xdist_group("llama")


def outputs(requests):
    return [[s.output_ids.tolist() for s in r.sequences] for r in requests]


def reasons(requests):
    return [s.finish_reason for r in requests for s in r.sequences]


def assert_published_is_finite(engine):
    """Assert that no published block contains NaN."""
    published = np.flatnonzero(engine.manager.pool.published)
    assert len(published)
    for layer in engine.runner.cache:
        assert np.isfinite(np.asarray(layer.keys)[published]).all()


LENGTHS = (3, 9, 18, 5)


@pytest.mark.parametrize("at", [0, 7, 20])
def test_nan_in_a_prompt_is_that_requests_error(runner, nan_token, at):
    ids = prompt(21, 5)
    ids[at] = nan_token
    expected = alone(runner, mixed(LENGTHS))
    engine = make_engine(runner)
    bad = make_request("bad", ids, GREEDY)
    requests = mixed(LENGTHS)
    requests.insert(2, bad)
    results = run(engine, requests)
    assert reasons([bad]) == ["error"] and "not finite" in bad.error
    assert results[2] == [[]]
    assert results[:2] + results[3:] == expected
    assert engine.manager.pool.published.sum() == len(engine.manager.index)
    again = make_request("again", ids[:20], GREEDY)
    run(engine, [again])
    assert again.cached_tokens <= at // BLOCK * BLOCK, "no block at or after the NaN is found"
    assert_published_is_finite(engine)
    assert run(engine, mixed(LENGTHS)) == expected, "NaN in freed blocks changes no result"


@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize("length", [BLOCK, 2 * BLOCK - 1, 2 * BLOCK])
def test_nan_while_decoding_takes_its_blocks_out_of_the_index(runner, nan_token, length, history):
    """The next step reads the NaN token; no block it wrote may be found afterwards.

    With multi-token bad words the host reads every token before the next step is planned.
    """
    params = SamplingParams(
        temperature=0,
        max_tokens=20,
        logit_bias={nan_token: 100.0},
        _bad_words_token_ids=((1, 2),) if history else (),
    )
    bad = make_request("bad", prompt(length, 5), params)
    others = mixed(LENGTHS)
    engine = make_engine(runner)
    results = run(engine, [bad, *others])
    assert reasons([bad]) == ["error"]
    assert results[0] == [[nan_token]]
    assert results[1:] == alone(runner, mixed(LENGTHS))
    follow = make_request("follow", [*prompt(length, 5), nan_token, *prompt(BLOCK, 6)], GREEDY)
    run(engine, [follow])
    assert follow.cached_tokens == 0, "all blocks of the failed request were withdrawn"
    never = SamplingParams(temperature=0, max_tokens=2, logit_bias={nan_token: -100.0})
    healthy = make_request("healthy", [*prompt(length, 5), 7], never)
    run(engine, [healthy])
    assert reasons([healthy]) == ["length"]
    again = make_request("again", follow.prompt.tolist(), GREEDY)
    run(engine, [again])
    assert again.cached_tokens == length // BLOCK * BLOCK, "only valid blocks are found after the recomputed ones"


def test_nan_after_a_hit_leaves_the_hit_published(runner, nan_token):
    engine = make_engine(runner)
    shared = prompt(2 * BLOCK + 1, 8)
    run(engine, [make_request("first", shared, GREEDY)])
    bad = make_request("bad", [*shared[: 2 * BLOCK], nan_token, 5], GREEDY)
    run(engine, [bad])
    assert reasons([bad]) == ["error"]
    again = make_request("again", shared, GREEDY)
    assert run(engine, [again]) == alone(runner, [again])
    assert again.cached_tokens == 2 * BLOCK


def test_nan_ends_one_sample_and_leaves_its_siblings(runner, nan_token):
    """Samples diverge; only those that contain the NaN token end in error."""
    params = SamplingParams(temperature=1, seed=1, n=8, max_tokens=12, logit_bias={nan_token: 3.0})
    separate, request = (make_request("x", prompt(6), params) for _ in range(2))
    expected = run(make_engine(runner, block_sharing=False, prefix_caching=False), [separate])
    engine = make_engine(runner)
    assert run(engine, [request]) == expected
    assert {"error", "length"} == set(reasons([request]))
    # Those whose NaN token completed a block had published the block before the NaN was detected.
    made = [s.output_ids for s in request.sequences if s.finish_reason == "error"]
    assert any((6 + len(tokens)) % BLOCK == 0 for tokens in made)
    assert_published_is_finite(engine)


class Fails:
    """A replacement of `Runner.run` that raises at the given calls."""

    def __init__(self, runner, *calls, error=RuntimeError("device lost"), when=lambda plan: True):
        self.run, self.calls, self.error, self.when, self.count = runner.run, calls, error, when, 0

    def __call__(self, plan, *rest):
        if self.when(plan):
            self.count += 1
            if not self.calls or self.count in self.calls:
                raise self.error
        return self.run(plan, *rest)


@pytest.mark.parametrize("call", range(1, 12, 2))
def test_a_failed_step_is_computed_again(runner, monkeypatch, caplog, call):
    expected = alone(runner, mixed(LENGTHS))
    engine = make_engine(runner)
    monkeypatch.setattr(runner, "run", Fails(runner, call))
    with caplog.at_level(logging.ERROR, "jaxinfer"):
        assert run(engine, mixed(LENGTHS)) == expected
    assert "a step failed (RuntimeError: device lost)" in caplog.text


def test_a_failure_raised_when_results_are_read(runner, monkeypatch, caplog):
    """A device error may only be raised when the results are read, with the next step already planned."""
    expected = alone(runner, mixed(LENGTHS))
    engine = make_engine(runner)
    take, calls = engine.committer._take_tokens, []

    def fails(result):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("device lost")
        take(result)

    monkeypatch.setattr(engine.committer, "_take_tokens", fails)
    assert run(engine, mixed(LENGTHS)) == expected
    assert "device lost" in caplog.text


def test_isolated_failures_end_no_sequence(runner, monkeypatch):
    expected = alone(runner, mixed(LENGTHS))
    for request, result in zip(mixed(LENGTHS), expected, strict=True):
        engine = make_engine(runner)
        monkeypatch.setattr(runner, "run", Fails(runner, 3))
        assert run(engine, [request]) == [result]
        monkeypatch.undo()


def test_prompts_that_always_fail_end_alone(runner, monkeypatch):
    """The step with the long prompt fails whenever it runs, alone or with others."""
    engine = make_engine(runner, budget=CHUNK)
    bad = make_request("bad", prompt(CHUNK, 3), GREEDY)
    others = mixed(LENGTHS)
    fails = Fails(runner, when=lambda plan: any(c.sequence.request is bad for c in plan.chunks))
    monkeypatch.setattr(runner, "run", fails)
    run(engine, [bad])
    assert reasons([bad]) == ["error"]
    assert "device lost" in bad.error
    assert fails.count <= 4
    assert run(engine, others) == alone(runner, others)


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_a_step_kind_that_always_fails_ends_its_requests(runner, monkeypatch, kind):
    """As when a bucket does not compile: every request that needs it ends in error, and the engine keeps working."""
    monkeypatch.setattr(runner, "run", Fails(runner, when=lambda p: p.decodes if kind == "decode" else p.chunks))
    engine = make_engine(runner)
    requests = mixed(LENGTHS)
    for request in requests:
        engine.add(request)
    for _ in range(40):
        engine.step()
    assert reasons(requests) == ["error"] * 4
    assert not engine.has_work and not engine.requests
    assert all("failed" in r.error and "device lost" in r.error for r in requests)
    monkeypatch.undo()
    assert run(engine, mixed(LENGTHS)) == alone(runner, mixed(LENGTHS))


def test_a_program_that_does_not_compile(runner, monkeypatch):
    """Requests that need the program end in error; others are served."""
    params = SamplingParams(temperature=0.5, presence_penalty=1.0, max_tokens=5, seed=1)

    def fails(*arguments):
        raise RuntimeError("no kernel for this shape")

    monkeypatch.setattr(lowering, "install", fails)
    fresh = programs.Programs(runner.program, runner.shapes, runner.params)
    others = {key: made for key, made in runner.programs._ready.items() if not isinstance(key, Install)}
    monkeypatch.setattr(fresh, "_ready", others)
    monkeypatch.setattr(runner, "programs", fresh)
    engine = make_engine(runner)
    bad = make_request("bad", prompt(5), params)
    run(engine, [bad])
    assert reasons([bad]) == ["error"]
    assert "no kernel for this shape" in bad.error
    assert run(engine, mixed(LENGTHS)) == alone(runner, mixed(LENGTHS))
    monkeypatch.undo()
    again = make_request("again", prompt(5), params)
    run(engine, [again])
    assert reasons([again]) == ["length"]


@pytest.mark.parametrize("call", range(1, 8))
def test_an_interrupt_and_the_next_call(runner, monkeypatch, call):
    expected = alone(runner, mixed(LENGTHS))
    engine = make_engine(runner)
    monkeypatch.setattr(runner, "run", Fails(runner, call, error=KeyboardInterrupt()))
    requests = mixed(LENGTHS)
    for request in requests:
        engine.add(request)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(20):
            engine.step()
    while engine.has_work:
        engine.step()
    assert outputs(requests) == expected


def test_many_interrupts_end_no_sequence(runner, monkeypatch):
    """Interrupts are not counted as failures of the running sequences."""
    expected = alone(runner, mixed(LENGTHS))
    engine = make_engine(runner)
    requests = mixed(LENGTHS)
    for request in requests:
        engine.add(request)
    monkeypatch.setattr(runner, "run", Fails(runner, *range(1, 11), error=KeyboardInterrupt()))
    for _ in range(10):
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    while engine.has_work:
        engine.step()
    assert outputs(requests) == expected


class Listens:
    """A listener that raises at its third token."""

    def __init__(self, error):
        self.error, self.seen = error, []

    def on_token(self, sequence, reason):
        self.seen.append(int(sequence.tokens[sequence.length - 1]))
        if len(self.seen) == 3:
            raise self.error
        return None


def test_a_listener_that_raises_is_its_own_requests_error(runner):
    expected = alone(runner, mixed(LENGTHS))
    bad = make_request("bad", prompt(7), GREEDY, listener=Listens(ValueError("user's own")))
    engine = make_engine(runner)
    requests = [*mixed(LENGTHS)[:2], bad, *mixed(LENGTHS)[2:]]
    results = run(engine, requests)
    assert reasons([bad]) == ["error"] and "user's own" in bad.error
    assert results[:2] + results[3:] == expected


def test_a_listener_interrupted_at_a_sequences_last_token(runner):
    """The token was appended: the sequence has ended and must not be extended."""
    params = SamplingParams(temperature=0, max_tokens=3)
    request = make_request("x", prompt(7), params, listener=Listens(KeyboardInterrupt()))
    engine = make_engine(runner)
    engine.add(request)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(10):
            engine.step()
    while engine.has_work:
        engine.step()
    assert outputs([request]) == alone(runner, [make_request("x", prompt(7), params)])
    assert reasons([request]) == ["length"]


def test_a_listener_interrupted_at_a_stop_token(runner):
    plain = make_request("x", prompt(7), GREEDY)
    [[made]] = alone(runner, [plain])
    stop = SamplingParams(temperature=0, max_tokens=10, stop_token_ids=[made[2]])
    request = make_request("x", prompt(7), stop, listener=Listens(KeyboardInterrupt()))
    engine = make_engine(runner)
    engine.add(request)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(10):
            engine.step()
    while engine.has_work:
        engine.step()
    assert outputs([request]) == [[made[: made.index(made[2]) + 1]]]
    assert reasons([request]) == ["stop"]


def test_counters_do_not_go_back_with_a_failure(runner, monkeypatch):
    engine = make_engine(runner, pool_blocks=7)
    requests = [make_request(str(i), prompt(9, i), SEEDED) for i in range(5)]
    for request in requests:
        engine.add(request)
    while not engine.scheduler.preempted:
        engine.step()
    monkeypatch.setattr(runner, "run", Fails(runner, 1))
    engine.step()
    engine.step()
    assert engine.metrics.counters["num_preemptions"] >= 1
    while engine.has_work:
        engine.step()
    assert engine.metrics.counters["num_preemptions"] == sum(r.preemptions for r in requests)
    assert all(s.status is Status.FINISHED for r in requests for s in r.sequences)


def test_a_failure_in_planning_fails_all_requests_but_not_the_engine(runner, monkeypatch):
    """If planning fails, no single sequence can be blamed; it must not be retried forever."""
    engine, bad = make_engine(runner), mixed(LENGTHS)
    with monkeypatch.context() as broken:
        broken.setattr(engine.manager.__class__, "admit", lambda *_: 1 / 0)
        for request in bad:
            engine.add(request)
        for _ in range(20):
            engine.step()
        assert not engine.has_work
    assert reasons(bad) == ["error"] * len(LENGTHS) and "ZeroDivisionError" in bad[0].error
    assert run(engine, mixed(LENGTHS)) == alone(runner, mixed(LENGTHS))


@pytest.mark.parametrize("place", [0, 2])
def test_a_request_that_can_never_be_scheduled_ends_in_error(runner, monkeypatch, place):
    """Checks at queueing refuse requests that can never fit; if one of them were wrong, the others must continue and
    the engine must not step forever.
    """
    expected = alone(runner, mixed(LENGTHS))
    engine = make_engine(runner, pool_blocks=30 // BLOCK)
    monkeypatch.setattr(engine.capacity, "check", lambda request: None)
    requests = mixed(LENGTHS)
    bad = make_request("bad", prompt(40, 5), GREEDY)
    requests.insert(place, bad)
    for request in requests:
        engine.add(request)
    for _ in range(500):
        if not engine.has_work:
            break
        engine.step()
    assert not engine.has_work and reasons([bad]) == ["error"] and "although nothing else is running" in bad.error
    requests.remove(bad)
    assert outputs(requests) == expected


def test_on_finish_is_called_after_an_interrupted_end(runner, monkeypatch):
    """A call waits for `on_finish`: it must be called even if an interrupt came right after the request's end."""
    told, engine = [], make_engine(runner)
    request = make_request("x", prompt(7), SamplingParams(temperature=0, max_tokens=3), on_finish=told.append)

    def interrupted(_):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.metrics, "time", interrupted)
    engine.add(request)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(10):
            engine.step()
    assert request.finished and told == [request] and not engine.requests
