"""Prefix reuse as a user meets it: never a stale block, never someone else's."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from flax import nnx
from support import checkpoint

from jaxinfer import SamplingParams
from jaxinfer.errors import CheckpointError, EngineDeadError
from jaxinfer.loading import fuse_programs, weights
from jaxinfer.sharding import make_mesh

pytestmark = pytest.mark.xdist_group("faults")

SHORT = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
PREFIX = list(range(40, 64))


def tokens(results):
    return [list(r.outputs[0].token_ids) for r in results]


@pytest.mark.slow
def test_64_prompts_with_one_prefix_in_one_step(llm, host):
    prompts = [[*PREFIX, 100 + i] for i in range(64)]
    with host(prefix_caching=False):
        expected = tokens(llm.generate(prompts, SHORT))
    with host() as engine:
        results = llm.generate(prompts, SHORT)
        assert tokens(results) == expected
        assert sum(r.num_cached_tokens >= len(PREFIX) for r in results) > 32
        counters = engine.metrics.counters
        assert counters["prefix_cache_hits"] == sum(r.num_cached_tokens for r in results)


@pytest.mark.slow
def test_a_pool_of_three_blocks(llm, host):
    """A prefix is evicted by the next prompt, then sent again."""
    prompts = [[50 + i] * 7 for i in (0, 1, 0, 0, 2, 0, 1)]
    with host(prefix_caching=False):
        expected = tokens(llm.generate(prompts, SHORT))
    with host(pool_blocks=3):
        assert [tokens(llm.generate([p], SHORT))[0] for p in prompts] == expected
        assert tokens(llm.generate(prompts, SHORT)) == expected
        [result] = llm.generate([prompts[0]], SHORT)
        assert result.metrics.cache_miss_reason in ("evicted under pressure", "absent")


def test_another_salt_never_hits(llm):
    def send(salt):
        return llm.generate([{"prompt_token_ids": PREFIX, "cache_salt": salt}], SHORT)[0]

    first, other, again, unsalted = send("a"), send("b"), send("a"), llm.generate([PREFIX], SHORT)[0]
    assert [r.num_cached_tokens for r in (first, other, again, unsalted)] == [0, 0, len(PREFIX) - 4, 0]
    assert tokens([first]) == tokens([other]) == tokens([again]) == tokens([unsalted])


def test_prompt_logprobs_are_complete_with_a_hit(llm):
    ask = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=2)
    ids = [*PREFIX, *range(70, 100)]  # two chunks
    [before] = llm.generate([ids], ask)
    [_] = llm.generate([ids], SHORT)
    [after] = llm.generate([ids], ask)
    assert after.prompt_logprobs == before.prompt_logprobs
    assert len(after.prompt_logprobs) == len(ids) and after.prompt_logprobs[0] is None
    assert all(token in found for token, found in zip(ids[1:], after.prompt_logprobs[1:], strict=True))


@pytest.mark.slow
def test_prompt_logprobs_of_a_sequence_preempted_half_way(llm, host):
    """What was computed before the preemption is not reported twice."""
    ask = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=0)
    long = [*range(40, 60), *range(100, 140)]
    [alone] = llm.generate([long], ask)
    grow = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    for pool_blocks in range(17, 26):
        with host(pool_blocks=pool_blocks) as engine:
            engine.scheduler.limits = type(engine.scheduler.limits)(tokens=6, prefill_rows=8)
            *_, last = llm.generate([[30], [31], [32], long], [grow, grow, grow, ask])
            assert len(last.prompt_logprobs) == len(long)
            for mine, expected in zip(last.prompt_logprobs[1:], alone.prompt_logprobs[1:], strict=True):
                assert {t: pytest.approx(e.logprob, abs=1e-4) for t, e in expected.items()} == {
                    t: e.logprob for t, e in mine.items()
                }
            preempted = last.metrics.num_preemptions
    assert preempted is not None


@pytest.fixture
def kept(llm) -> Iterator[Any]:
    """The weights of the shared LLM in the engine's own form, which are put back afterwards."""
    state = llm.weights(names="jaxinfer")
    yield state
    llm.update_weights(state)


@pytest.mark.slow
def test_new_weights_forget_the_cache(llm, kept):
    """By their Hugging Face names, as a module and as its state; back again the tokens are the same, bit for bit."""
    before = llm.generate([PREFIX], SHORT)
    names, checksum = llm.weights(), llm.weights_checksum()
    other = weights.random(checkpoint.CONFIG, make_mesh(1), seed=3)
    llm.update_weights(other)
    [second] = llm.generate([PREFIX], SHORT)
    assert second.num_cached_tokens == 0
    assert tokens([second]) != tokens(before)
    assert llm.weights_checksum() != checksum
    report = llm.update_weights(names)
    assert (report.tensors, report.checksum) == (len(names), checksum) == (len(names), llm.weights_checksum())
    [third] = llm.generate([PREFIX], SHORT)
    assert third.num_cached_tokens == 0 and tokens([third]) == tokens(before)
    llm.update_weights(nnx.state(other))
    assert tokens(llm.generate([PREFIX], SHORT)) == tokens([second])


def test_weights_of_some_layers_are_replaced_and_the_rest_kept(llm, kept):
    before, names = llm.generate([PREFIX], SHORT), llm.weights()
    layer = {name: tensor for name, tensor in names.items() if name.startswith("model.layers.1.")}
    llm.update_weights({name: -tensor for name, tensor in layer.items()}, partial=True)
    [changed] = llm.generate([PREFIX], SHORT)
    assert changed.num_cached_tokens == 0 and tokens([changed]) != tokens(before)
    for name, tensor in llm.weights().items():
        np.testing.assert_array_equal(tensor, -names[name] if name in layer else names[name])
    llm.update_weights(layer, partial=True)
    assert tokens(llm.generate([PREFIX], SHORT)) == tokens(before)


def test_weights_are_not_replaced_under_running_requests(llm, kept):
    other = weights.random(checkpoint.CONFIG, make_mesh(1), seed=3)
    stream = llm.stream([PREFIX], SamplingParams(max_tokens=20, ignore_eos=True))
    next(stream)
    with pytest.raises(RuntimeError, match="running"):
        llm.update_weights(other)
    stream.close()
    # The step of the aborted request is still in flight; nothing runs all the same.
    llm.update_weights(other)


def test_two_updates_at_once_are_refused(llm, kept):
    with llm._updating, pytest.raises(RuntimeError, match="another update is running"):
        llm.update_weights(kept)
    llm.update_weights(kept)


def test_after_wrong_weights_the_old_ones_serve(llm):
    before, checksum = llm.generate([PREFIX], SHORT), llm.weights_checksum()
    other = weights.random(checkpoint.CONFIG | {"intermediate_size": 64}, make_mesh(1))
    names = llm.weights()
    wrong = names | {"model.norm.weight": names["model.norm.weight"].at[3].set(float("nan"))}
    for given, message in [
        (other, r"'layers.0.mlp.down.weight': expected shape \[32, 48\], found \[32, 64\]"),
        (wrong, "'model.norm.weight': expected finite values, found 1"),
        ({"model.norm.weight": names["model.norm.weight"]}, "lacks 20 tensor"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            llm.update_weights(given)
    with pytest.raises(TypeError, match="weights must be"):
        llm.update_weights(None)
    with pytest.raises(ValueError, match="names must be 'hf' or 'jaxinfer', got 'torch'"):
        llm.weights("torch")
    assert llm.weights_checksum() == checksum
    [after] = llm.generate([PREFIX], SHORT)
    assert tokens([after]) == tokens(before) and after.num_cached_tokens, "the cache is kept as well"


def test_a_device_that_fails_half_way_ends_the_engine(make_llm, monkeypatch):
    """A mixture of old and new weights must not serve."""
    with make_llm() as llm:
        names = llm.weights()

        def lost(*_: object) -> None:
            raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

        monkeypatch.setattr(fuse_programs.FusePrograms, "make", lost)
        with pytest.raises(EngineDeadError, match="half way.*ILLEGAL_ADDRESS"):
            llm.update_weights(names)
        with pytest.raises(EngineDeadError, match="half way"):
            llm.generate([PREFIX], SHORT)
