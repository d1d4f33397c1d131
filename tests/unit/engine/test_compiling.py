"""Steps whose programs are compiled aside: what waits for them, what ends meanwhile, and compilations that fail."""

import random

import pytest
from support.cases import GREEDY, alone, mixed
from support.compiling import Gate, is_decode, is_prefill
from support.tiny import BLOCK, CHUNK, make_engine, make_request, prompt, run

from jaxinfer.engine.runner.keys import InstallTables
from jaxinfer.sampling_params import SamplingParams

pytestmark = pytest.mark.xdist_group("llama")

LENGTHS = (3, 9, 18, 5)
ERROR = RuntimeError("no kernel for this shape")


@pytest.fixture
def gated(runner, monkeypatch):
    """Make an engine whose programs seem to be compiled at their first use; return it and its `Gate`."""

    def make(chosen=None, **settings):
        programs = runner.programs
        gate = Gate(getattr(programs, "_programs", programs), *[] if chosen is None else [chosen])
        monkeypatch.setattr(runner, "programs", gate)
        monkeypatch.setattr(runner, "compiled_aside", lambda: None)
        return make_engine(runner, **settings), gate

    return make


def finish(engine, gate, steps=200):
    """Step to the end, ending each compilation as it begins."""
    for _ in range(steps):
        if not engine.has_work:
            break
        gate.release()
        engine.step()
    assert not engine.has_work and not engine.requests and int(engine.manager.pool.num_held) == 0


def reasons(requests):
    return [s.finish_reason for r in requests for s in r.sequences]


def expected(runner, requests):
    """Tokens of requests that run alone and wait for no program."""
    aside, runner.compiled_aside = runner.compiled_aside, None
    try:
        return alone(runner, requests)
    finally:
        runner.compiled_aside = aside


def outputs(requests):
    return [[s.output_ids.tolist() for s in r.sequences] for r in requests]


@pytest.mark.parametrize("chosen", [is_prefill, is_decode, lambda key: isinstance(key, InstallTables), None])
def test_a_step_waits_for_its_programs(gated, runner, chosen):
    wanted = expected(runner, mixed(LENGTHS))
    engine, gate = gated(chosen)
    requests = mixed(LENGTHS)
    for request in requests:
        engine.add(request)
    while not engine.is_compiling:
        engine.step()
    before = outputs(requests)
    for _ in range(3):
        engine.step()
    assert gate.pending and outputs(requests) == before
    finish(engine, gate)
    assert outputs(requests) == wanted


@pytest.mark.parametrize("chosen", [is_prefill, is_decode])
def test_an_abort_ends_a_request_whose_step_is_compiled(gated, runner, chosen):
    """Nobody waits for the step any more, so the next request does not either."""
    ended, engine, gate = [], *gated(lambda key: chosen(key) and not gate.pending)
    request = make_request("x", prompt(2 * BLOCK + 1), GREEDY, on_finish=ended.append)
    engine.add(request)
    while not engine.is_compiling:
        engine.step()
    engine.abort("x")
    assert reasons([request]) == ["abort"] and ended == [request]
    assert not engine.is_compiling and not engine.has_work and int(engine.manager.pool.num_held) == 0
    [stuck] = gate.pending
    gate.ready.add(stuck)
    again = make_request("again", prompt(2 * BLOCK + 1), GREEDY)
    assert run(engine, [again]) == expected(runner, [again])


def test_what_a_dropped_step_would_have_written_is_not_found(gated, runner):
    """The decode step that was dropped would have written the last position of a block."""
    engine, gate = gated(is_decode)
    first = make_request("x", prompt(2 * BLOCK - 1), GREEDY)
    engine.add(first)
    while first.sequences[0].made < 1:
        engine.step()
    assert engine.is_compiling
    engine.abort("x")
    gate.release()
    again = make_request("again", [*prompt(2 * BLOCK - 1), *first.sequences[0].output_ids.tolist(), 5], GREEDY)
    assert run(engine, [again]) == expected(runner, [again])
    assert again.cached_tokens == BLOCK


def test_what_dropped_samples_would_have_written_is_not_found(gated, runner):
    """Samples share the blocks of a prompt that no step has computed."""
    engine, gate = gated(is_prefill)
    ids = prompt(2 * BLOCK + 1)
    engine.add(make_request("x", ids, SamplingParams(temperature=1, n=3, seed=1, max_tokens=4)))
    engine.step()
    assert engine.is_compiling and engine.scheduler.rows.num_used == 3
    engine.abort("x")
    gate.release()
    again = make_request("again", ids, GREEDY)
    assert run(engine, [again]) == expected(runner, [again])
    assert again.cached_tokens == 0


def test_an_abort_of_one_of_several_requests_of_a_step(gated, runner):
    engine, gate = gated()
    requests = mixed(LENGTHS)
    for request in requests:
        engine.add(request)
    while engine.has_work:
        if engine.is_compiling and len(engine.requests) > 1:
            engine.abort(next(iter(engine.requests)))
        gate.release()
        engine.step()
    others = [request for request in requests if reasons([request]) != ["abort"]]
    assert len(others) == 2 and outputs(others) == expected(runner, others)
    assert int(engine.manager.pool.num_held) == 0


def test_a_request_queued_meanwhile(gated, runner):
    engine, gate = gated()
    first, second = mixed(LENGTHS)[:2]
    engine.add(first)
    engine.step()
    assert engine.is_compiling
    engine.add(second)
    finish(engine, gate)
    assert outputs([first, second]) == expected(runner, [first, second])


@pytest.mark.parametrize(("chosen", "failed"), [(is_prefill, "prefill T="), (is_decode, "decode T=")])
def test_a_program_that_does_not_compile_is_the_error_of_those_that_need_it(gated, runner, chosen, failed):
    """In one plan, one prompt is prefilled while the others decode."""
    wanted = expected(runner, mixed(LENGTHS))
    engine, gate = gated(lambda key: armed and chosen(key))
    armed, decoding, late = False, mixed(LENGTHS)[:3], mixed(LENGTHS)[3]
    for request in decoding:
        engine.add(request)
    while not all(request.sequences[0].made for request in decoding):
        engine.step()
    armed = True
    engine.add(late)
    while not engine.is_compiling:
        engine.step()
    gate.release(ERROR)
    engine.step()
    armed = False
    finish(engine, gate)
    bad, good = ([late], decoding) if chosen is is_prefill else (decoding, [late])
    assert reasons(bad) == ["error"] * len(bad) and reasons(good) == ["length"] * len(good)
    assert all(failed in request.error and "could not be compiled" in request.error for request in bad)
    assert all("no kernel for this shape" in request.error for request in bad)
    assert outputs(good) == (wanted[:3] if chosen is is_prefill else wanted[3:])


def test_a_program_that_never_compiles_ends_each_request_once(gated):
    engine, gate = gated(is_decode)
    requests = mixed(LENGTHS)
    for request in requests:
        engine.add(request)
    for _ in range(20):
        gate.release(ERROR)
        engine.step()
    assert reasons(requests) == ["error"] * len(LENGTHS) and not engine.has_work


def test_close_does_not_wait(gated):
    engine, _ = gated()
    for request in mixed(LENGTHS):
        engine.add(request)
    engine.step()
    assert engine.is_compiling
    engine.close()
    assert not engine.has_work


@pytest.mark.parametrize("seed", range(2))
def test_random_compilations_aborts_and_failures(gated, runner, seed):
    """Whatever is compiled, fails or is aborted when: greedy answers are those of requests that ran alone."""
    rng = random.Random(seed)
    missing = set()

    def chosen(key):
        if key not in missing and rng.random() < 0.15:
            missing.add(key)
        return key in missing

    engine, gate = gated(chosen, pool_blocks=24, budget=rng.choice([5, CHUNK]))
    requests, added = [], 0
    for _ in range(3000):
        if added < 40 and rng.random() < 0.3:
            kind = rng.randrange(4)
            params = [
                GREEDY,
                SamplingParams(temperature=0, max_tokens=12, min_tokens=4, stop_token_ids=[7, 8, 9]),
                SamplingParams(temperature=0.5, seed=added, n=3, max_tokens=8),
                SamplingParams(temperature=0, max_tokens=6, presence_penalty=0.5, _bad_words_token_ids=((1, 2),)),
            ][kind]
            ids = prompt(40, rng.randrange(3))[: rng.randrange(1, 40)]
            requests.append(make_request(str(added), ids, params))
            engine.add(requests[-1])
            added += 1
        if engine.requests and rng.random() < 0.05:
            engine.abort(rng.choice(list(engine.requests)))
        if gate.pending and rng.random() < 0.3:
            key = rng.choice(list(gate.pending))
            gate.release(ERROR if rng.random() < 0.2 else None, key)
            missing.discard(key)
        if added == 40 and not engine.has_work:
            break
        gate.ready.clear()
        engine.step()
    assert added == 40 and not engine.has_work and not engine.requests
    assert int(engine.manager.pool.num_held) == 0
    whole = [r for r in requests if not {"abort", "error"} & set(reasons([r]))]
    assert 5 < len(whole) < 40 and outputs(whole) == expected(runner, whole)
