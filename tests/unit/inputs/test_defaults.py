import numpy as np
import pytest

from jaxinfer.inputs.defaults import ModelLimits, length_remedy, params_per_prompt, resolve
from jaxinfer.sampling_params import SamplingParams

limits = ModelLimits(vocab_size=100, max_model_len=64, eos_token_ids=(2, 3), tokenizer_len=90)


def at(prompt_len=4, encode=None, limits=limits, **fields):
    return resolve(SamplingParams(**fields), limits, prompt_len=prompt_len, encode=encode)


def test_max_tokens_is_clamped_to_what_the_model_leaves():
    assert at(max_tokens=10).max_tokens == 10
    assert at(max_tokens=1000).max_tokens == 60
    assert at(max_tokens=None).max_tokens == 60
    assert at(prompt_len=63, max_tokens=10).max_tokens == 1


def test_top_k_above_the_vocabulary_is_clamped():
    assert at(top_k=10**12).top_k == 100
    assert at(top_k=5).top_k == 5


@pytest.mark.parametrize("max_tokens", [None, 70])
def test_min_tokens_beyond_what_fits(max_tokens):
    with pytest.raises(ValueError, match=r"min_tokens must be less than or equal to max_tokens=60 .*got 61"):
        at(min_tokens=61, max_tokens=max_tokens)
    assert at(min_tokens=60, max_tokens=70).min_tokens == 60


def test_the_remedy_is_that_of_what_limits_the_length():
    assert (
        length_remedy(64, 64, 64)
        == length_remedy(64, None, 64)
        == ": the model allows no more (max_position_embeddings)"
    )
    assert length_remedy(32, 32, 64) == ", or raise max_model_len: the model allows 64"
    of_cache = length_remedy(32, None, 64)
    assert of_cache == ", or raise kv_cache_memory_bytes: the model allows 64 tokens, and the cache has room for 32"
    assert "kv_cache_memory_bytes or lower max_num_seqs: " in length_remedy(32, None, 64, contiguous=True)
    with pytest.raises(ValueError, match=r"got 61\. Lower it, or raise max_model_len: the model allows 99\."):
        at(min_tokens=61, max_tokens=None, limits=ModelLimits(100, 64, length_hint=length_remedy(64, 64, 99)))


@pytest.mark.parametrize(
    "fields",
    [
        {"stop_token_ids": [1, 100]},
        {"allowed_token_ids": [100]},
        {"logit_bias": {100: 1.0}},
        {"_bad_words_token_ids": ((1, 100),)},
        {"stop_token_ids": [100], "min_tokens": 5},
    ],
)
def test_ids_outside_the_vocabulary_are_named(fields):
    with pytest.raises(ValueError, match=r"contains 100, outside the vocabulary.*vocab_size=100"):
        at(**fields)


def test_eos_ids_are_filled_in():
    assert at().eos_token_ids == (2, 3)
    assert at(ignore_eos=True).eos_token_ids == ()
    assert at(stop_token_ids=[7]).all_stop_token_ids == {2, 3, 7}
    assert at(stop_token_ids=[7], ignore_eos=True).all_stop_token_ids == {7}
    assert at(limits=ModelLimits(100, 64, eos_token_ids=(2, 100))).eos_token_ids == (2,)


def test_bad_words_are_encoded_with_and_without_a_space():
    table = {"cat": [5], " cat": [6], "dog": [7, 8], " dog": [9]}
    params = at(bad_words=["cat", "dog"], encode=table.__getitem__)
    assert params.bad_words_token_ids == ((5,), (6,), (7, 8), (9,))
    same = at(bad_words=["cat"], encode=lambda text: np.array([5]))
    assert same.bad_words_token_ids == ((5,),)
    with pytest.raises(ValueError, match="bad_words contains 100, outside"):
        at(bad_words=["cat"], encode=lambda text: [100])
    with pytest.raises(ValueError, match="bad_words needs the tokenizer"):
        at(bad_words=["cat"])


@pytest.mark.parametrize(
    "fields",
    [
        {"allowed_token_ids": [5], "_bad_words_token_ids": ((5,),)},
        {"allowed_token_ids": [2, 3], "min_tokens": 1},
        {"allowed_token_ids": [95]},  # padding beyond the tokenizer
        {"_bad_words_token_ids": tuple((i,) for i in range(90))},
        {"_bad_words_token_ids": tuple((i,) for i in range(90) if i not in (2, 3)), "min_tokens": 1},
    ],
)
def test_every_token_masked(fields):
    with pytest.raises(ValueError, match="every token is masked"):
        at(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"allowed_token_ids": [5], "_bad_words_token_ids": ((5, 5),)},
        {"allowed_token_ids": [2, 3]},
        {"allowed_token_ids": [2], "min_tokens": 1, "ignore_eos": True},
        {"_bad_words_token_ids": tuple((i,) for i in range(89))},
    ],
)
def test_one_token_left_is_enough(fields):
    at(**fields)


def test_spread():
    one, two = SamplingParams(), SamplingParams(n=2)
    assert params_per_prompt(one, 2) == [one, one]
    assert params_per_prompt([one, two], 2) == [one, two]
    with pytest.raises(ValueError, match="has 2 entries for 3 prompts"):
        params_per_prompt([one, two], 3)
    with pytest.raises(TypeError, match=r"sampling_params\[1\] must be a SamplingParams, got int 3"):
        params_per_prompt([one, 3], 2)
    with pytest.raises(TypeError, match="sampling_params must be a SamplingParams or a list"):
        params_per_prompt("x", 1)
