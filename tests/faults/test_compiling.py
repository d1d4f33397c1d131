"""While a step is compiled: aborts, interrupts, further requests, metrics and `close` do not wait for it."""

import asyncio
import threading
import time

import pytest
from faults.conftest import assert_idle, settle
from support.compiling import Gate, is_decode
from support.stepping import wait_until

from jaxinfer import AsyncLLM, SamplingParams
from jaxinfer.engine.divided_call import DividedCall
from jaxinfer.errors import EngineClosedError

pytestmark = pytest.mark.xdist_group("faults")

IDS = [10, 11, 12, 13, 14]
SHORT = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
SOON = 20
"""Seconds within which a call must return: a few milliseconds, and what a busy machine adds. That it did not wait for
the compilation is shown by `gate.pending`."""


@pytest.fixture
def gate(llm, monkeypatch):
    """Programs of the shared LLM that seem to be compiled until `release`; afterwards none is."""
    gate = Gate(llm._engine.runner.programs)
    monkeypatch.setattr(llm._engine.runner, "programs", gate)
    yield gate
    gate.release()


class Caller:
    """A call on a thread of its own."""

    def __init__(self, function, *arguments):
        self.result = self.error = None
        self._thread = threading.Thread(target=self._run, args=(function, *arguments))
        self._thread.start()

    def _run(self, function, *arguments):
        try:
            self.result = function(*arguments)
        except BaseException as error:
            self.error = error

    def ended(self, seconds: float) -> bool:
        """Wait at most this long, and return whether the call has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()


def generate(llm, ids=IDS, params=LONG):
    return llm.generate([ids], params, use_tqdm=False)[0].outputs[0]


def test_an_aborted_call_returns(llm, gate):
    caller = Caller(generate, llm)
    wait_until(lambda: gate.pending)
    began = time.perf_counter()
    llm.get_metrics()
    llm.abort(list(llm._engine.requests))
    assert caller.ended(30) and time.perf_counter() - began < SOON
    assert caller.result.finish_reason == "abort" and gate.pending
    assert_idle(llm)


def test_a_request_aborted_before_its_caller_waits(llm, monkeypatch):
    """Its end is told to a call that does not wait yet."""
    add = llm._thread.add

    def aborts(call, requests):
        queued = list(requests)
        add(call, queued)
        llm._thread.run(llm._thread._abort, [request.id for request in queued])

    monkeypatch.setattr(llm._thread, "add", aborts)
    caller = Caller(generate, llm)
    assert caller.ended(30) and caller.result.finish_reason == "abort"


def test_aborted_streams_end_and_others_go_on(llm, gate):
    gate._chosen = is_decode
    expected = Caller(generate, llm)
    streams = [Caller(lambda i=i: list(llm.stream([[20 + i] * 9], LONG))) for i in range(2)]
    wait_until(lambda: gate.pending and len(llm._engine.requests) == 3)
    names = [r.id for r in llm._engine.requests.values() if r.prompt[0] >= 20]
    began = time.perf_counter()
    llm.abort(names)
    assert all(stream.ended(30) for stream in streams) and time.perf_counter() - began < SOON
    assert gate.pending
    assert [stream.result[-1].outputs[0].finish_reason for stream in streams] == ["abort"] * 2
    gate.release()
    assert expected.ended(30) and expected.result.token_ids == generate(llm).token_ids


def test_an_interrupted_call_and_the_next(llm, gate, monkeypatch):
    """The next call's own step is compiled as well: nothing of the first one is left."""
    monkeypatch.setattr("jaxinfer.engine.engine_thread.TURN", 0.01)
    caller = Caller(generate, llm)
    wait_until(lambda: gate.pending)

    class Bar:
        def __call__(self):
            raise KeyboardInterrupt

    call, handles = DividedCall([llm._thread]), llm._prepare([[9] * 20], LONG)
    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        try:
            call.add(llm._thread, [handles[0].request])
            call.drive(llm._thread, lambda: not handles[0].finished)
            call.wait(Bar())
        finally:
            list(call.release)
    settle(llm)
    assert time.perf_counter() - began < SOON and list(llm._engine.requests) and gate.pending
    assert handles[0].finished and handles[0].output().outputs[0].finish_reason == "abort"
    gate.release()
    wait_until(lambda: gate.release() or caller.ended(0.01))
    assert caller.result.finish_reason == "length"


def test_requests_are_queued(llm, gate):
    caller = Caller(generate, llm)
    wait_until(lambda: gate.pending)
    began = time.perf_counter()
    other = Caller(generate, llm, [9] * 20, SHORT)
    wait_until(lambda: len(llm._engine.requests) == 2)
    llm.reset_prefix_cache()
    assert time.perf_counter() - began < SOON and gate.pending
    wait_until(lambda: gate.release() or (caller.ended(0.001) and other.ended(0.001)))
    assert caller.result.token_ids == generate(llm).token_ids
    assert other.result.token_ids == generate(llm, [9] * 20, SHORT).token_ids


def test_a_failed_compilation_is_the_error_of_its_call(llm, gate):
    caller = Caller(generate, llm)
    wait_until(lambda: gate.pending)
    gate.release(RuntimeError("no kernel for this shape"))
    assert caller.ended(30) and caller.result.finish_reason == "error"
    assert "prefill T=32" in caller.result.stop_reason and "no kernel for this shape" in caller.result.stop_reason
    caller = Caller(generate, llm, IDS, SHORT)
    wait_until(lambda: gate.release() or caller.ended(0.001))
    assert caller.result.finish_reason == "length"


def test_asyncio(llm, gate):
    """Streams are queued, aborted and closed on the event loop."""

    async def run():
        server = AsyncLLM.of(llm)
        began = time.perf_counter()
        first, second, third = [await server.add_request([5 + i] * 9, LONG, request_id=str(i)) for i in range(3)]
        while not gate.pending:
            await asyncio.sleep(0.001)
        await server.abort("0")
        last = [output async for output in first][-1]
        second.close()
        assert time.perf_counter() - began < SOON and gate.pending
        gate._chosen = lambda key: False
        gate.release()
        return last.outputs[0].finish_reason, [output async for output in third][-1].outputs[0].finish_reason

    assert asyncio.run(run()) == ("abort", "length")


def test_close(make_llm):
    llm = make_llm()
    threads = {t for t in threading.enumerate() if t.name.startswith("jaxinfer")}
    runner = llm._engine.runner
    gate = runner.programs = Gate(runner.programs, lambda key: True)
    caller = Caller(generate, llm)
    wait_until(lambda: gate.pending)
    began = time.perf_counter()
    llm.close()
    assert time.perf_counter() - began < SOON and gate.pending
    assert caller.ended(30) and isinstance(caller.error, EngineClosedError)
    assert llm._thread._thread in threads and not llm._thread.alive
