from types import SimpleNamespace

import pytest
from transformers import GenerationConfig

from jaxinfer.errors import ConfigError
from jaxinfer.inputs.defaults import ModelLimits, resolve
from jaxinfer.inputs.generation_config import default_params, eos_ids, forced_id, from_generation_config
from jaxinfer.sampling_params import SamplingParams


def convert(**values):
    return from_generation_config(GenerationConfig(**values))


def test_an_empty_config_is_greedy():
    assert convert() == SamplingParams(temperature=0)


def test_every_attribute_has_its_field():
    params = convert(
        max_new_tokens=7,
        min_new_tokens=2,
        do_sample=True,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.2,
        num_return_sequences=3,
        stop_strings=["x"],
        eos_token_id=[1, 2],
        bad_words_ids=[[4, 5]],
        suppress_tokens=[6, 7],
    )
    assert params == SamplingParams(
        max_tokens=7,
        min_tokens=2,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.2,
        n=3,
        stop=["x"],
        stop_token_ids=[1, 2],
        ignore_eos=True,
        _bad_words_token_ids=((6,), (7,)),
        _bad_words_ids=((4, 5),),
    )


def test_sampling_attributes_count_only_with_do_sample():
    assert convert(do_sample=False, temperature=0.7, top_k=9).temperature == 0
    assert convert(do_sample=True) == SamplingParams(top_k=50)
    assert convert(do_sample=True, top_k=0).top_k == 0


def test_what_is_not_set_comes_from_the_models_file():
    """Unset attributes are filled as by `generate(generation_config=...)` of transformers 5."""
    file = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 50, "repetition_penalty": 1.05}
    own, theirs = GenerationConfig(max_new_tokens=7, top_p=0.5), GenerationConfig(max_new_tokens=7, top_p=0.5)
    theirs.update(**file, defaults_only=True)
    made = from_generation_config(own, file)
    assert made == from_generation_config(theirs)
    assert (made.max_tokens, made.temperature, made.top_p, made.repetition_penalty) == (7, 0.6, 0.5, 1.05)
    assert from_generation_config(GenerationConfig(do_sample=False), file).temperature == 0
    with pytest.raises(ValueError, match="max_length"):
        from_generation_config(GenerationConfig(max_length=30), file)


def test_a_single_eos_and_none():
    assert convert(eos_token_id=5).stop_token_ids == (5,)
    assert convert(eos_token_id=-1).stop_token_ids == ()
    assert not convert().ignore_eos


def test_plain_values_may_come_as_a_dict():
    assert from_generation_config({"max_new_tokens": 3}) == SamplingParams(temperature=0, max_tokens=3)


def test_the_defaults_of_older_transformers_pass():
    old = dict(
        max_length=20,
        min_length=0,
        num_beams=1,
        num_beam_groups=1,
        typical_p=1.0,
        epsilon_cutoff=0.0,
        eta_cutoff=0.0,
        no_repeat_ngram_size=0,
        diversity_penalty=0.0,
        length_penalty=1.0,
        do_sample=False,
        encoder_repetition_penalty=1.0,
        temperature=1.0,
        top_k=50,
        token_healing=False,
    )
    assert from_generation_config(old) == SamplingParams(temperature=0)


def test_what_is_not_supported_is_listed():
    with pytest.raises(ValueError, match="num_beams=int 4, penalty_alpha=f"):
        convert(num_beams=4, no_repeat_ngram_size=2, penalty_alpha=0.6)


def test_lengths_that_count_the_prompt():
    with pytest.raises(ValueError, match=r"max_length=int 50 counts the prompt too: set max_new_tokens"):
        convert(max_length=50)
    with pytest.raises(ValueError, match=r"min_length=int 5 counts the prompt too: set min_new_tokens"):
        convert(min_length=5)
    assert convert(max_length=50, max_new_tokens=4).max_tokens == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_return_sequences": 2}, "n must be 1 when using greedy"),
        ({"bad_words_ids": [[]]}, r"bad_words_ids\[0\]"),
        ({"bad_words_ids": [[-1]]}, "every id in bad_words_ids"),
    ],
)
def test_values_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        from_generation_config(values)


def test_something_else_is_refused():
    with pytest.raises(TypeError, match="SamplingParams or a GenerationConfig, got int 3"):
        from_generation_config(3)


def test_defaults_of_a_model():
    assert default_params({}) == SamplingParams()
    file = {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": None,
        "max_new_tokens": 99,
        "eos_token_id": 2,
        "do_sample": False,
        "transformers_version": "4.0",
    }
    assert default_params(file) == SamplingParams(temperature=0.6, top_p=0.9, max_tokens=99)
    floats = {"max_new_tokens": 99.0, "top_k": 20.0, "no_repeat_ngram_size": 3.0}  # some tools write integers as floats
    assert default_params(floats) == SamplingParams(max_tokens=99, top_k=20, no_repeat_ngram_size=3)
    lengths = {"max_length": 12.0, "min_length": 4.0}
    assert default_params(lengths, encoder_decoder=True) == SamplingParams(temperature=0, max_tokens=11, min_tokens=3)
    with pytest.raises(ConfigError, match="generation_config.json: top_p must be in"):
        default_params({"top_p": 7})
    with pytest.raises(ConfigError, match="generation_config.json: top_k must be an integer"):
        default_params({"top_k": "many"})


def test_an_end_token_is_no_bad_word():
    """EOS ids are not banned, whether the configuration or the model sets them."""
    own = convert(bad_words_ids=[[3], [4], [5, 3]], eos_token_id=[3, 9])
    assert own._bad_words_ids == ((4,), (5, 3))
    model = convert(bad_words_ids=[[3], [4], [5, 3]], suppress_tokens=[3])
    resolved = resolve(model, ModelLimits(100, 64, eos_token_ids=(3,)), prompt_len=1)
    assert resolved.bad_words_ids == ((4,), (5, 3)) and resolved.bad_words_token_ids == ((3,),)


@pytest.mark.parametrize("value", [7, 0, -1, 1.5, "x", [], {}, True, None, [[1]], 10**40, float("nan")])
def test_what_a_file_says_is_taken_or_refused_by_a_public_error(value):
    for name in (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "no_repeat_ngram_size",
        "max_new_tokens",
        "max_length",
        "min_length",
        "do_sample",
        "eos_token_id",
        "bad_words_ids",
        "text_config",
        "cache_implementation",
    ):
        file = {name: value}
        for read in (
            default_params,
            lambda f: default_params(f, encoder_decoder=True),
            lambda f: eos_ids({}, f),
            lambda f: eos_ids(f, {}),
            lambda f: forced_id({"forced_bos_token_id": value}, "forced_bos_token_id"),
        ):
            try:
                read(file)
            except ConfigError as error:
                assert "generation_config.json" in str(error) or "single token" in str(error)


def test_eos_ids():
    assert eos_ids({"eos_token_id": 1}, {"eos_token_id": [2, 3, 2]}) == (2, 3)
    assert eos_ids({"eos_token_id": 1}, {}) == (1,)
    assert eos_ids({"eos_token_id": 1}, {"eos_token_id": [2.0, 3]}) == (2, 3)
    assert forced_id({"forced_bos_token_id": 5.0}, "forced_bos_token_id") == 5
    assert eos_ids({"eos_token_id": None}, {"eos_token_id": None}) == ()
    assert eos_ids({"text_config": {"eos_token_id": 4}}, {}) == (4,)
    tuned = SimpleNamespace(eos_token="<|im_end|>", eos_token_id=9)
    assert eos_ids({"eos_token_id": 1}, {"eos_token_id": [2, 3]}, tuned) == (2, 3, 9)
    assert eos_ids({}, {"eos_token_id": [2, 9]}, tuned) == (2, 9)
    assert eos_ids({}, {}, tuned) == (9,)
    assert eos_ids({"eos_token_id": 1}, {}, SimpleNamespace(eos_token=None, eos_token_id=None)) == (1,)
    with pytest.raises(ConfigError, match="every id in eos_token_id must be an integer, got bool"):
        eos_ids({"eos_token_id": True}, {})
