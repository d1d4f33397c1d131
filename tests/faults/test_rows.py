"""Bad input at the front door: the whole call is refused by name, nothing is queued, and the next call works.

The inputs and faults to survive, and the tests that hold them (`unit/` where the part alone is tested):

| row | input or fault | test |
|---|---|---|
| 1 | no prompts | here, `test_no_prompts_no_results` |
| 2, 3, 4 | empty, wrong type, bad token ids | here, `test_refused_by_name`; unit/inputs/test_prompts.py |
| 5 | prompt longer than the model | here, `test_refused_by_name` |
| 6 | prompt that never fits the pool | here, `test_a_prompt_that_never_fits_the_pool` |
| 7 | max_tokens beyond the model's length | here, `test_max_tokens_is_clamped` |
| 8, 9 | max_tokens, min_tokens | unit/test_sampling_params.py, unit/inputs/test_defaults.py; here,
`test_refused_by_name` |
| 10, 12, 13, 14, 16, 18, 20, 22, 24, 27 | fields of SamplingParams | unit/test_sampling_params.py |
| 11 | a tiny temperature | unit/test_sampling_params.py; here, `test_a_tiny_temperature` |
| 13 | top_k above the vocabulary | unit/inputs/test_defaults.py |
| 15 | n | unit/test_sampling_params.py; here, `test_a_huge_n_allocates_nothing` |
| 17 | one seed at batch 1, at batch 8, after preemption | equivalence/test_batch.py, equivalence/test_preemption.py |
| 19 | stop strings across tokens, in an emoji | unit/results/test_stop_strings.py, unit/results/test_detokenizer.py;
test_text.py |
| 21 | stop ids outside the vocabulary | here, `test_refused_by_name` |
| 23 | every token masked | here, `test_refused_by_name`, `test_every_token_masked_on_the_way` |
| 25 | prompt_logprobs with a prefix hit | test_cache.py |
| 26 | params of the wrong length | here, `test_refused_by_name` |
| 28 | duplicate request id | unit/engine/test_engine.py |
| 29, 30 | aborts | test_lifecycle.py; unit/engine/test_engine.py |
| 31 | KeyboardInterrupt | test_lifecycle.py; unit/engine/test_failures.py |
| 32 | a consumer that stops | test_lifecycle.py |
| 33 | a callback that raises | unit/engine/test_failures.py |
| 34 | NaN logits in a row | unit/engine/test_failures.py |
| 35 | NaN in unused cache | equivalence/test_padding.py |
| 36, 37 | the pool runs dry, again and again | equivalence/test_preemption.py |
| 38, 39 | one prefix 64 times, eviction | equivalence/test_prefix.py; test_cache.py |
| 40 | another salt, weights or image | equivalence/test_prefix.py, equivalence/test_images.py; test_cache.py,
test_images.py |
| 42 | a hash collision | unit/kv/test_prefix.py |
| 43 | lengths at the ends of blocks and chunks | every test of equivalence/ |
| 44 | a fork whose parent ends | equivalence/test_fork.py |
| 45, 46, 47 | out of memory at start and in a step; a bucket that does not compile | test_memory.py;
unit/engine/test_failures.py |
| 48, 49, 50, 51 | files of a checkpoint | unit/checkpoint/test_safetensors.py, unit/checkpoint/test_hf.py;
test_checkpoints.py |
| 52, 53 | sizes, architecture, rope, quantisation | unit/checkpoint/test_hf.py, unit/layers/test_rope.py;
test_checkpoints.py |
| 54 | embedding larger than the tokenizer | test_text.py |
| 55, 56 | chat templates | unit/inputs/test_chat.py; test_text.py |
| 57 | surrogates, NUL, 10 MB | unit/inputs/test_prompts.py; test_text.py |
| 59 | output that ends inside a character | unit/results/test_detokenizer.py; test_text.py |
| 60 | offline, gated, disk full | unit/checkpoint/test_hf.py |
| 63 | two engines, use after close, threads | test_lifecycle.py |
"""

import math

import pytest

from jaxinfer import SamplingParams
from jaxinfer.sampling_params import MAX_N

pytestmark = pytest.mark.xdist_group("faults")

SHORT = SamplingParams(temperature=0, max_tokens=4)
IDS = [10, 11, 12, 13, 14]


def ids_of(results):
    return [[list(o.token_ids) for o in result.outputs] for result in results]


def test_no_prompts_no_results(llm):
    assert llm.generate([]) == []
    assert list(llm.stream([])) == []


BAD = {
    "empty text": (["fine", ""], SHORT, ValueError, "prompt 1"),
    "empty ids": ([IDS, []], SHORT, ValueError, "prompt 1"),
    "None": (["fine", None], SHORT, TypeError, "prompt 1.*None"),
    "bytes": (["fine", b"bytes"], SHORT, TypeError, "prompt 1.*bytes"),
    "nested": (["fine", [[1]]], SHORT, TypeError, "prompt 1"),
    "negative id": ([IDS, [1, -1]], SHORT, ValueError, "prompt 1.*-1"),
    "id out of vocabulary": ([IDS, [1, 320]], SHORT, ValueError, "prompt 1.*320.*vocab_size=320"),
    "bool id": ([IDS, {"prompt_token_ids": [1, True]}], SHORT, TypeError, "prompt 1.*True"),
    "float id": ([IDS, {"prompt_token_ids": [1, 2.0]}], SHORT, TypeError, "prompt 1.*2.0"),
    "too long": ([IDS, [3] * 129], SHORT, ValueError, "prompt 1.*129.*128"),
    "no room": ([IDS, [3] * 128], SHORT, ValueError, "prompt 1.*128.*128.*max_model_len"),
    "min above max": (
        [IDS, [3] * 120],
        SamplingParams(max_tokens=16, min_tokens=12),
        ValueError,
        "min_tokens.*max_tokens=8",
    ),
    "stop id": ([IDS], SamplingParams(stop_token_ids=[320], min_tokens=2), ValueError, "stop_token_ids.*320"),
    "all masked": ([IDS], SamplingParams(allowed_token_ids=[1], min_tokens=2), ValueError, "every token is masked"),
    "only padding": ([IDS], SamplingParams(allowed_token_ids=[319]), ValueError, "every token is masked"),
    "params count": ([IDS, IDS, IDS], [SHORT, SHORT], ValueError, "2 entries for 3 prompts"),
    "params type": ([IDS], {"temperature": 0}, TypeError, "SamplingParams"),
    "unknown key": ([{"prompt": "x", "lora": 1}], SHORT, ValueError, "prompt 0.*lora"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("way", ["generate", "stream"])
def test_refused_by_name(llm, name, way):
    prompts, params, error, message = BAD[name]
    expected = ids_of(llm.generate([IDS], SHORT))
    with pytest.raises(error, match=message):
        getattr(llm, way)(prompts, params)
    assert not llm._engine.requests and not llm._engine.has_work, "nothing was queued"
    assert ids_of(llm.generate([IDS], SHORT)) == expected


def test_a_prompt_that_never_fits_the_pool(llm, host):
    expected = ids_of(llm.generate([IDS], SHORT))
    with host(pool_blocks=3):
        with pytest.raises(
            ValueError, match=r"40 tokens.*needs 41, .*12 tokens \(3 blocks of 4\).*kv_cache_memory_bytes"
        ):
            llm.generate([IDS, [3] * 40], SHORT)
        assert not llm._engine.has_work
        assert ids_of(llm.generate([IDS], SHORT)) == expected


def test_max_tokens_is_clamped(llm, host, caplog):
    ask = SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True)
    [result] = llm.generate([[3] * 120], ask)
    assert len(result.outputs[0].token_ids) == 8 and result.outputs[0].finish_reason == "length"
    assert result.metrics.clamped_max_tokens is None and "max_tokens lowered" not in caplog.text, "the model's length"
    with host(pool_blocks=3):
        [result, other] = llm.generate([IDS, IDS[::-1]], ask)
        assert len(result.outputs[0].token_ids) == 12 - len(IDS) == result.metrics.clamped_max_tokens
        assert result.outputs[0].finish_reason == "length" and other.metrics.clamped_max_tokens == 12 - len(IDS)
        [fits] = llm.generate([IDS], SamplingParams(temperature=0, max_tokens=1))
        assert fits.metrics.clamped_max_tokens is None
    said = (
        f"max_tokens lowered to {12 - len(IDS)} from {128 - len(IDS)}: the cache holds sequences of at most 12 tokens"
    )
    assert caplog.text.count(said) == 1


def test_a_prompt_that_is_too_long_names_what_limits_it(llm, make_llm):
    with pytest.raises(
        ValueError, match=r"length of 128\. Shorten the prompt, or raise max_model_len: the model allows 256\."
    ):
        llm.generate([[3] * 128], SHORT)
    with make_llm(max_model_len=None, kv_cache_memory_bytes=1 << 16) as small:
        room = small._input_processor.limits.max_model_len
        with pytest.raises(
            ValueError, match=rf"prompt, or raise kv_cache_memory_bytes: .* allows 256 .* room for {room}\."
        ):
            small.generate([[3] * 255], SHORT)


def test_a_tiny_temperature(llm):
    cold = SamplingParams(temperature=1e-9, max_tokens=6, logprobs=0)
    [result] = llm.generate([IDS], cold)
    assert result.outputs[0].finish_reason in ("length", "stop")
    assert math.isfinite(result.outputs[0].cumulative_logprob)


def test_a_huge_n_allocates_nothing(llm):
    with pytest.raises(ValueError, match=f"n must be between 1 and {MAX_N}"):
        llm.generate([IDS], SamplingParams(n=10**9))
    [result] = llm.generate([IDS], SamplingParams(n=50, max_tokens=2, seed=1))
    assert [o.index for o in result.outputs] == list(range(50))


def test_every_token_masked_on_the_way(llm):
    """One of two allowed tokens is forbidden from the start, the other after the first: nothing is left then."""
    bad = SamplingParams(temperature=0, allowed_token_ids=[7], max_tokens=5, _bad_words_token_ids=((7, 7),))
    expected = ids_of(llm.generate([IDS], SHORT))
    ruined, fine = llm.generate([[20, 21], IDS], [bad, SHORT])
    assert ruined.outputs[0].finish_reason == "error"
    assert list(ruined.outputs[0].token_ids) == [7]
    assert "masked" in ruined.outputs[0].stop_reason
    assert ids_of([fine]) == expected


def test_results_come_in_the_order_of_the_prompts(llm):
    lengths = [30, 2, 17, 9, 1, 25, 3, 12, 8, 21, 5]
    prompts = [[30 + length] * length for length in lengths]
    params = [SamplingParams(temperature=0, max_tokens=1 + i % 5, ignore_eos=True) for i in range(len(prompts))]
    results = llm.generate(prompts, params)
    assert [list(r.prompt_token_ids) for r in results] == prompts
    assert [len(r.outputs[0].token_ids) for r in results] == [p.max_tokens for p in params]
