"""Prefix reuse as a user meets it: never a stale block, never someone else's."""

import pytest
from support import checkpoint

from jaxinfer import SamplingParams
from jaxinfer.loading import weights
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


@pytest.mark.slow
def test_new_weights_forget_the_cache(llm):
    other = weights.random(checkpoint.CONFIG, make_mesh(1), seed=3)
    old = weights.random(checkpoint.CONFIG, make_mesh(1), seed=4)
    before = llm._engine.runner.params
    try:
        llm.update_weights(old)
        first = llm.generate([PREFIX], SHORT)
        llm.update_weights(other)
        [second] = llm.generate([PREFIX], SHORT)
        assert second.num_cached_tokens == 0
        assert tokens([second]) != tokens(first)
        llm.update_weights(old)
        assert tokens(llm.generate([PREFIX], SHORT)) == tokens(first)
    finally:
        llm._engine.runner.params = before
        llm.reset_prefix_cache()


def test_weights_are_not_replaced_under_running_requests(llm):
    other = weights.random(checkpoint.CONFIG, make_mesh(1), seed=3)
    stream = llm.stream([PREFIX], SamplingParams(max_tokens=20, ignore_eos=True))
    next(stream)
    with pytest.raises(RuntimeError, match="running"):
        llm.update_weights(other)
    stream.close()
    # The step of the aborted request is still in flight; nothing runs all the same.
    before = llm._engine.runner.params
    try:
        llm.update_weights(other)
    finally:
        llm._engine.runner.params = before
        llm.reset_prefix_cache()


def test_weights_of_another_shape_are_refused(llm):
    other = weights.random(checkpoint.CONFIG | {"intermediate_size": 64}, make_mesh(1))
    with pytest.raises(ValueError, match="same parameters"):
        llm.update_weights(other)
    assert llm.generate([PREFIX], SHORT)[0].finished
