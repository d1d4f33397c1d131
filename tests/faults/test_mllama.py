"""A Llama 3.2 Vision with a tokenizer: chats with images; bad ones are errors that name the prompt, the others go
on."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.mllama import MARKER, PATCHES, PROCESSOR, SIDE, TILES, write_folder
from transformers import MllamaImageProcessorPil

from jaxinfer import LLM, SamplingParams
from jaxinfer.models.mllama.config import MOST_IMAGES

pytestmark = [pytest.mark.xdist_group("mllama"), pytest.mark.slow]

SETTINGS = dict(
    max_model_len=128,
    max_num_seqs=8,
    max_num_batched_tokens=32,
    block_size=4,
    kv_cache_memory_bytes=1 << 21,
    check_invariants=True,
    use_tqdm=False,
)
PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8))
SMALL = Image.new("RGB", (20, 20), (250, 20, 10))


@pytest.fixture(scope="module")
def shared_llm(tmp_path_factory) -> Iterator[LLM]:
    with LLM(write_folder(tmp_path_factory.mktemp("mllama")), **SETTINGS) as llm:
        yield llm


def prompt(image: Any = None, text: str = f"{MARKER}hello world", **data: Any) -> dict[str, Any]:
    return {"prompt": text, "multi_modal_data": data or {"image": image}}


def tokens(outputs) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def opened(kind: str, keep: float) -> Image.Image:
    """An image from the first part of a file."""
    target = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(target, kind)
    return Image.open(io.BytesIO(target.getvalue()[: int(keep * target.tell())]))


def preprocessed() -> dict[str, np.ndarray]:
    """What transformers' own processor makes of the picture."""
    settings = {name: value for name, value in PROCESSOR.items() if name != "image_processor_type"}
    out = MllamaImageProcessorPil(**settings)(PICTURE, return_tensors="np")
    return {"pixel_values": out["pixel_values"][0], "aspect_ratio_ids": out["aspect_ratio_ids"][0]}


def test_every_form_of_an_image_gives_the_same(llm):
    array = np.asarray(PICTURE)
    ids = llm.get_tokenizer().encode(f"{MARKER}hello world")
    forms = [
        prompt(PICTURE),
        prompt([PICTURE]),
        prompt(array),
        prompt(array / 255),
        prompt(**preprocessed()),
        prompt(PICTURE, "<image>hello world"),
        {"prompt_token_ids": ids, "multi_modal_data": {"image": PICTURE}},
    ]
    made = llm.generate(forms, PARAMS)
    assert tokens(made) == tokens(made[:1]) * len(forms)
    assert all(list(output.prompt_token_ids) == ids for output in made)
    readings = {metric.name: metric.value for metric in llm.get_metrics()}
    assert readings["jaxinfer:encoder_inputs"] == 1, "one image, one run"


def test_an_image_tells_and_no_other_answer_is_found_for_it(llm):
    one, other, none = prompt(PICTURE), prompt(SMALL), "hello world"
    made = tokens(llm.generate([one, other, none], PARAMS))
    assert len(set(map(tuple, made))) == 3
    assert tokens(llm.generate([none, other, one], PARAMS)) == made[::-1], "now from the prefix cache"
    assert tokens([output for asked in (one, other, none) for output in llm.generate(asked, PARAMS)]) == made


def test_a_conversation_with_images(llm):
    chat = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": PICTURE},
                {"type": "text", "text": "and"},
                {"type": "image", "image": np.asarray(SMALL)},
                "what?",
            ],
        }
    ]
    [whole] = llm.chat(chat, PARAMS)
    assert whole.prompt == f"<s>user: {MARKER}and{MARKER}what?<|end|>assistant: "
    updates = list(llm.stream_chat(chat, PARAMS))
    assert "".join(update.outputs[0].text for update in updates) == whole.outputs[0].text
    [plain] = llm.chat([{"role": "user", "content": "hello"}], PARAMS)
    assert plain.outputs[0].token_ids


@pytest.mark.parametrize("size", [(1, 2), (1, 300), (300, 1), (SIDE, SIDE), (3, 2)])
def test_images_of_every_size_are_served(llm, size):
    """Two pixels are an image: the processor scales it up."""
    [output] = llm.generate(prompt(Image.new("RGB", size, (200, 10, 90))), PARAMS)
    assert output.finished and output.outputs[0].finish_reason == "length"


GOOD = preprocessed()


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (prompt("cat.png"), TypeError, "prompt 1, image 0 must be a PIL image or a NumPy array, got str"),
        (prompt(None), TypeError, "prompt 1, image 0 .* got None"),
        (prompt(Image.new("RGB", (5, 0))), ValueError, "prompt 1, image 0 has no pixels"),
        (prompt(Image.new("F", (5, 5))), ValueError, "prompt 1, image 0 has mode 'F'"),
        (prompt(Image.new("RGB", (1, 1))), ValueError, "prompt 1, image 0 has 1 x 1 pixels; the minimum is 2"),
        (prompt(opened("PNG", 0.6)), ValueError, "prompt 1, image 0 cannot be decoded, it is truncated or corrupt"),
        (prompt(opened("JPEG", 0.6)), ValueError, "prompt 1, image 0 cannot be decoded, it is truncated or corrupt"),
        (prompt(np.full((4, 4, 3), np.nan)), ValueError, "prompt 1, image 0: 48 of 48 values are NaN"),
        (prompt(np.zeros((5, 4, 2), np.uint8)), ValueError, r"prompt 1, image 0 has shape \[5, 4, 2\]"),
        (prompt([SMALL, SMALL]), ValueError, r"prompt 1 has 1 image token \(<\|image\|>, id \d+\) for 2 images"),
        (prompt(SMALL, "no marker"), ValueError, "prompt 1 has 0 image tokens .* for 1 image;"),
        (f"a {MARKER} b", ValueError, "prompt 1 has 1 image token .* for 0 images;"),
        (
            prompt(audio=3),
            ValueError,
            "multi_modal_data has str 'audio'; this model takes 'image', or preprocessed 'pixel_values'",
        ),
        (
            {"prompt": MARKER, "multi_modal_data": GOOD | {"image": SMALL}},
            ValueError,
            "both 'image' and 'pixel_values'",
        ),
        (prompt(pixel_values=GOOD["pixel_values"]), ValueError, "'pixel_values' and 'aspect_ratio_ids' together"),
        (
            prompt(**GOOD | {"pixel_values": GOOD["pixel_values"][..., 1:]}),
            ValueError,
            r"prompt 1: pixel_values has shape \[1, 4, 3, 28, 27\]",
        ),
        (
            prompt(**GOOD | {"aspect_ratio_ids": np.array([9])}),
            ValueError,
            "aspect_ratio_ids has values from 9 to 9; this model has canvases 1 to 8",
        ),
        (prompt(**GOOD | {"aspect_ratio_ids": np.array([0])}), ValueError, "values from 0 to 0"),
        (
            prompt(**GOOD | {"aspect_ratio_ids": np.array([1, 2])}),
            ValueError,
            "aspect_ratio_ids must be 1 integers, one an image",
        ),
        (
            prompt([PICTURE] * 40, MARKER * 40),
            ValueError,
            rf"encoder prompt \(length \d+\) is longer than the {MOST_IMAGES * TILES * PATCHES} positions",
        ),
        ({"prompt_token_ids": [10**6]}, ValueError, "token id 1000000"),
    ],
)
def test_a_bad_prompt_ends_the_call_by_name(llm, wrong, error, message):
    with pytest.raises(error, match=message):
        llm.generate([prompt(SMALL), wrong, "x"], PARAMS)
    assert not llm._engine.requests


def test_the_others_are_unharmed(llm):
    good = [prompt(SMALL), "hello"]
    before = tokens(llm.generate(good, PARAMS))
    with pytest.raises(ValueError, match="prompt 2"):
        llm.generate([*good, prompt(opened("PNG", 0.6))], PARAMS)
    assert tokens(llm.generate(good, PARAMS)) == before


def test_tokens_beyond_the_vocabulary_are_never_made(llm):
    token = llm.get_tokenizer().convert_tokens_to_ids(MARKER)
    made = llm.generate([prompt(PICTURE)] * 2, SamplingParams(temperature=50.0, max_tokens=40, ignore_eos=True))
    assert max(max(output.outputs[0].token_ids) for output in made) < token
    with pytest.raises(ValueError, match="outside the vocabulary"):
        llm.generate("x", SamplingParams(logit_bias={token: 1.0}))


def test_the_image_token_is_impossible_not_nan(llm):
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1)
    [output] = llm.generate(prompt(PICTURE, f"a{MARKER}b"), params)
    ids = list(output.prompt_token_ids)
    at = ids.index(llm.get_tokenizer().convert_tokens_to_ids(MARKER))
    values = [row[token].logprob for row, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
    assert values[at - 1] == -np.inf and all(np.isfinite(value) for i, value in enumerate(values) if i != at - 1)
