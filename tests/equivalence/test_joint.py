"""A joint step, of prefill chunks and decodes together, gives what a prefill and a decode step give."""

from dataclasses import replace

import pytest
from support.cases import EDGES, GREEDY, alone, mixed, poison, requests
from support.compiling import Gate
from support.tiny import (
    BLOCK,
    CHUNK,
    divided_runner,
    joint_runner,
    make_engine,
    make_request,
    prompt,
    random_runner,
    run,
)

from jaxinfer.engine.runner.runner import Runner
from jaxinfer.sampling_params import SamplingParams

pytestmark = pytest.mark.xdist_group("llama")


def spied(engine, monkeypatch):
    """Return a list that gets, for each step with chunks and decodes, whether it is a joint one."""
    found, dispatch = [], engine.runner.dispatch

    def noted(flight):
        if flight.plan.chunks and flight.plan.decodes:
            found.append(any(getattr(launch.key, "decodes", 0) for launch in flight.launches))
        dispatch(flight)

    monkeypatch.setattr(engine.runner, "dispatch", noted)
    return found


@pytest.mark.parametrize("spare", [None, 2])
def test_chunks_and_decodes_are_one_step(spare, monkeypatch):
    two = random_runner()
    edited = dict(repetition_penalty=1.3, logit_bias={7: 1.0}, min_tokens=3, stop_token_ids=[5])
    late = SamplingParams(temperature=0, max_tokens=10, **edited)
    wanted = [*mixed(EDGES), *(make_request(f"edited {i}", prompt(9 + i, 70 + i), late) for i in range(3))]
    longest = max(EDGES) + GREEDY.max_tokens
    blocks = None if spare is None else -(-longest // BLOCK) + spare
    engine = make_engine(joint_runner(two), pool_blocks=blocks)
    poison(engine.runner)
    steps = spied(engine, monkeypatch)
    assert run(engine, wanted) == alone(two, wanted)
    assert steps and all(steps)
    assert (engine.scheduler.preempted > 0) is (spare is not None)
    assert all(s.finish_reason in ("length", "stop") for r in wanted for s in r.sequences)


def test_what_it_does_not_serve_are_two_steps(monkeypatch):
    two = random_runner()
    own = SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=1)
    wanted = [*requests([5, 7], GREEDY), make_request("p", prompt(3 * CHUNK, 9), own)]
    engine = make_engine(joint_runner(two))
    steps = spied(engine, monkeypatch)
    assert run(engine, wanted) == alone(two, wanted)
    assert False in steps
    assert sum(len(part.chosen) for part in wanted[-1].prompt_logprobs) == 3 * CHUNK - 1


def test_more_sequences_than_it_has_room_for_are_two_steps(monkeypatch):
    two = divided_runner()
    few = Runner(two.program, two.params, replace(two.shapes, joint_buckets=((CHUNK, 4),)), programs=two.programs)
    wanted = requests(EDGES, GREEDY)
    engine = make_engine(few)
    steps = spied(engine, monkeypatch)
    assert run(engine, wanted) == alone(two, wanted)
    assert {True, False} == set(steps)


@pytest.mark.parametrize("compiles", [True, False])
def test_a_step_does_not_wait_for_the_program_of_a_joint_one(compiles, monkeypatch):
    two = random_runner()
    engine = make_engine(joint_runner(two))
    gate = Gate(engine.runner.programs, lambda key: getattr(key, "decodes", 0) > 0)
    monkeypatch.setattr(engine.runner, "programs", gate)
    monkeypatch.setattr(engine.runner, "compiled_aside", lambda: None)
    steps, wanted = spied(engine, monkeypatch), mixed(EDGES)
    expected = alone(two, wanted)
    for request in wanted:
        engine.add(request)
    while engine.has_work:
        engine.step()
        assert not engine.is_held
        if len(steps) == 3 and gate.pending:
            gate.release(None if compiles else ValueError("no"))
    assert [[s.output_ids.tolist() for s in request.sequences] for request in wanted] == expected
    assert steps[:3] == [False] * 3 and len(steps) > 5
    assert all(step is compiles for step in steps[3:]) and not gate.pending, "one that fails is not tried again"


def test_it_is_not_compiled_beside_the_prefill_that_a_prompt_waits_for(monkeypatch):
    engine = make_engine(joint_runner(random_runner()))
    gate = Gate(engine.runner.programs)
    monkeypatch.setattr(engine.runner, "programs", gate)
    first, second = requests([5, 7], GREEDY)
    engine.add(first)
    for _ in range(3):
        engine.step()
    monkeypatch.setattr(engine.runner, "compiled_aside", lambda: None)
    gate.ready.update(key for key in engine.runner.programs.seconds if getattr(key, "kind", "") != "prefill")
    engine.add(second)
    for _ in range(3):
        engine.step()
        assert gate.pending and not any(getattr(key, "decodes", 0) for key in gate.pending)
    gate.release()
    for _ in range(3):
        engine.step()
    assert second.sequences[0].made
