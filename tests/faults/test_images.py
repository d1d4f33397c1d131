"""Bad images, markers and image tokens: an error that names prompt and image; the others go on unharmed."""

import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.images import IMAGE_MARKERS, ROWS, SIDE, write_folder

from jaxinfer import LLM, SamplingParams, demo
from jaxinfer.errors import CapacityError, ChatTemplateError

pytestmark = [pytest.mark.xdist_group("internvl"), pytest.mark.slow]

SETTINGS = dict(
    max_model_len=128,
    max_num_seqs=4,
    max_num_batched_tokens=32,
    block_size=4,
    decode_buckets=(4,),
    prefill_buckets=(32,),
    kv_cache_memory_bytes=1 << 20,
    check_invariants=True,
    use_tqdm=False,
    decode_steps=1,
    feature_cache_tokens=6 * ROWS,
)
PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8))
"""Three tiles."""
SMALL = Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 20, 3), np.uint8))
"""One."""
TILES = np.random.default_rng(2).standard_normal((2, 3, SIDE, SIDE), np.float32)


@pytest.fixture(scope="module")
def shared_llm(tmp_path_factory) -> Iterator[LLM]:
    with LLM(write_folder(tmp_path_factory.mktemp("internvl")), **SETTINGS) as llm:
        yield llm


def prompt(image=None, text: str = "hello <image> world", **data) -> dict:
    return {"prompt": text, "multi_modal_data": data or {"image": image}}


def tokens(outputs) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def opened(kind: str, keep: float) -> Image.Image:
    """An image from the first part of a file."""
    target = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(target, kind)
    return Image.open(io.BytesIO(target.getvalue()[: int(keep * target.tell())]))


def ids(llm: LLM, count: int) -> list[int]:
    return [5, *[llm.get_tokenizer().convert_tokens_to_ids(IMAGE_MARKERS[2])] * count, 6]


def test_every_accepted_form_gives_the_same(llm):
    tokenizer, array = llm.get_tokenizer(), np.asarray(PICTURE)
    text = f"hello <img>{IMAGE_MARKERS[2] * 3 * ROWS}</img> world"
    [values] = [one.values for one in llm._opened.media.read({"image": PICTURE}, 0)]
    forms = [
        prompt(PICTURE),
        prompt([PICTURE]),
        prompt(array),
        prompt(array / 255),
        prompt(PICTURE, f"hello {IMAGE_MARKERS[2]} world"),
        prompt(pixel_values=values),
        prompt(pixel_values=[values]),
        {"prompt_token_ids": tokenizer.encode(text), "multi_modal_data": {"image": PICTURE}},
    ]
    made = llm.generate(forms, PARAMS)
    assert tokens(made) == tokens(made[:1]) * len(forms)
    assert all(list(output.prompt_token_ids) == tokenizer.encode(text) for output in made)
    assert made[0].prompt == "hello <image> world"
    readings = {metric.name: metric.value for metric in llm.get_metrics()}
    assert readings["jaxinfer:encoder_inputs"] == 3, "one image, one run"


def test_a_conversation_with_images_streams_what_the_whole_call_gives(llm):
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
    text = f"<s>user: {IMAGE_MARKERS[2]}\nand{IMAGE_MARKERS[2]}\nwhat?<|end|>assistant: "
    assert whole.prompt == text and list(whole.prompt_token_ids).count(ids(llm, 1)[1]) == 4 * ROWS
    updates = list(llm.stream_chat(chat, PARAMS))
    assert "".join(update.outputs[0].text for update in updates) == whole.outputs[0].text
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    [joined] = llm.chat(chat, PARAMS, chat_template=plain)
    assert joined.prompt == f"{IMAGE_MARKERS[2]}\nand\n{IMAGE_MARKERS[2]}\nwhat?"
    with pytest.raises(ValueError, match="prompt 0: the text has 0 image markers .* for 2 images"):
        llm.chat(chat, PARAMS, chat_template="image")
    with pytest.raises(ChatTemplateError):
        llm.chat(chat, PARAMS, chat_template="{{ 'image' + messages[0].content }}")


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ("cat.png", TypeError, r"prompt 1, image 0 must be a PIL image or a NumPy array, got str"),
        (b"GIF89a", TypeError, "prompt 1, image 0 .* got bytes; open it"),
        (None, TypeError, "prompt 1, image 0 .* got None"),
        (Image.new("RGB", (5, 0)), ValueError, "prompt 1, image 0 has no pixels: it is 0 high and 5 wide"),
        (Image.new("F", (5, 5)), ValueError, "prompt 1, image 0 has mode 'F'"),
        (opened("PNG", 0.6), ValueError, "prompt 1, image 0 cannot be decoded, it is truncated or corrupt"),
        (opened("JPEG", 0.6), ValueError, "prompt 1, image 0 cannot be decoded, it is truncated or corrupt"),
        ([SMALL, np.full((4, 4, 3), np.nan)], ValueError, "prompt 1, image 1: 48 of 48 values are NaN"),
        (np.zeros((5, 4, 2), np.uint8), ValueError, r"prompt 1, image 0 has shape \[5, 4, 2\]"),
        ([SMALL, SMALL], ValueError, "prompt 1: the text has 1 image marker .* for 2 images"),
    ],
)
def test_a_bad_image_ends_the_call_by_name(llm, data, error, message):
    expected = tokens(llm.generate([prompt(SMALL)], PARAMS))
    with pytest.raises(error, match=message):
        llm.generate([prompt(SMALL), prompt(data), "x"], PARAMS)
    assert not llm._engine.requests
    assert tokens(llm.generate([prompt(SMALL)], PARAMS)) == expected


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (prompt(SMALL, "no marker"), ValueError, "prompt 0: the text has 0 image markers .* for 1 image;"),
        (f"a {IMAGE_MARKERS[2]} b", ValueError, r"prompt 0 has 1 image token \(id \d+\), but no image is given"),
        (
            prompt(pixel_values=TILES[:, :, 1:]),
            ValueError,
            r"prompt 0, image 0: pixel_values has shape \[2, 3, 27, 28\]",
        ),
        (prompt(pixel_values=TILES * np.inf), ValueError, "NaN or infinite"),
        (
            {"prompt": "<image>", "multi_modal_data": {"pixel_values": TILES, "image": SMALL}},
            ValueError,
            "both 'image' and 'pixel_values'",
        ),
        (prompt(audio=3), ValueError, "multi_modal_data has str 'audio'; this model takes 'image'"),
        (
            prompt([SMALL] * 40, "<image>" * 40),
            ValueError,
            r"length 240, 160 of it images\) is longer .* fewer or smaller images",
        ),
        (prompt([PICTURE] * 4, "<image>" * 4), None, ""),
        (
            prompt([PICTURE, SMALL, *map(Image.new, ["RGB"] * 3, [(9, 9), (8, 99), (99, 8)])], "<image>" * 5),
            CapacityError,
            r"prompt 0: a prompt whose images have \d+ tiles \(\d+ tokens\) can never fit in the feature cache: it "
            r"holds 6 tiles of 4",
        ),
    ],
)
def test_what_does_not_fit(llm, wrong, error, message):
    if error is None:  # the same image four times takes the place of one
        assert llm.generate(wrong, PARAMS)[0].finished
        return
    with pytest.raises(error, match=message):
        llm.generate([wrong, prompt(SMALL)], PARAMS)
    assert not llm._engine.requests


@pytest.mark.parametrize("count", [0, 1, 3 * ROWS - 1, 3 * ROWS + 1])
def test_a_wrong_number_of_image_tokens(llm, count):
    with pytest.raises(ValueError, match=rf"prompt 0 has {count} image token.* 1 image of 3 tiles x 4 tokens need 12"):
        llm.generate({"prompt_token_ids": ids(llm, count), "multi_modal_data": {"image": PICTURE}}, PARAMS)


def test_tiny_images_are_images(llm):
    outputs = llm.generate(
        [prompt(Image.new(mode, size)) for mode in ("1", "P", "RGBA") for size in ((1, 2), (3, 300))], PARAMS
    )
    assert all(output.outputs[0].finish_reason == "length" for output in outputs)


def test_another_image_under_the_same_text_is_never_a_hit(llm):
    expected = [tokens(llm.generate([prompt(image)], PARAMS)) for image in (SMALL, Image.new("RGB", (20, 20)))]
    assert expected[0] != expected[1]
    for image, want in zip((SMALL, Image.new("RGB", (20, 20))), expected, strict=True):
        [again] = llm.generate([prompt(image)], PARAMS)
        assert tokens([again]) == want and again.num_cached_tokens


def test_new_weights_forget_encoded_images(llm):
    import jax

    before = tokens(llm.generate([prompt(PICTURE)], PARAMS))
    own = llm.weights(names="jaxinfer")
    changed = jax.tree.map_with_path(lambda path, a: -a if "vision_tower" in str(path) else a, own)
    try:
        llm.update_weights(changed)
        assert tokens(llm.generate([prompt(PICTURE)], PARAMS)) != before
    finally:
        llm.update_weights(own)
    assert tokens(llm.generate([prompt(PICTURE)], PARAMS)) == before


def test_the_example_of_the_readme(llm, tmp_path, monkeypatch):
    readme = Path(__file__).parents[2] / "README.md"
    [code] = [code for code in re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL) if "cat.jpg" in code]
    PICTURE.save(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"llm": llm})
    readings = {metric.name: metric.value for metric in llm.get_metrics()}
    assert readings["jaxinfer:mm_cache_hits"] >= 1, "the same image in both calls"


def test_an_aborted_stream_lets_go(llm):
    stream = llm.stream([prompt([PICTURE, SMALL], "<image> and <image>" + " the cat" * 10)] * 3, PARAMS)
    next(stream)
    stream.close()


def test_a_text_model_takes_no_image():
    with LLM(demo.path(), max_model_len=64, use_tqdm=False) as llm:
        with pytest.raises(ValueError, match="prompt 0: this model takes text only, leave out 'multi_modal_data'"):
            llm.generate(prompt(SMALL), PARAMS)
        with pytest.raises(ValueError, match=r"\['content'\]\[0\] is of type str 'image': this model takes text only"):
            llm.chat([{"role": "user", "content": [{"type": "image", "image": SMALL}]}], PARAMS)
