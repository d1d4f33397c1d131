"""Interrupts wherever they come, streams dropped anywhere, a device that is lost: the engine stays whole or says it is
dead."""

import gc
import itertools
import sys
import threading
import time

import pytest
from faults.conftest import assert_idle, settle

from jaxinfer import LLM, SamplingParams
from jaxinfer.engine.divided_call import DividedCall
from jaxinfer.errors import EngineDeadError

pytestmark = pytest.mark.xdist_group("faults")

IDS = [10, 11, 12, 13, 14]
SHORT = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)


class Interrupts:
    """A trace function that raises KeyboardInterrupt at some line events of the package on this thread, counted from
    0."""

    def __init__(self, *at: int):
        self.at, self.count = set(at), 0

    def __call__(self, frame, event, argument):
        if "jaxinfer" not in frame.f_code.co_filename or "tests" in frame.f_code.co_filename:
            return None
        if event == "line":
            self.count += 1
            if self.count - 1 in self.at:
                raise KeyboardInterrupt
        return self

    def __enter__(self):
        sys.settrace(self)
        return self

    def __exit__(self, *exception):
        sys.settrace(None)


def answers(llm: LLM) -> list[list[int]]:
    return [list(r.outputs[0].token_ids) for r in llm.generate([IDS, [9] * 40], SHORT, use_tqdm=False)]


def stream(llm: LLM) -> None:
    for _ in llm.stream([IDS], SHORT):
        pass


@pytest.mark.parametrize("again", [None, 1, 3])
@pytest.mark.parametrize("call", [answers, stream])
def test_an_interrupt_at_any_line_of_a_call(llm, call, again):
    """At forty lines spread over it, and once more a line or three later: nothing is held, and the next call is
    right."""
    expected = answers(llm)
    with Interrupts() as lines:
        call(llm)
    assert lines.count > 100
    interrupted = 0
    for at in range(again or 0, lines.count, lines.count // 40):
        try:
            with Interrupts(at, *[] if again is None else [at + again]):
                call(llm)
        except KeyboardInterrupt:
            interrupted += 1
        settle(llm)
        assert not llm._engine.requests, at
        if at % 3 == 0:
            assert answers(llm) == expected
    assert interrupted > 10
    assert_idle(llm)


def test_a_neighbour_of_an_interrupted_call_goes_on(llm):
    expected = answers(llm)
    found: list[list[list[int]]] = []
    neighbour = threading.Thread(target=lambda: found.extend(answers(llm) for _ in range(20)))
    neighbour.start()
    for at in itertools.count(5, 11):
        if not neighbour.is_alive():
            break
        try:
            with Interrupts(at % 150):
                stream(llm)
        except KeyboardInterrupt:
            pass
    neighbour.join(120)
    assert found == [expected] * 20


def test_a_stream_in_a_cycle_that_is_collected_within_a_step(llm, monkeypatch):
    """The garbage collector closes it on whatever thread it runs: here the engine's, between schedule and run."""
    expected = answers(llm)

    class Session:
        def __init__(self):
            self.updates, self.itself = llm.stream([IDS], LONG), self

    run = llm._engine.runner.run

    def collects(*args):
        gc.collect()
        return run(*args)

    monkeypatch.setattr(llm._engine.runner, "run", collects)
    for _ in range(3):
        session = Session()
        next(session.updates)
        del session
        assert answers(llm) == expected
    settle(llm)
    assert not llm._engine.requests


def test_an_interrupt_does_not_wait_for_a_step(llm, monkeypatch):
    run = llm._engine.runner.run
    monkeypatch.setattr(llm._engine.runner, "run", lambda *args: (time.sleep(0.5), run(*args))[1])
    start = time.perf_counter()  # all 60 steps would take 30 seconds
    with pytest.raises(KeyboardInterrupt), Interrupts(400):
        llm.generate([IDS], LONG, use_tqdm=False)
    taken = time.perf_counter() - start
    monkeypatch.undo()
    assert taken < 15
    settle(llm)


def test_a_lost_device_is_one_clear_error(make_llm, monkeypatch):
    """The step fails, and so does the new cache: every call says so, nothing is held, and `close` works."""
    llm = make_llm()
    stream, other = llm.stream([IDS], LONG), llm._prepare([IDS], SHORT)
    next(stream)
    waiting = DividedCall([llm._thread])
    waiting.add(llm._thread, [other[0].request])
    runner = llm._engine.runner

    def lost(*_):
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

    def gone():
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(runner, "run", lost)
    monkeypatch.setattr(runner, "reset", gone)
    calls = [
        lambda: next(stream),
        lambda: waiting.drive(llm._thread, lambda: not other[0].finished) or waiting.wait(),  # it came to wait only now
        lambda: llm.generate([IDS], SHORT),
        lambda: llm.warmup(use_tqdm=False),
        lambda: llm.update_weights({}),
    ]
    for call in calls:
        with pytest.raises(EngineDeadError, match="ILLEGAL_ADDRESS.*device is gone.*close this LLM"):
            call()
    stream.close()
    llm.get_metrics()
    llm.abort("0")
    assert int(llm._engine.manager.pool.num_held) == 0 and not llm._engine.requests
    llm.close()
    llm.close()


def test_the_engine_is_not_called_from_within(llm, monkeypatch):
    """A finalizer that runs within a step may abort; a call would wait for itself."""
    run, errors = llm._engine.runner.run, []

    def calls(*args):
        llm.abort("no such id")
        try:
            llm.generate([IDS], SHORT)
        except RuntimeError as error:
            errors.append(str(error))
        return run(*args)

    monkeypatch.setattr(llm._engine.runner, "run", calls)
    llm.generate([IDS], SHORT, use_tqdm=False)
    monkeypatch.undo()
    assert "from its own engine thread" in errors[0]


def test_an_llm_that_is_dropped_ends_its_thread(make_llm):
    llm = make_llm()
    thread, engine = llm._thread._thread, llm._engine
    del llm
    gc.collect()
    thread.join(30)
    assert not thread.is_alive() and engine is not None
