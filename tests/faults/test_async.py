"""Requests of asyncio programs: outputs, slow and vanished consumers, many streams, failures, closed event loops."""

import asyncio
from contextlib import aclosing

import pytest
from faults.conftest import settle
from support.stepping import Held, begun, wait_until

from jaxinfer import AsyncLLM, RequestOutputKind, SamplingParams
from jaxinfer.errors import EngineClosedError, EngineDeadError

pytestmark = pytest.mark.xdist_group("faults")

IDS = [10, 11, 12, 13, 14]
SHORT = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
CHAT = [{"role": "user", "content": "hello cat"}]


@pytest.fixture
def async_llm(llm):
    return AsyncLLM.of(llm)


async def joined(outputs) -> tuple[str, list[int], str]:
    """Text, tokens and finish reason of a stream of deltas."""
    text, tokens, reason = "", [], None
    async for output in outputs:
        [delta] = output.outputs
        text, tokens, reason = text + delta.text, tokens + list(delta.token_ids), delta.finish_reason
    return text, tokens, reason


def whole(result) -> tuple[str, list[int], str]:
    [output] = result.outputs
    return output.text, list(output.token_ids), output.finish_reason


def test_streams_equal_generate_and_chat(llm, async_llm):
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=20, stop=["zz"])
    [expected], [answer] = llm.generate("hello world", params), llm.chat(CHAT, params)

    async def run():
        streams = async_llm.generate("hello world", params), async_llm.chat(CHAT, params)
        return await asyncio.gather(*map(joined, streams))

    assert asyncio.run(run()) == [whole(expected), whole(answer)]


@pytest.mark.parametrize("kind", [RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY])
def test_the_last_output_is_whole_and_has_the_callers_id(llm, async_llm, kind):
    params = SamplingParams(temperature=0.8, seed=3, n=2, max_tokens=8, logprobs=1, output_kind=kind)
    [expected] = llm.generate([IDS], params)

    async def run():
        return [output async for output in async_llm.generate(IDS, params, request_id="mine")]

    outputs = asyncio.run(run())
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert {output.request_id for output in outputs} == {"mine"}
    assert (len(outputs) == 1) == (kind is RequestOutputKind.FINAL_ONLY)
    last = {output.index: output for update in outputs for output in update.outputs}
    assert [last[i].text for i in (0, 1)] == [output.text for output in expected.outputs]
    assert [last[i].logprobs for i in (0, 1)] == [output.logprobs for output in expected.outputs]


def test_200_streams_on_one_event_loop(llm, async_llm):
    prompts = [[5 + i % 40, 6, 7] for i in range(200)]
    expected = [whole(result) for result in llm.generate(prompts, SHORT, use_tqdm=False)]

    async def run():
        return await asyncio.gather(*(joined(async_llm.generate(prompt, SHORT)) for prompt in prompts))

    assert asyncio.run(run()) == expected


def test_a_slow_consumer_gets_what_was_made_meanwhile_in_one_output(llm, async_llm):
    [expected] = llm.generate([IDS], LONG)

    async def run():
        stream = await async_llm.add_request(IDS, LONG)
        first = await anext(stream)
        await joined(async_llm.generate(IDS, LONG))  # the other request has as many steps left
        return [first] + [output async for output in stream]

    deltas = [output.outputs[0] for output in asyncio.run(run())]
    assert "".join(delta.text for delta in deltas) == expected.outputs[0].text
    assert len(deltas) <= 4 and deltas[-1].finish_reason == "length"


@pytest.mark.parametrize("ending", ["cancel", "close", "close and keep", "break", "drop"])
def test_a_consumer_that_goes_aborts_its_request(llm, async_llm, ending):
    async def consume():
        async for _output in async_llm.generate(IDS, LONG):
            await asyncio.sleep(0)

    async def run():
        if ending == "cancel":
            task = asyncio.create_task(consume())
            while not llm._engine.requests and not task.done():
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif ending == "close":
            async with aclosing(async_llm.generate(IDS, LONG)) as outputs:
                await anext(outputs)
        elif ending == "close and keep":
            kept.append(await async_llm.add_request(IDS, LONG))
            await anext(kept[0])
            await kept[0].aclose()
            await asyncio.to_thread(settle, llm)
            assert not llm._engine.requests, "aborted while its stream is referenced and its event loop runs"
        elif ending == "break":
            async for _output in async_llm.generate(IDS, LONG):
                break
        else:
            stream = await async_llm.add_request(IDS, LONG)
            await anext(stream)
            del stream

    kept, made, engine = [], llm._engine.metrics.counters["generation_tokens"], llm._engine
    with Held(engine, lambda: begun(engine), until=lambda: not engine.requests):
        asyncio.run(run())
        settle(llm)
    assert not llm._engine.requests
    wait_until(lambda: settle(llm) or not async_llm._hubs[async_llm._llm._replicas[0]].streams)  # told a step later
    assert llm._engine.metrics.counters["generation_tokens"] - made < 100


def test_abort_by_id_and_an_id_in_use(llm, async_llm):
    async def run():
        stream = await async_llm.add_request(IDS, LONG, request_id="one")
        with pytest.raises(ValueError, match="request id 'one' is in use"):
            await async_llm.add_request(IDS, LONG, request_id="one")
        await async_llm.abort(["one", "unknown"])
        return [output async for output in stream][-1]

    engine = llm._engine
    with Held(engine, until=lambda: not engine.requests):
        assert asyncio.run(run()).outputs[0].finish_reason == "abort"


@pytest.mark.parametrize("prompt", ["", [999], None, ["a", "b"]])
def test_invalid_prompts_are_refused_before_the_first_output(llm, async_llm, prompt):
    with pytest.raises((TypeError, ValueError), match="prompt"):
        asyncio.run(async_llm.add_request(prompt, SHORT))
    assert not llm._engine.requests


def test_an_event_loop_that_is_closed_underneath(llm, async_llm):
    loop = asyncio.new_event_loop()
    stream = loop.run_until_complete(async_llm.add_request(IDS, LONG))
    loop.close()
    [expected] = llm.generate([IDS], SHORT)
    assert asyncio.run(joined(async_llm.generate(IDS, SHORT))) == whole(expected)
    while llm._engine.requests:  # the other request ends by itself or, when its output cannot be delivered, is aborted
        llm._thread.run(llm._engine.step)
    stream.close()


def test_a_dead_engine_raises_in_each_stream(llm, async_llm, host, monkeypatch):
    def fail(*_arguments):
        raise RuntimeError("device lost")

    async def run():
        with Held(engine):
            streams = [await async_llm.add_request(IDS, LONG) for _ in range(3)]
            monkeypatch.setattr(engine.runner, "run", fail)
            monkeypatch.setattr(engine.runner, "reset", fail)
        found = await asyncio.gather(*map(joined, streams), return_exceptions=True)
        with pytest.raises(EngineDeadError, match="device lost"):
            await async_llm.add_request(IDS, LONG)
        monkeypatch.undo()
        return found

    with host() as engine:
        found = asyncio.run(run())
        assert [type(error) for error in found] == [EngineDeadError] * 3


def test_closing_ends_every_stream(make_llm):
    async def run():
        own = make_llm()
        with Held(own._engine):
            async with AsyncLLM.of(own) as llm:
                stream = await llm.add_request(IDS, LONG)
        with pytest.raises(EngineClosedError):
            await joined(stream)
        with pytest.raises(EngineClosedError):
            await llm.add_request(IDS, LONG)
        await llm.close()

    asyncio.run(run())
