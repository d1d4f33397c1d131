"""Sequences go on with the programs there are, while those that others need are compiled or fail to compile."""

import random
from dataclasses import replace

import pytest
from support.cases import GREEDY, alone
from support.compiling import Gate, finish, is_decode, is_prefill
from support.tiny import BLOCK, CHUNK, ROWS, hybrid_runner, make_engine, make_request, prompt

from jaxinfer.engine.runner.buckets import covers
from jaxinfer.engine.runner.keys import InstallTables
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.engine.sequence_state import Status
from jaxinfer.sampling_params import SamplingParams

pytestmark = pytest.mark.xdist_group("llama")

ERROR = RuntimeError("no kernel for this shape")
LONG = SamplingParams(temperature=0, max_tokens=30)
SAMPLES = SamplingParams(temperature=0.1, seed=3, n=3, max_tokens=6)


@pytest.fixture(scope="module")
def sized():
    """A runner with decode steps of one, of two and of all rows."""
    whole = hybrid_runner("alternating")
    runner = Runner(whole.program, whole.params, replace(whole.shapes, decode_buckets=(1, 2, ROWS)))
    alone(runner, [make_request("warm", prompt(5), GREEDY)])
    return runner


def gate_of(runner, monkeypatch, chosen, **options):
    gate = Gate(getattr(runner.programs, "_programs", runner.programs), chosen, **options)
    monkeypatch.setattr(runner, "programs", gate)
    monkeypatch.setattr(runner, "compiled_aside", lambda: None)
    return gate


def expected(runner, monkeypatch, requests):
    with monkeypatch.context() as patch:
        patch.setattr(runner, "compiled_aside", None)
        return alone(runner, requests)


def made(request):
    return [s.made for s in request.sequences]


def tokens(requests):
    return [[s.output_ids.tolist() for s in r.sequences] for r in requests]


def decoding(engine, count):
    """Start this many requests, and step until all of them decode."""
    requests = [make_request(str(i), prompt(5 + 3 * i, i), LONG) for i in range(count)]
    for request in requests:
        engine.add(request)
    while not all(request.sequences[0].made > 1 for request in requests):
        engine.step()
    return requests


@pytest.mark.parametrize("params", [GREEDY, SAMPLES], ids=["one", "samples"])
@pytest.mark.parametrize("caching", [True, False])
def test_decodes_go_on_while_a_prefill_is_compiled(runner, monkeypatch, params, caching):
    armed = False
    gate = gate_of(runner, monkeypatch, lambda key: armed and is_prefill(key))
    engine = make_engine(runner, prefix_caching=caching, budget=2 * BLOCK)
    running, late = decoding(engine, 2), make_request("late", prompt(3 * BLOCK + 1, 9), params)
    before, armed = [request.sequences[0].made for request in running], True
    engine.add(late)
    held = int(engine.manager.pool.num_held)
    for _ in range(8):
        engine.step()
    assert gate.pending and not engine.is_held and [s.status for s in late.sequences] == [Status.WAITING] * params.n
    assert [r.sequences[0].made - was for r, was in zip(running, before, strict=True)] == [8, 8]
    assert int(engine.manager.pool.num_held) <= held + 2 * 3 and late.first_scheduled_time is None
    assert late.preemptions == engine.scheduler.preempted == 0
    finish(engine, gate)
    assert tokens([*running, late]) == expected(runner, monkeypatch, [*running, late])


def test_requests_whose_prefill_is_compiled_do_not_wait_for_others(runner, monkeypatch):
    """On a GPU the sampler's features are part of the program: here those of log-probabilities of prompts."""
    armed = False
    engine = make_engine(runner)
    running = decoding(engine, 1)
    slow = make_request("slow", prompt(9, 8), GREEDY)
    fast = make_request("fast", prompt(9, 7), GREEDY)
    key = None

    def chosen(one):
        return armed and is_prefill(one) and not key

    gate, armed = gate_of(runner, monkeypatch, chosen), True
    engine.add(slow)
    engine.step()
    [key] = gate.pending
    stuck = gate.pending.pop(key)  # programs of later prefills seem to be there
    engine.add(fast)
    for _ in range(14):
        engine.step()
    assert not fast.sequences[0].pending and fast.finished and made(slow) == [0]
    stuck.set_result(None)
    finish(engine, gate)
    everyone = [*running, slow, fast]
    assert tokens(everyone) == expected(runner, monkeypatch, everyone)


def test_close_while_a_prefill_waits(runner, monkeypatch):
    armed = False
    gate = gate_of(runner, monkeypatch, lambda key: armed and is_prefill(key))
    engine = make_engine(runner)
    running, late, armed = decoding(engine, 1), make_request("late", prompt(9, 9), SAMPLES), True
    engine.add(late)
    engine.step()
    assert engine.scheduler.postponed and gate.pending
    engine.close()
    assert [s.finish_reason for request in [*running, late] for s in request.sequences] == ["abort"] * 4
    assert not engine.has_work


def test_decodes_do_not_wait_for_the_tables_of_a_prefill(runner, monkeypatch):
    """Its entries are not sent with them, as the program that sends them is missing."""
    armed = False
    gate = gate_of(runner, monkeypatch, lambda key: armed and isinstance(key, InstallTables))
    engine = make_engine(runner)
    running, late = decoding(engine, 2), make_request("late", prompt(9, 9), GREEDY)
    before, armed = made(running[0]), True
    engine.add(late)
    for _ in range(4):
        engine.step()
    assert gate.pending and engine.scheduler.postponed and made(running[0]) == [before[0] + 4]
    finish(engine, gate)
    assert tokens([*running, late]) == expected(runner, monkeypatch, [*running, late])


@pytest.mark.parametrize("ends", ["abort", "error"])
def test_the_end_of_a_request_that_waits_for_its_prefill(runner, monkeypatch, ends):
    """A failed compilation is the error of the request that it was for, once; the others do not notice."""
    armed = False
    gate = gate_of(runner, monkeypatch, lambda key: armed and is_prefill(key))
    engine = make_engine(runner)
    running, late, armed = decoding(engine, 2), make_request("late", prompt(9, 9), GREEDY), True
    engine.add(late)
    engine.step()
    cache = runner.cache[0]
    if ends == "abort":
        engine.abort("late")
    else:
        gate.release(ERROR)
        engine.step()
    assert late.finished and late.sequences[0].finish_reason == ends and not engine.is_held
    for _ in range(3):
        engine.step()
    assert bool(gate.pending) is (ends == "abort"), "nothing is compiled again for nobody"
    assert ends == "abort" or "no kernel for this shape" in late.error
    assert all(s.failures == 0 for request in running for s in request.sequences)
    armed = False
    finish(engine, gate)
    assert cache is not None and tokens(running) == expected(runner, monkeypatch, running)


@pytest.mark.parametrize("fails", [False, True])
def test_decodes_go_on_while_a_larger_step_is_compiled(sized, monkeypatch, fails):
    gate = gate_of(sized, monkeypatch, lambda key: is_decode(key) and key.rows > 2)
    engine = make_engine(sized)
    running = decoding(engine, 2)
    late = make_request("late", prompt(9, 9), GREEDY)
    engine.add(late)
    before = [request.sequences[0].made for request in running]
    for _ in range(8):
        engine.step()
    assert gate.pending and not engine.is_held and made(late) == [1]
    assert [r.sequences[0].made - was for r, was in zip(running, before, strict=True)] == [8, 8]
    if fails:
        gate.release(ERROR)
        engine.step()
        assert late.finished and "no kernel for this shape" in late.error and not gate.pending
    finish(engine, gate)
    whole = running if fails else [*running, late]
    assert tokens(whole) == expected(sized, monkeypatch, whole)
    assert [s.finish_reason for r in whole for s in r.sequences] == ["length"] * len(whole)


@pytest.mark.parametrize("fails", [False, True])
def test_a_larger_step_serves_while_a_smaller_one_is_compiled(sized, monkeypatch, fails):
    gate = gate_of(sized, monkeypatch, lambda key: is_decode(key) and key.rows == 2, substitutes=True)
    engine, used = make_engine(sized), []
    monkeypatch.setattr(sized, "_launch", lambda key, *arrays: used.append(key) or sized.replay(key, arrays))
    running = decoding(engine, 2)
    assert [key.rows for key in gate.pending] == [2] and not engine.is_held
    assert {key.rows for key in used if is_decode(key)} <= {1, ROWS}
    if fails:
        for _ in range(4):
            gate.release(ERROR)
            engine.step()
        assert not gate.pending, "it is not compiled again and again"
        while engine.has_work:
            engine.step()
    else:
        gate.release()
        used.clear()
        engine.step()
        assert [key.rows for key in used if is_decode(key)] == [2]
    finish(engine, gate)
    assert tokens(running) == expected(sized, monkeypatch, running)


def test_which_steps_cover_others(sized, runner):
    ours = [key for key in sized.programs._ready if is_decode(key)]
    one, whole = min(ours, key=lambda key: key.rows), replace(min(ours, key=lambda key: key.rows), tokens=8, rows=8)
    assert covers(whole, one) and covers(one, one) and not covers(one, whole)
    assert not covers(replace(whole, contiguous=True), one) and not covers(replace(whole, candidates=16), one)
    assert not covers(replace(whole, pending=True), one)
    assert not covers(next(key for key in sized.programs._ready if is_prefill(key)), one)


@pytest.mark.parametrize("seed", range(2))
def test_random_compilations_of_a_model_with_windows(sized, monkeypatch, seed):
    """Programs vanish and come back or fail at random, in a small cache, with aborts, pauses and beams of blocks."""
    rng, missing = random.Random(seed), set()

    def chosen(key):
        if key not in missing and rng.random() < 0.03:
            missing.add(key)
        return key in missing

    gate = gate_of(sized, monkeypatch, chosen, substitutes=bool(seed % 2))
    engine, requests = make_engine(sized, pool_blocks=60, budget=rng.choice([6, CHUNK])), []
    postponed = 0
    for _ in range(4000):
        if len(requests) < 30 and rng.random() < 0.1:
            params = rng.choice([GREEDY, LONG, SAMPLES])
            requests.append(
                make_request(str(len(requests)), prompt(40, rng.randrange(3))[: rng.randrange(1, 40)], params)
            )
            engine.add(requests[-1])
        if engine.requests and rng.random() < 0.03:
            engine.abort(rng.choice(list(engine.requests)))
        if gate.pending and rng.random() < 0.2:
            key = rng.choice(list(gate.pending))
            gate.release(ERROR if rng.random() < 0.1 else None, key)
            missing.discard(key)
        if len(requests) == 30 and not engine.has_work:
            break
        gate.ready.clear()
        engine.step()
        postponed += bool(engine.scheduler.postponed)
        if rng.random() < 0.02 and not engine.is_held:
            engine.control.stop("keep")
            assert engine.control.stopped()
            engine.control.resume(recompute=rng.random() < 0.5)
    assert not engine.has_work and not engine.requests and int(engine.manager.pool.num_held) == 0
    assert postponed
    whole = [r for r in requests if not {"abort", "error"} & {s.finish_reason for s in r.sequences}]
    assert 5 < len(whole) < 30 and tokens(whole) == expected(sized, monkeypatch, whole)
