"""Requests that end before their time, interrupts, threads, two engines, closing."""

import contextlib
import gc
import os
import select
import signal
import threading
import time
import warnings
import weakref

import pytest
from faults.conftest import settle
from flax import nnx
from support.stepping import PATIENCE, Held, wait_until

from jaxinfer import LLM, SamplingParams
from jaxinfer.errors import EngineClosedError

pytestmark = pytest.mark.xdist_group("faults")

LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
IDS = [10, 11, 12, 13, 14]


def tokens(results):
    return [list(r.outputs[0].token_ids) for r in results]


def test_a_consumer_that_stops(llm):
    expected = tokens(llm.generate([IDS], SHORT))
    stream = llm.stream([IDS, [9] * 30], LONG)
    next(stream)
    stream.close()
    settle(llm)
    assert not llm._engine.requests
    for _update in llm.stream([IDS], LONG):
        break
    del _update
    assert tokens(llm.generate([IDS], SHORT)) == expected


def test_a_stream_that_nobody_reads(llm):
    """It is checked at once, and queued when it is first read."""
    stream = llm.stream([IDS], LONG)
    assert not llm._engine.requests
    del stream
    stream = llm.stream([IDS], LONG)
    next(stream)
    assert llm._engine.requests
    del stream
    settle(llm)
    assert not llm._engine.requests


def test_a_slow_consumer_makes_the_engine_wait(llm):
    """Nothing runs ahead of a stream that is not read, so nothing piles up."""
    stream = llm.stream([IDS], LONG)
    next(stream)
    made = llm._engine.metrics.counters["generation_tokens"]
    time.sleep(0.05)
    assert llm._engine.metrics.counters["generation_tokens"] == made
    assert len(next(stream).outputs[0].token_ids) == 1
    stream.close()


def test_a_stream_of_several_steps_at_once(llm, host):
    """Its deltas carry several tokens, and add up to what one at a time gives, stop strings and all."""
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    [whole] = llm.generate([IDS], params)
    text = whole.outputs[0].text
    stop = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, stop=text[len(text) // 2 :][:2])
    [stopped] = llm.generate([IDS], stop)
    assert stopped.outputs[0].finish_reason == "stop" and 1 < len(stopped.outputs[0].token_ids) < 30
    with host(decode_steps=8):
        for asked, expected in ((params, whole), (stop, stopped)):
            deltas = [update.outputs[0] for update in llm.stream([IDS], asked)]
            assert max(len(delta.token_ids) for delta in deltas) > 1
            assert "".join(delta.text for delta in deltas) == expected.outputs[0].text
            assert [token for delta in deltas for token in delta.token_ids] == list(expected.outputs[0].token_ids)
            assert deltas[-1].finish_reason == expected.outputs[0].finish_reason
        stream = llm.stream([IDS], LONG)
        next(stream)
        next(stream)
        stream.close()
        assert tokens(llm.generate([IDS], params)) == tokens([whole])


@pytest.mark.parametrize("steps", range(6))
@pytest.mark.parametrize("n", [1, 3])
def test_abort_wherever_it_is(llm, n, steps):
    """Waiting, in the chunks of its prompt, decoding, with a step in flight."""
    params = SamplingParams(temperature=0.5, seed=1, n=n, max_tokens=40, ignore_eos=True)
    [expected] = tokens(llm.generate([IDS], SHORT))
    handles = llm._prepare([[9] * 70, IDS], [params, SHORT])
    lease = llm._thread.lease()
    llm._thread.add(lease.call, [handle.request for handle in handles])
    for _ in range(steps):
        llm._thread.run(llm._engine.step)
    llm.abort(handles[0].request.id)
    llm.abort(handles[0].request.id)
    while not all(handle.finished for handle in handles):
        llm._thread.run(llm._engine.step)
    aborted, other = (handle.output() for handle in handles)
    assert [o.finish_reason for o in aborted.outputs] == ["abort"] * n
    assert list(other.outputs[0].token_ids) == expected


def test_abort_of_what_is_not_there(llm):
    [result] = llm.generate([IDS], SHORT)
    llm.abort(result.request_id)
    llm.abort(["no such id", result.request_id])
    llm.abort([])
    assert llm.generate([IDS], SHORT)[0].finished


def test_abort_from_another_thread(llm):
    done = []
    thread = threading.Thread(target=lambda: done.append(llm.generate([IDS], LONG, use_tqdm=False)))
    engine = llm._engine
    with Held(engine, until=lambda: not engine.requests):
        thread.start()
        wait_until(lambda: engine.requests, thread.is_alive)
        llm.abort(list(engine.requests))
        thread.join(PATIENCE)
    [[result]] = done
    assert result.outputs[0].finish_reason == "abort"


@pytest.mark.parametrize("at", ["schedule", "run", "commit"])
def test_an_interrupted_call_and_the_next(llm, monkeypatch, at):
    expected = tokens(llm.generate([IDS, [9] * 40], SHORT))
    engine = llm._engine
    owner, name = {
        "schedule": (engine.scheduler.prefills, "plan"),
        "run": (engine.runner, "run"),
        "commit": (engine.committer, "_take_token"),
    }[at]
    whole, calls = getattr(owner, name), []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([IDS, [9] * 40], LONG)
    monkeypatch.undo()
    settle(llm)
    assert not engine.requests
    assert int(engine.manager.pool.num_held) == 0
    assert tokens(llm.generate([IDS, [9] * 40], SHORT)) == expected


def test_an_interrupt_leaves_another_threads_call_whole(llm, monkeypatch):
    """Whoever is interrupted, the other's requests are computed again."""
    expected = tokens(llm.generate([IDS], LONG))
    stream = llm.stream([IDS], LONG)
    got = list(next(stream).outputs[0].token_ids)
    run, calls = llm._engine.runner.run, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) % 4 == 3:
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr(llm._engine.runner, "run", interrupted)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[9] * 40], LONG)
    monkeypatch.undo()
    for update in stream:
        got += update.outputs[0].token_ids
    assert [got] == expected


def test_four_threads(llm):
    prompts = [[[20 + t, i, 5] * (1 + (t + i) % 7) for i in range(6)] for t in range(4)]
    params = [SamplingParams(temperature=0.3, seed=t, max_tokens=8 + t, ignore_eos=True) for t in range(4)]
    expected = [tokens(llm.generate(p, q)) for p, q in zip(prompts, params, strict=True)]
    results: dict[int, list] = {}

    def work(t: int) -> None:
        results[t] = [tokens(llm.generate(prompts[t], params[t], use_tqdm=False)) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert results == {t: [expected[t]] * 3 for t in range(4)}


def test_threads_with_text(llm):
    """Tokenising and detokenising at the same time."""
    words = ["hello world", "the cat \U0001f600", "sat on", "the mat"]
    expected = [llm.generate(word, LONG)[0].outputs[0].text for word in words]
    results: dict[int, list[str]] = {}

    def work(t: int) -> None:
        results[t] = [llm.generate(words[t], LONG, use_tqdm=False)[0].outputs[0].text for _ in range(3)]

    threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert results == {t: [expected[t]] * 3 for t in range(4)}


def test_a_short_call_does_not_wait_for_a_long_one(llm):
    """Steps are taken for all calls together, and each returns when its own requests have ended."""
    prompts = [[30 + i] * 3 for i in range(4)]
    order = []

    def work() -> None:
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=120, ignore_eos=True), use_tqdm=False)
        order.append("long")

    thread, engine = threading.Thread(target=work), llm._engine
    returning = Held(engine, lambda: len(engine.requests) == 4, until=lambda: order)  # the long one has ample time left
    with returning, Held(engine, until=lambda: len(engine.requests) == 5):
        thread.start()
        wait_until(lambda: len(engine.requests) == 4, thread.is_alive)
        llm.generate([IDS], SHORT)
        order.append("short")
    thread.join(PATIENCE)
    assert order == ["short", "long"]


@pytest.mark.slow
def test_two_engines(llm, make_llm):
    expected = tokens(llm.generate([IDS, [9] * 20], LONG))
    with make_llm(max_num_seqs=4, max_num_batched_tokens=16, prefill_buckets=(16,), decode_buckets=(4,)) as other:
        streams = [one.stream([IDS, [9] * 20], LONG) for one in (llm, other)]
        last: list[dict[str, list[int]]] = [{}, {}]
        for _ in range(200):
            for which, stream in enumerate(streams):
                update = next(stream, None)
                if update is not None:
                    last[which].setdefault(update.request_id, []).extend(update.outputs[0].token_ids)
        assert [list(found.values()) for found in last] == [expected, expected]


def test_use_after_close(make_llm):
    with make_llm() as llm:
        stream = llm.stream([IDS], LONG)
    for call in (
        lambda: llm.generate([IDS]),
        lambda: llm.generate("text"),
        lambda: llm.chat([{"role": "user", "content": "x"}]),
        lambda: llm.stream([IDS]),
        lambda: llm.abort("0"),
        llm.get_metrics,
        llm.reset_prefix_cache,
        lambda: next(stream),
        lambda: llm.update_weights(nnx.State({})),
    ):
        with pytest.raises(EngineClosedError, match="closed"):
            call()
    llm.close()
    stream.close()


def test_close_while_another_thread_generates(make_llm):
    llm = make_llm()
    seen = []

    def work() -> None:
        try:
            llm.generate([[9] * 3] * 8, SamplingParams(temperature=0, max_tokens=120, ignore_eos=True), use_tqdm=False)
        except EngineClosedError as error:
            seen.append(error)

    thread = threading.Thread(target=work)
    engine = llm._engine
    with Held(engine):
        thread.start()
        wait_until(lambda: engine.requests, thread.is_alive)
        llm.close()
    thread.join(PATIENCE)
    assert not thread.is_alive() and len(seen) == 1


def test_an_unknown_setting_is_named(folder):
    with pytest.raises(TypeError, match="max_num_seq.*max_num_seqs"):
        LLM(folder, max_num_seq=3)


def test_a_close_that_is_interrupted_lets_go_of_everything_all_the_same(make_llm, monkeypatch):
    llm = make_llm()
    thread, engine = llm._thread._thread, weakref.ref(llm._engine)
    with monkeypatch.context() as patch:
        patch.setattr(thread, "join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with contextlib.suppress(KeyboardInterrupt):
            llm.close()
    thread.join()
    until = time.monotonic() + PATIENCE  # threads that compile may hold what they compile for a little longer
    while engine() is not None and time.monotonic() < until:
        gc.collect()
        time.sleep(0.02)
    assert engine() is None, gc.get_referrers(engine())
    llm.close()


def test_a_call_finds_the_llm_closed_by_another_thread_meanwhile(make_llm, monkeypatch):
    """At whatever moment: here while it tokenises, and before it looks at the engine."""
    llm = make_llm()
    parse = llm._input_processor.parse
    monkeypatch.setattr(llm._input_processor, "parse", lambda prompts: (llm.close(), parse(prompts))[1])
    with pytest.raises(EngineClosedError):
        llm.generate([IDS], SHORT)
    for call in (lambda: llm.default_params, lambda: llm._engine, lambda: llm._input_processor):
        with pytest.raises(EngineClosedError):
            call()


def test_a_fork_of_the_process_is_told_that_it_has_no_engine(llm):
    """JAX's threads are not copied, nor is the engine's: calls say so, and `close` ends nothing of the parent's."""
    expected = tokens(llm.generate([IDS], SHORT))

    def in_child(write):
        said = []
        for call in (lambda: llm.generate([IDS], SHORT), lambda: next(llm.stream([IDS], SHORT)), llm.close):
            try:
                said.append(str(call()))
            except EngineClosedError as error:
                said.append(str(error))
        os.write(write, "|".join(said).encode())

    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if not child:
        try:
            in_child(write)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        if not select.select([pipe], [], [], PATIENCE)[0]:
            os.kill(child, signal.SIGKILL)  # a lock that another thread held at the fork stays locked in the child
        generated, streamed, closed = pipe.read().split("|")
    os.waitpid(child, 0)
    assert generated == streamed and f"made in process {os.getpid()}" in generated and "'spawn'" in generated
    assert closed == "None"
    assert tokens(llm.generate([IDS], SHORT)) == expected
