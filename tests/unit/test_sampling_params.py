import copy
import dataclasses
import inspect
import logging
import math
import pickle

import numpy as np
import pytest

from jaxinfer import sampling_params
from jaxinfer.sampling_params import RequestOutputKind, SamplingParams

nan, inf = math.nan, math.inf


def test_defaults():
    params = SamplingParams()
    expected = dict(
        n=1,
        presence_penalty=0,
        frequency_penalty=0,
        repetition_penalty=1,
        temperature=1,
        top_p=1,
        top_k=0,
        min_p=0,
        seed=None,
        stop=(),
        stop_token_ids=(),
        bad_words=(),
        ignore_eos=False,
        max_tokens=16,
        min_tokens=0,
        logprobs=None,
        prompt_logprobs=None,
        detokenize=True,
        skip_special_tokens=True,
        spaces_between_special_tokens=True,
        include_stop_str_in_output=False,
        output_kind=RequestOutputKind.DELTA,
        logit_bias=None,
        allowed_token_ids=None,
        no_repeat_ngram_size=0,
        forced_bos_token_id=None,
        forced_eos_token_id=None,
        structured_outputs=None,
    )
    assert {name: getattr(params, name) for name in expected} == expected
    fields = {field.name for field in dataclasses.fields(params) if not field.name.startswith("_")}
    assert fields == set(expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        # Messages users know from vLLM.
        ({"temperature": -1}, r"^temperature must be non-negative, got -1.0\.$"),
        ({"top_p": 0}, r"^top_p must be in \(0, 1\], got 0.0\.$"),
        ({"top_p": 1.1}, r"^top_p must be in \(0, 1\], got 1.1\.$"),
        ({"top_k": -2}, r"^top_k must be 0 \(disable\), or at least 1, got -2\.$"),
        ({"max_tokens": 0}, r"^max_tokens must be at least 1, got 0\.$"),
        ({"max_tokens": -1}, r"^max_tokens must be at least 1, got -1\.$"),
        ({"min_tokens": 20}, r"^min_tokens must be less than or equal to max_tokens=16, got 20\.$"),
        ({"stop": ""}, r"^stop cannot contain an empty string\.$"),
        ({"stop": ["a", ""]}, r"^stop cannot contain an empty string\.$"),
        ({"n": 2, "temperature": 0}, r"^n must be 1 when using greedy sampling, got 2\.$"),
        # The rest.
        ({"temperature": nan}, "temperature must be a finite number, got nan"),
        ({"temperature": inf}, "temperature must be a finite number, got inf"),
        ({"temperature": 10**400}, "temperature must be a finite number"),
        ({"temperature": 1e30}, r"temperature must be at most 1e\+06"),
        ({"top_p": nan}, "top_p must be a finite number"),
        ({"min_p": 2}, r"min_p must be in \[0, 1\], got 2"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\]"),
        ({"min_p": nan}, "min_p must be a finite number"),
        ({"presence_penalty": nan}, "presence_penalty must be a finite number"),
        ({"presence_penalty": 1e30}, r"presence_penalty must be in \[-2, 2\]"),
        ({"frequency_penalty": -inf}, "frequency_penalty must be a finite number"),
        ({"frequency_penalty": -2.5}, r"frequency_penalty must be in \[-2, 2\]"),
        ({"repetition_penalty": 0}, r"repetition_penalty must be in \[0.01, 100\]"),
        ({"repetition_penalty": 5e-324}, r"repetition_penalty must be in \[0.01, 100\]"),
        ({"repetition_penalty": 1e30}, r"repetition_penalty must be in \[0.01, 100\]"),
        ({"repetition_penalty": nan}, "repetition_penalty must be a finite number"),
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"n": 10**9}, "n must be between 1 and 1024, got 1000000000"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": 2**63}, f"seed must be between 0 and {2**63 - 1}"),
        ({"seed": 2**70}, "seed must be between"),
        ({"max_tokens": 2**63}, f"max_tokens must be between 1 and {2**31 - 1}"),
        ({"max_tokens": 10**5000}, "max_tokens must be between 1 and"),
        ({"top_k": -(10**5000)}, "top_k must be 0"),
        ({"min_tokens": -1}, "min_tokens must be at least 0"),
        ({"logprobs": -2}, "logprobs must be between 0 and 20, got -2"),
        ({"logprobs": 21}, "logprobs must be between 0 and 20, got 21"),
        ({"prompt_logprobs": -2}, "prompt_logprobs must be between 0 and 20"),
        ({"prompt_logprobs": 10**6}, "prompt_logprobs must be between 0 and 20"),
        ({"stop": [f"s{i}" for i in range(10_000)]}, "stop can have at most 64 strings, got 10000"),
        ({"stop": "x" * 2**20}, r"stop\[0\] can have at most 1024 characters, got 1048576"),
        ({"stop": "x", "detokenize": False}, "set detokenize=True to use stop"),
        ({"bad_words": [""]}, "bad_words cannot contain an empty string"),
        ({"bad_words": ["x"] * 257}, "bad_words can have at most 256"),
        ({"stop_token_ids": [-1]}, "every id in stop_token_ids must be between 0 and"),
        ({"stop_token_ids": [10**5000]}, "every id in stop_token_ids must be between 0 and"),
        ({"allowed_token_ids": []}, "allowed_token_ids cannot be empty"),
        ({"logit_bias": {1: nan}}, r"logit_bias\[1\] must be a finite number"),
        ({"logit_bias": {1: inf}}, r"logit_bias\[1\] must be a finite number"),
        ({"logit_bias": {-1: 1.0}}, "every key of logit_bias must be between 0"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias can have at most 1024"),
    ],
)
def test_values_out_of_range_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": True}, "n must be an integer, got bool True"),
        ({"n": np.True_}, "n must be an integer"),
        ({"n": 1.0}, "n must be an integer, got float 1.0"),
        ({"temperature": True}, "temperature must be a number, got bool True"),
        ({"temperature": "hot"}, "temperature must be a number, got str 'hot'"),
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"top_p": [1]}, "top_p must be a number, got list"),
        ({"top_k": 2.5}, "top_k must be an integer, got float 2.5"),
        ({"seed": "x"}, "seed must be an integer, got str 'x'"),
        ({"seed": True}, "seed must be an integer"),
        ({"max_tokens": 1.5}, "max_tokens must be an integer, got float 1.5"),
        ({"max_tokens": True}, "max_tokens must be an integer"),
        ({"logprobs": True}, "logprobs must be an integer"),
        ({"stop": [3]}, r"stop\[0\] must be a string, got int 3"),
        ({"stop": 3}, "stop must be a list of strings, got int 3"),
        ({"stop": b"x"}, "stop must be a list of strings, got bytes"),
        ({"bad_words": "word"}, "bad_words must be a list of strings"),
        ({"stop_token_ids": [True]}, "every id in stop_token_ids must be an integer, got bool"),
        ({"stop_token_ids": 3}, "stop_token_ids must be a list of token ids"),
        ({"stop_token_ids": "3"}, "stop_token_ids must be a list of token ids"),
        ({"allowed_token_ids": [1.0]}, "every id in allowed_token_ids must be an integer"),
        ({"logit_bias": [1]}, "logit_bias must be a dict"),
        ({"logit_bias": {"1": 1.0}}, "every key of logit_bias must be an integer, got str '1'"),
        ({"logit_bias": {1: "x"}}, r"logit_bias\[1\] must be a number"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False, got int 1"),
        ({"detokenize": "no"}, "detokenize must be True or False"),
        ({"output_kind": "delta"}, "output_kind must be RequestOutputKind"),
        ({"temperature": object()}, r"got object\.$"),
    ],
)
def test_values_of_a_wrong_type_are_named(fields, message):
    with pytest.raises(TypeError, match=message):
        SamplingParams(**fields)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("best_of", "best_of is not supported: use n"),
        ("max_new_tokens", "use max_tokens"),
        ("guided_decoding", "use structured_outputs"),
        ("temprature", "did you mean temperature?"),
        ("stop_token_id", "did you mean stop_token_ids?"),
        ("qqqq", "the fields are n, presence_penalty"),
    ],
)
def test_unknown_keywords_are_named_with_the_replacement(name, hint):
    with pytest.raises(TypeError, match=f"SamplingParams has no field '{name}'.*{hint}"):
        SamplingParams(**{name: 2})


def test_positional_arguments_are_refused():
    with pytest.raises(TypeError, match="keywords only"):
        SamplingParams(2)


def test_editors_see_the_fields():
    assert "temperature" in inspect.signature(SamplingParams).parameters


def test_it_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 0.0


def test_numpy_numbers_are_taken():
    params = SamplingParams(
        n=np.int32(2),
        temperature=np.float32(0.5),
        seed=np.uint64(7),
        stop_token_ids=np.array([1, 2]),
        logit_bias={np.int64(3): np.float64(1)},
    )
    assert (params.n, params.temperature, params.seed, params.stop_token_ids) == (2, 0.5, 7, (1, 2))
    integers = (params.n, params.seed, *params.stop_token_ids, *params.logit_bias)
    assert all(type(value) is int for value in integers)


def test_values_are_normalised():
    assert SamplingParams(top_k=-1).top_k == 0
    assert SamplingParams(stop="x").stop == SamplingParams(stop=["x"]).stop == ("x",)
    assert SamplingParams(stop=None, stop_token_ids=None, bad_words=None) == SamplingParams()
    assert SamplingParams(logit_bias={1: 500, 2: -1e9}).logit_bias == {1: 100.0, 2: -100.0}
    assert SamplingParams(allowed_token_ids=[3, 3, 1]).allowed_token_ids == (3, 1)
    assert SamplingParams(max_tokens=None, min_tokens=5).max_tokens is None
    assert SamplingParams(seed=0).seed == 0
    assert SamplingParams(seed=2**63 - 1).seed == 2**63 - 1


def test_tiny_temperatures_are_raised_and_said_once(caplog):
    sampling_params._warn_temperature_raised.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert SamplingParams(temperature=1e-9).temperature == 0.01
        assert SamplingParams(temperature=5e-324).temperature == 0.01
    assert len(caplog.records) == 1
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams(temperature=1e-9).greedy


def test_it_can_be_copied_compared_hashed_and_pickled():
    params = SamplingParams(stop=["a"], logit_bias={1: 2.0}, seed=3)
    assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == params
    assert dataclasses.replace(params) == params
    assert hash(params) == hash(copy.copy(params))
    assert params != dataclasses.replace(params, logit_bias={1: 3.0})


def test_repr_shows_what_was_set():
    assert repr(SamplingParams(temperature=0, stop="a")) == "SamplingParams(temperature=0.0, stop=('a',))"
