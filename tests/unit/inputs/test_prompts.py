import time

import numpy as np
import pytest

from jaxinfer.inputs.prompts import Prompt, check_prompt_length, check_token_ids, max_prompt_chars, parse_prompts
from jaxinfer.media import PromptForms


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([], []),
        ("a", [Prompt("a")]),
        (["a", "b"], [Prompt("a"), Prompt("b")]),
        (("a",), [Prompt("a")]),
        ([1, 2], [Prompt(token_ids=(1, 2))]),
        ([[1, 2], [3]], [Prompt(token_ids=(1, 2)), Prompt(token_ids=(3,))]),
        (np.array([1, 2]), [Prompt(token_ids=(1, 2))]),
        ([np.array([1, 2])], [Prompt(token_ids=(1, 2))]),
        ([np.int64(1), 2], [Prompt(token_ids=(1, 2))]),
        (["a", [1]], [Prompt("a"), Prompt(token_ids=(1,))]),
        ({"prompt": "a"}, [Prompt("a")]),
        ([{"prompt_token_ids": [1], "cache_salt": "s"}], [Prompt(token_ids=(1,), cache_salt="s")]),
        ({"prompt": "a", "prompt_token_ids": [1]}, [Prompt("a", (1,))]),
        ({"prompt": "", "prompt_token_ids": [1]}, [Prompt(None, (1,))]),
        ("a\0b", [Prompt("a\0b")]),
    ],
)
def test_accepted_forms(prompts, expected):
    parsed = parse_prompts(prompts)
    assert parsed == expected
    assert all(type(token) is int for prompt in parsed for token in prompt.token_ids or ())


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", "prompt 0: The decoder prompt cannot be empty"),
        (["a", ""], "prompt 1: The decoder prompt cannot be empty"),
        ([[1], []], "prompt 1: The decoder prompt cannot be empty"),
        (["a", {"prompt": ""}], "prompt 1: The decoder prompt cannot be empty"),
        ([{}], "prompt 0: a dict needs 'prompt' or 'prompt_token_ids'"),
        (["a", {"prompt": "a", "image": 1}], "prompt 1: unknown key str 'image'"),
        ([{"prompt": "a", "multi_modal_data": {}}], "prompt 0: this model takes text only, leave out 'multi"),
        ([{"encoder_prompt": "a", "decoder_prompt": "b"}], "prompt 0: .* text only, leave out 'encoder"),
        ([{"prompt": "a", "cache_salt": ""}], "prompt 0: cache_salt cannot be empty"),
        (["a", "ab\ud800c"], r"prompt 1: character 2 is the lone surrogate U\+D800"),
        ([{"prompt": "a", "cache_salt": "\udfff"}], "prompt 0: cache_salt: character 0 is the lone surrogate"),
    ],
)
def test_refused_values(prompts, message):
    with pytest.raises(ValueError, match=message):
        parse_prompts(prompts)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "prompts must be .* got None"),
        (b"a", "prompts must be .* got bytes"),
        (3, "prompts must be .* got int 3"),
        ({"a"}, "prompts must be .* got set"),
        (["a", None], "prompt 1 must be .* got None"),
        (["a", b"a"], "prompt 1 must be .* got bytes"),
        (["a", 3], "prompt 1 must be .* got int 3"),
        ([[[1]]], "prompt 0: token id list at position 0 must be an integer"),
        ([[1, "a"]], "prompt 0: token id str 'a' at position 1"),
        ([[1], [2, True]], "prompt 1: token id bool True at position 1 must be an integer"),
        ([1, 2.0], "prompt 0: token id float 2.0 at position 1 must be an integer"),
        (np.array([[1.5]]), "prompt 0: token id float 1.5"),
        ([{"prompt": 3}], "prompt 0: 'prompt' must be a string, got int 3"),
        ([{"prompt_token_ids": "ab"}], "prompt 0: 'prompt_token_ids' must be a list"),
        ([{"prompt": "a", "cache_salt": 3}], "prompt 0: cache_salt must be a string"),
    ],
)
def test_refused_types(prompts, message):
    with pytest.raises(TypeError, match=message):
        parse_prompts(prompts)


def test_a_model_of_images_takes_their_data():
    data = {"image": object()}
    parsed = parse_prompts(["a", {"prompt": "b", "multi_modal_data": data}], forms=PromptForms(media=True))
    assert parsed == [Prompt("a"), Prompt("b")]
    assert [prompt.media for prompt in parsed] == [None, data]
    with pytest.raises(TypeError, match="prompt 0: 'multi_modal_data' must be a dict .* got list"):
        parse_prompts({"prompt": "a", "multi_modal_data": [1]}, forms=PromptForms(media=True))
    with pytest.raises(ValueError, match="prompt 0: this model takes text and multi_modal_data, leave out 'mm_proc"):
        parse_prompts({"prompt": "a", "mm_processor_kwargs": {}}, forms=PromptForms(media=True))


def test_token_ids_are_checked_against_the_vocabulary():
    check_token_ids((0, 9), 10, 0)
    with pytest.raises(ValueError, match=r"prompt 2: token id -1 at position 1 .*ids run from 0 to 9"):
        check_token_ids((0, -1), 10, 2)
    with pytest.raises(ValueError, match=r"prompt 0: token id 10 at position 0 .*vocab_size=10"):
        check_token_ids((10, 1), 10, 0)
    with pytest.raises(ValueError, match="token id <16610-bit integer>"):
        check_token_ids((10**5000,), 10, 0)


def test_prompts_that_leave_no_room():
    check_prompt_length(9, 10, 0)
    with pytest.raises(
        ValueError,
        match=r"prompt 1: The decoder prompt \(length 11\) is longer than the "
        r"maximum model length of 10\. Shorten the prompt",
    ):
        check_prompt_length(11, 10, 1)
    with pytest.raises(ValueError, match=r"\(length 10\) plus the number of requested output tokens"):
        check_prompt_length(10, 10, 1)
    with pytest.raises(ValueError, match=r"\(length 11, 8 of it images\) is longer .* Pass fewer or smaller images"):
        check_prompt_length(11, 10, 1, 8)
    with pytest.raises(ValueError, match=r"of 10\. Shorten the prompt, or lengthen the model\."):
        check_prompt_length(11, 10, 1, length_hint=", or lengthen the model")


def test_ten_megabytes_of_text_are_refused_or_taken_quickly():
    text = "é" * 10_000_000
    limit = max_prompt_chars(longest_token=16, max_model_len=1024)
    assert limit == 65_536
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"prompt 1: the text has 10000000 characters, more than the 65536"):
        parse_prompts(["a", text], max_chars=limit)
    assert parse_prompts(text)[0].text == text
    assert time.perf_counter() - start < 20
