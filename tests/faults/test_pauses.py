"""Pauses, sleep and new weights under running requests, and what of these is refused."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import pytest
from support import checkpoint
from support.compiling import Gate, is_prefill
from support.stepping import PATIENCE, Held, begun, wait_until

from jaxinfer import LLM, AsyncLLM, RequestOutputKind, SamplingParams
from jaxinfer.loading import weights
from jaxinfer.outputs import WeightSegment
from jaxinfer.sharding import make_mesh

pytestmark = pytest.mark.xdist_group("faults")

LENGTH = 24
GREEDY = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
PROMPT, LATER = list(range(40, 61)), list(range(70, 80))


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[LLM]:
    """The shared LLM; afterwards it runs, awake, with its own weights."""
    shared_llm.reset_prefix_cache()
    state = shared_llm.weights(names="jaxinfer")
    yield shared_llm
    control = shared_llm._engine.control
    if control.level:
        shared_llm.wake_up()
    if control.paused:
        shared_llm.pause("abort")
        shared_llm.resume()
    shared_llm.update_weights(state)


@pytest.fixture(scope="module")
def other() -> Any:
    return weights.random(checkpoint.CONFIG, make_mesh(1), seed=5)


def ids(output: Any) -> list[int]:
    return list(output.outputs[0].token_ids)


class Caller(threading.Thread):
    """Generates on a thread of its own."""

    def __init__(self, llm: LLM, *prompts: list[int]):
        super().__init__(daemon=True)
        self.llm, self.prompts, self.made = llm, prompts, []
        self.start()

    def run(self) -> None:
        self.made = self.llm.generate(list(self.prompts), GREEDY, use_tqdm=False)

    def output(self) -> list[Any]:
        self.join(PATIENCE)
        assert not self.is_alive()
        return self.made


def made(llm: LLM) -> list[int]:
    """Number of tokens of each sequence."""
    return llm._thread.run(_made, llm._engine)


def _made(engine: Any) -> list[int]:
    return [sequence.made for request in engine.requests.values() for sequence in request.sequences]


@contextmanager
def half_way(llm: LLM, *prompts: list[int]) -> Iterator[Caller]:
    """A call of which each request has some tokens, and gets no more until the context is left."""
    with Held(llm._engine, lambda: min(_made(llm._engine), default=0) > 2) as steps:
        caller = Caller(llm, *prompts)
        steps.wait(caller.is_alive)
        yield caller


def test_a_paused_request_continues_where_it_was(llm):
    expected = [ids(output) for output in llm.generate([PROMPT, LATER], GREEDY)]
    with half_way(llm, PROMPT, LATER) as caller:
        llm.pause()
    llm.pause("keep")  # as it is
    done = made(llm)
    late = Caller(llm, LATER)
    wait_until(lambda: len(llm._engine.requests) == 3, late.is_alive)
    time.sleep(0.2)
    assert caller.is_alive() and late.is_alive()
    assert made(llm) == [*done, 0], "nothing was computed, and what arrived waits"
    llm.resume()
    assert [ids(output) for output in caller.output()] == expected
    assert ids(late.output()[0]) == expected[1]


def test_a_pause_lets_a_step_start_that_waits_for_its_programs(llm, monkeypatch):
    """It is planned, so it must run before weights may change."""
    [expected], engine = llm.generate([PROMPT], GREEDY), llm._engine
    gate = Gate(engine.runner.programs, is_prefill)
    monkeypatch.setattr(engine.runner, "programs", gate)
    caller = Caller(llm, PROMPT)
    wait_until(lambda: engine.is_held, caller.is_alive)
    pausing = threading.Thread(target=llm.pause)
    pausing.start()
    wait_until(lambda: len(llm._thread._driven) == 2, pausing.is_alive)  # the call's and the pause's
    assert engine.is_held and engine.control.pausing and not engine.control.paused
    gate.release()
    pausing.join(PATIENCE)
    assert engine.control.paused and not engine.is_held
    assert made(llm) == [1] and caller.is_alive()
    llm.resume()
    assert ids(caller.output()[0]) == ids(expected)


def test_pause_aborts_or_waits_if_asked(llm):
    [expected], engine = llm.generate([PROMPT], GREEDY), llm._engine
    with half_way(llm, PROMPT) as caller:
        llm.pause("abort")
    [output] = caller.output()
    assert output.outputs[0].finish_reason == "abort" and ids(output) == ids(expected)[: len(ids(output))]
    llm.resume()
    with half_way(llm, PROMPT) as caller:
        pausing = threading.Thread(target=llm.pause, args=("wait",))
        pausing.start()
        wait_until(lambda: engine.scheduler.waiting.last_arrival is not None, pausing.is_alive)
        late = Caller(llm, LATER)
        wait_until(lambda: len(engine.requests) == 2, late.is_alive)
    pausing.join(PATIENCE)
    assert ids(caller.output()[0]) == ids(expected)
    assert made(llm) == [0] and late.is_alive(), "it came after the pause had begun"
    llm.resume()
    assert len(ids(late.output()[0])) == LENGTH
    llm.pause("wait")  # with nothing to wait for
    llm.resume()


@pytest.mark.parametrize("recompute", [False, True])
def test_weights_are_replaced_under_a_paused_request(llm, other, recompute):
    """Its tokens say which weights made them, and nobody finds its old cache."""
    old = llm.weight_version
    [before] = llm.generate([PROMPT], GREEDY)
    assert before.outputs[0].weight_segments == (WeightSegment(old, 0, LENGTH),)
    llm.reset_prefix_cache()
    with half_way(llm, PROMPT) as caller:
        llm.pause()
    assert llm.update_weights(other).version == llm.weight_version == old + 1
    llm.resume(recompute=recompute)
    [output] = caller.output()
    first, second = output.outputs[0].weight_segments
    assert (first.version, first.start, second.version, second.stop) == (old, 0, old + 1, LENGTH)
    assert first.stop == second.start and ids(output)[: first.stop] == ids(before)[: first.stop]
    [after] = llm.generate([PROMPT], GREEDY)
    if recompute:  # the other weights continue the text as if they had always been there
        assert output.metrics.num_preemptions == 1
        [expected] = llm.generate([[*PROMPT, *ids(output)[: first.stop]]], GREEDY)
        assert ids(output)[first.stop :] == ids(expected)[: LENGTH - first.stop]
    else:
        assert after.num_cached_tokens == 0
    llm.reset_prefix_cache()
    [again] = llm.generate([PROMPT], GREEDY)
    assert ids(again) == ids(after) != ids(before)


def test_a_prompt_that_is_not_computed_yet_starts_over(llm, other):
    long = [5 + i for i in range(100)]  # four chunks
    with Held(llm._engine, lambda: any(s.computed for s in llm._engine.scheduler.rows.active)) as steps:
        caller = Caller(llm, long)
        steps.wait(caller.is_alive)
        llm.pause()
    [computed] = llm._thread.run(lambda: [s.computed for s in llm._engine.scheduler.rows.active])
    assert 0 < computed < len(long)
    version = llm.update_weights(other).version
    llm.resume()
    [output], [alone] = caller.output(), llm.generate([long], GREEDY)
    assert ids(output) == ids(alone) and alone.num_cached_tokens
    assert output.outputs[0].weight_segments == (WeightSegment(version, 0, LENGTH),)


def test_sleep_frees_the_cache_and_the_weights_and_keeps_programs(llm):
    [before] = llm.generate([PROMPT], GREEDY)
    names, checksum = llm.weights(), llm.weights_checksum()
    names = {name: jax.device_get(tensor) for name, tensor in names.items()}
    compiled = len(llm._engine.runner.compile_seconds)
    runner = llm._engine.runner
    cache = sum(array.nbytes for array in jax.tree.leaves((runner.cache, runner.rows, runner.edits)))
    weights = sum(array.nbytes for array in runner.params)
    live = sum(array.nbytes for array in jax.live_arrays())
    llm.sleep()
    assert sum(array.nbytes for array in jax.live_arrays()) == live - cache
    with pytest.raises(RuntimeError, match=r"sleeps \(level 1\); call wake_up"):
        llm.generate([PROMPT], GREEDY)
    llm.sleep(2)  # deeper; the fixture holds the weights, so they stay
    assert all(param is None for param in llm._engine.runner.params) and weights
    assert "asleep" in repr(llm) and "asleep" in llm._repr_html_()
    with pytest.raises(RuntimeError, match="level=1.*sleeps at level 2 already"):
        llm.sleep(1)
    with pytest.raises(RuntimeError, match="give all of them"):
        llm.update_weights({"model.norm.weight": names["model.norm.weight"]}, partial=True)
    llm.wake_up()
    with pytest.raises(RuntimeError, match="dropped the weights; pass new ones with update_weights"):
        llm.generate([PROMPT], GREEDY)
    with pytest.raises(RuntimeError, match="has dropped them"):
        llm.weights()
    assert llm.update_weights(names).checksum == checksum
    [after] = llm.generate([PROMPT], GREEDY)
    assert ids(after) == ids(before) and after.num_cached_tokens == 0
    assert len(llm._engine.runner.compile_seconds) == compiled


def test_what_cannot_be_is_refused_and_the_engine_serves_on(llm, other):
    [expected] = llm.generate([PROMPT], GREEDY)
    for call, error, message in [
        (llm.resume, RuntimeError, "resume: the engine is not paused"),
        (llm.wake_up, RuntimeError, "wake_up: the engine does not sleep"),
        (lambda: llm.pause("now"), ValueError, "mode must be one of keep, abort, wait, got 'now'"),
        (lambda: llm.sleep(3), ValueError, "level must be 1 .*, got 3"),
        (lambda: llm.sleep(True), ValueError, "level must be 1 .*, got True"),
    ]:
        with pytest.raises(error, match=message):
            call()
    with half_way(llm, PROMPT) as caller:
        with pytest.raises(RuntimeError, match=r"sleep while 1 request\(s\) are running or paused"):
            llm.sleep()
        with pytest.raises(RuntimeError, match="update_weights while requests are running; pause"):
            llm.update_weights(other)
        llm.pause()
    with pytest.raises(RuntimeError, match=r"sleep while 1 request\(s\)"):
        llm.sleep()
    llm.resume()
    assert ids(caller.output()[0]) == ids(expected)
    llm.sleep()
    for call in (llm.pause, llm.resume):
        with pytest.raises(RuntimeError, match="sleeps"):
            call()
    llm.wake_up()
    assert ids(llm.generate([PROMPT], GREEDY)[0]) == ids(expected)


def test_a_stream_waits_while_paused_and_is_closed_or_aborted(llm):
    expected = ids(llm.generate([PROMPT], GREEDY)[0])
    stream = llm.stream([PROMPT], GREEDY)
    first = next(stream)
    llm.pause()
    timer = threading.Timer(0.3, llm.resume)
    started = time.monotonic()
    timer.start()
    rest = [token for output in stream for token in ids(output)]
    assert [*ids(first), *rest] == expected and time.monotonic() - started > 0.25
    stream = llm.stream([PROMPT], GREEDY)
    first = next(stream)
    llm.pause()
    llm.abort(first.request_id)
    *_, last = stream
    assert last.outputs[0].finish_reason == "abort"
    llm.resume()


def test_async_streams_keep_their_place_over_an_update(llm, other):
    expected = ids(llm.generate([PROMPT], GREEDY)[0])
    llm.reset_prefix_cache()
    version = llm.weight_version

    async def main(steps: Held) -> Any:
        own = AsyncLLM.of(llm)
        last, params = None, replace(GREEDY, output_kind=RequestOutputKind.CUMULATIVE)
        async for output in own.generate(PROMPT, params):
            last = output
            if own.weight_version == version:
                await own.pause()
                steps.release()
                report = await own.update_weights(other)
                assert report.version == own.weight_version
                assert report.checksum != await own.weights_checksum(), "of paths, and of names"
                await own.resume()
        return last

    with Held(llm._engine, lambda: begun(llm._engine)) as steps:
        last = asyncio.run(main(steps))
    first, second = last.outputs[0].weight_segments
    assert ids(last)[: first.stop] == expected[: first.stop] and second.stop == LENGTH
