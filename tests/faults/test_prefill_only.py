"""`score`, `embed`, `hidden_states` and steering of an LLM: limits, failed steps, pauses, asyncio."""

import asyncio
import threading

import numpy as np
import pytest
from support.stepping import wait_until

from jaxinfer import AsyncLLM, SamplingParams, Steering
from jaxinfer.engine.recovery import RETRIES
from jaxinfer.errors import ConfigError, EngineError

pytestmark = pytest.mark.xdist_group("faults")

IDS = list(range(10, 50))
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
WIDTH = 32


def test_asyncio_gives_the_same(llm):
    [score], [embedding] = llm.score([IDS], [[5, 6, 7]], use_tqdm=False), llm.embed([IDS], use_tqdm=False)
    [states] = llm.hidden_states([IDS], ["layers.0"], use_tqdm=False)

    async def run() -> tuple:
        own = AsyncLLM.of(llm)
        return await asyncio.gather(own.score(IDS, [5, 6, 7]), own.embed(IDS), own.hidden_states(IDS, ["layers.0"]))

    found = asyncio.run(run())
    np.testing.assert_allclose(found[0].logprobs, score.logprobs, atol=1e-4)
    np.testing.assert_allclose(found[1].embedding, embedding.embedding, atol=1e-5)
    np.testing.assert_allclose(found[2].states["layers.0"], states.states["layers.0"], atol=1e-4)


def test_as_long_as_the_model_allows(llm):
    ids = [7 + n % 90 for n in range(129)]
    [embedding] = llm.embed([ids[:128]], pooling="mean", use_tqdm=False)
    assert embedding.embedding.shape == (WIDTH,)
    assert len(llm.score([ids[:100]], [ids[100:128]], use_tqdm=False)[0].logprobs) == 28
    with pytest.raises(ValueError, match="its 129 tokens exceed the maximum model length of 128"):
        llm.embed([ids], use_tqdm=False)
    with pytest.raises(ValueError, match="prompt 1: its 100 tokens and the 29 of its completion exceed"):
        llm.score([[5], ids[:100]], [[6], ids[100:]], use_tqdm=False)


@pytest.mark.parametrize(
    ("prompts", "completions", "kind", "said"),
    [
        ("hello", "", ValueError, "completion 0 is empty"),
        ("hello", [[]], ValueError, "completion 0 is empty"),
        (["hello"] * 2, ["cat", ""], ValueError, "completion 1 is empty"),
        (["hello"] * 2, ["cat"], ValueError, "2 prompts and 1 completions"),
        ("hello", [[5, 100000]], ValueError, "completion 0: token id 100000 at position 1 is out of vocabulary"),
        ("hello", [[5.5]], TypeError, "every id of completion 0"),
        ("hello", 7, TypeError, "completions must be"),
        ("hello", ["\ud800"], ValueError, "lone surrogate"),
    ],
)
def test_completions_that_cannot_be_scored(llm, prompts, completions, kind, said):
    with pytest.raises(kind, match=said):
        llm.score(prompts, completions, use_tqdm=False)


def test_repeated_tokens_are_scored(llm):
    assert len(llm.score("hello", [[5, 5, 5]], use_tqdm=False)[0].logprobs) == 3


def test_modules_that_are_not_there(llm):
    with pytest.raises(ConfigError, match="the model has embedding, head, layers, norm"):
        llm.hidden_states("hello", ["layer.0"])
    with pytest.raises(ConfigError, match="head is not called"):
        llm.hidden_states("hello", ["head"])
    with pytest.raises(TypeError, match="list of paths"):
        llm.hidden_states("hello", "layers.0")


@pytest.mark.parametrize("failures", [1, RETRIES + 1])
def test_after_failed_steps(llm, monkeypatch, failures):
    """A prompt of two chunks is computed again and taken once; after too many failures its request ends."""
    expected, left = llm.embed([IDS], pooling="mean", use_tqdm=False)[0].embedding, [failures, 1]
    replay = llm._engine.runner.replay

    def failing(key, arrays):
        made = replay(key, arrays)
        if getattr(key, "kind", None) == "prefill" and left[0]:
            if left[1]:  # the first chunk succeeds
                left[1] -= 1
                return made
            left[0] -= 1
            raise RuntimeError("injected")
        return made

    monkeypatch.setattr(llm._engine.runner, "replay", failing)
    if failures > RETRIES:
        with pytest.raises(EngineError, match="prompt 0: its step failed 3 times"):
            llm.embed([IDS], pooling="mean", use_tqdm=False)
    else:
        np.testing.assert_allclose(llm.embed([IDS], pooling="mean", use_tqdm=False)[0].embedding, expected, atol=1e-5)


def test_a_pause_holds_them(llm):
    expected, found = llm.embed([IDS], use_tqdm=False)[0].embedding, []
    llm.pause()
    thread = threading.Thread(target=lambda: found.extend(llm.embed([IDS], use_tqdm=False)))
    thread.start()
    wait_until(lambda: llm._engine.requests, thread.is_alive)
    thread.join(0.3)
    assert thread.is_alive() and not found
    llm.resume()
    thread.join(120)
    np.testing.assert_allclose(found[0].embedding, expected, atol=1e-5)


def test_steering_changes_its_own_requests(llm):
    vector = np.linspace(-20, 20, WIDTH)
    plain, moved, same = llm.generate(
        [IDS] * 3, GREEDY, steering=[None, Steering({"layers.0": vector}), {"layers.0": 0 * vector}], use_tqdm=False
    )
    assert plain.outputs[0].token_ids == same.outputs[0].token_ids != moved.outputs[0].token_ids
    [again] = llm.generate([IDS], GREEDY, steering={"model.layers.0": list(vector)}, use_tqdm=False)
    assert again.outputs[0].token_ids == moved.outputs[0].token_ids and again.num_cached_tokens > 0

    async def run() -> list:
        return [output async for output in AsyncLLM.of(llm).generate(IDS, GREEDY, steering={"layers.0": vector})]

    assert asyncio.run(run())[-1].finished
    with pytest.raises(ValueError, match="2 entries for 1 prompts"):
        llm.generate([IDS], GREEDY, steering=[None, None])
    with pytest.raises(ValueError, match="has 3 entries; the model's hidden states have 32"):
        llm.generate([IDS], GREEDY, steering={"layers.0": [1, 2, 3]})
