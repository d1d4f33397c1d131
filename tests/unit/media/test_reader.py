"""Reading `multi_modal_data`: tiles, text with placeholders, positions of image tokens."""

import json
import sys

import numpy as np
import pytest
from PIL import Image
from support import checkpoint
from support.images import IMAGE_MARKERS, PROCESSOR, SIDE

from jaxinfer.errors import CheckpointError, ConfigError
from jaxinfer.media import EncoderInput, ImageProcessor, MediaReader
from jaxinfer.media.inputs import Features
from jaxinfer.models.internvl.images import IMAGES, MEAN, STD

SHAPE, ROWS, TOKEN = (3, SIDE, SIDE), 4, 90
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8))
"""Almost twice as wide as high: two tiles and a thumbnail."""
ORIGINAL = {"llm_config": {}, "vision_config": {"image_size": 448}, "force_image_size": SIDE, "max_dynamic_patch": 4}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return tmp_path


def reader(folder=None, hf=None, token=TOKEN, tokenizer=None, shape=SHAPE) -> MediaReader:
    processor = None if folder is None else ImageProcessor(IMAGES, folder, hf or {}, shape)
    return MediaReader(Features("image", SHAPE, ROWS, token), tokenizer, IMAGES if folder else None, processor)


def tiles(count: int, seed: int = 0) -> EncoderInput:
    return EncoderInput("image", np.full((count, *SHAPE), seed, np.float32), ROWS)


def by_hand(columns: int, mean=MEAN, std=STD) -> np.ndarray:
    """The tiles of the picture in this many columns, and its thumbnail."""
    wide = np.asarray(PICTURE.resize((columns * SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
    small = np.asarray(PICTURE.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
    pieces = np.stack([*np.split(wide, columns, axis=1), small]) / 255
    return ((pieces - np.float32(mean)) / np.float32(std)).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("image", [PICTURE, np.asarray(PICTURE), np.asarray(PICTURE).transpose(2, 0, 1)])
def test_an_image_becomes_tiles_and_a_thumbnail(folder, image):
    [found] = reader(folder).read({"image": image}, 0)
    assert found.values.shape == (3, *SHAPE) and found.length == 12
    np.testing.assert_allclose(found.values, by_hand(2), atol=1e-5)


def test_original_checkpoints_are_cut_as_config_json_says(tmp_path):
    [found] = reader(tmp_path, ORIGINAL).read({"image": PICTURE}, 0)
    np.testing.assert_allclose(found.values, by_hand(2), atol=1e-5)
    for change, count in (
        ({"max_dynamic_patch": 1}, 1),
        ({"dynamic_image_size": False}, 1),
        ({"use_thumbnail": False}, 2),
        ({"min_dynamic_patch": 3, "max_dynamic_patch": 3}, 4),
    ):
        [found] = reader(tmp_path, ORIGINAL | change).read({"image": PICTURE}, 0)
        assert found.count == count, change
    with pytest.raises(ConfigError, match="pad2square"):
        reader(tmp_path, ORIGINAL | {"pad2square": True})


def test_processors_nested_in_processor_config_are_found(tmp_path):
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": PROCESSOR}))
    assert reader(tmp_path).read({"image": PICTURE}, 0)[0].count == 3


def test_code_of_the_checkpoint_is_not_executed(folder):
    own = PROCESSOR | {"auto_map": {"AutoImageProcessor": "evil.Evil"}, "image_processor_type": "EvilImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(own))
    (folder / "evil.py").write_text("raise SystemExit")
    with pytest.raises(
        CheckpointError, match="image_processor_type is 'EvilImageProcessor', which the installed transformers"
    ):
        reader(folder).read({"image": PICTURE}, 0)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(own | {"image_processor_type": "GotOcr2ImageProcessorFast"})
    )
    assert reader(folder).read({"image": PICTURE}, 0)[0].count == 3


def test_a_checkpoint_without_a_processor_and_one_of_another_model(tmp_path, folder):
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="has no preprocessor_config.json or .*'pixel_values'"):
        reader(folder).read({"image": PICTURE}, 0)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | {"size": {"height": 14, "width": 14}}))
    with pytest.raises(CheckpointError, match=r"tiles of shape \[3, 14, 14\], but the model takes \[3, 28, 28\]"):
        reader(folder).read({"image": PICTURE}, 0)


def test_pillow_is_asked_for_when_it_is_missing(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxinfer\[vision\]'"):
        reader(folder).read({"image": np.zeros((4, 4, 3), np.uint8)}, 0)


@pytest.mark.parametrize("size", [(1, 2), (1, 200), (200, 1), (3, 3), (28, 28)])
def test_images_of_any_size(folder, size):
    found = reader(folder).read({"image": [Image.new("RGB", size)]}, 0)
    assert found[0].values.shape[1:] == SHAPE and np.isfinite(found[0].values).all()


def test_several_images_keep_their_order(folder):
    small = Image.new("L", (10, 10), 77)
    both = reader(folder).read({"image": [small, PICTURE]}, 0)
    assert [one.count for one in both] == [1, 3]
    assert [one.digest for one in both] == [reader(folder).read({"image": i}, 0)[0].digest for i in (small, PICTURE)]


def test_pixel_values_go_in_as_they_are():
    values = np.random.default_rng(0).standard_normal((2, *SHAPE), np.float32)
    [one] = reader().read({"pixel_values": values}, 0)
    np.testing.assert_array_equal(one.values, values)
    assert [i.count for i in reader().read({"pixel_values": [values, values[:1]]}, 0)] == [2, 1]
    assert reader().read(None, 0) == reader().read({}, 0) == reader().read({"image": []}, 0) == ()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"audio": 1},
            "prompt 3: multi_modal_data has str 'audio'; this model takes 'image', or preprocessed 'pixel_values'",
        ),
        ({"image": [], "pixel_values": []}, "prompt 3: multi_modal_data has both"),
        ({"image": np.zeros((2, 2, 3), np.uint8)}, "prompt 3, image 0: there is no checkpoint with an image processor"),
        (
            {"pixel_values": [np.zeros((1, *SHAPE)), np.zeros((1, 3, 2, 2))]},
            "prompt 3, image 1: pixel_values has shape",
        ),
    ],
)
def test_refused_data(data, message):
    with pytest.raises(ValueError, match=message):
        reader().read(data, 3)


def test_text_gets_each_images_tokens(folder):
    made = reader(folder).expand("a<IMG_CONTEXT>b<image>\n", (tiles(1), tiles(2)), 0)
    assert made == f"a<img>{'<IMG_CONTEXT>' * 4}</img>b<img>{'<IMG_CONTEXT>' * 8}</img>\n"
    assert reader(folder).expand("an <image> tag", (), 0) == "an <image> tag"


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("a", 1, "prompt 2: the text has 0 image markers .* for 1 image; put one where"),
        ("<image><IMG_CONTEXT>", 1, "has 2 image markers .* for 1 image;"),
        ("<image>", 2, r"has 1 image marker \(<IMG_CONTEXT> or <image>\) for 2 images"),
    ],
)
def test_markers_and_images_must_match(folder, text, count, message):
    with pytest.raises(ValueError, match=message):
        reader(folder).expand(text, (tiles(1),) * count, 2)


def test_places_are_those_of_the_images_tokens():
    placed = reader().place([1, *[TOKEN] * 4, 2, *[TOKEN] * 8, 3], (tiles(1), tiles(2, 1)), 0)
    assert placed.places.tolist() == [1, 2, 3, 4, *range(6, 14)]
    assert reader().place([1, 2], (), 0) is None


@pytest.mark.parametrize(
    ("ids", "images", "message"),
    [
        ([1, TOKEN], 0, r"prompt 5 has 1 image token \(id 90\), but no image is given; pass multi_modal_data"),
        ([1], 1, r"has 0 image tokens \(id 90\), but 1 image of 2 tiles x 4 tokens need 8"),
        ([TOKEN] * 7, 1, "has 7 image tokens"),
        ([TOKEN] * 17, 2, r"has 17 .* 2 images of 2 \+ 2 tiles x 4 tokens need 16"),
    ],
)
def test_tokens_and_images_must_match(ids, images, message):
    with pytest.raises(ValueError, match=message):
        reader().place(ids, (tiles(2),) * images, 5)


def test_the_image_token_defaults_to_the_tokenizers(folder):
    tokenizer = checkpoint.tokenizer()
    assert reader(folder, token=-1, tokenizer=tokenizer).place([5], (), 0) is None
    with pytest.raises(ValueError, match="prompt 0: neither config.json nor the tokenizer names the image token"):
        reader(folder, token=-1, tokenizer=tokenizer).place([5], (tiles(1),), 0)
    tokenizer.add_special_tokens({"additional_special_tokens": list(IMAGE_MARKERS)})
    token = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    assert reader(folder, token=-1, tokenizer=tokenizer).place([token] * 4, (tiles(1),), 0).places.tolist() == [
        0,
        1,
        2,
        3,
    ]
