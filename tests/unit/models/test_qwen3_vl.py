"""Qwen3-VL without a device: config.json's refusals, positions of M-RoPE, images and image tokens that do not fit."""

import json
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from support import qwen3_vl
from support.internvl import PLACEHOLDER
from support.memory import MemorySource
from support.qwen3_vl import PROCESSOR, image, picture

from jaxinfer.checkpoint.transposed_experts import TransposedExperts
from jaxinfer.errors import CheckpointError, ConfigError
from jaxinfer.layers.rope import frequency_axes
from jaxinfer.loading import weights
from jaxinfer.media import ImageProcessor, MediaReader
from jaxinfer.models.qwen3_vl.images import IMAGES

FEATURES = weights.parse(qwen3_vl.config())[1].features


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision": {"out_hidden_size": 48}}, "vision_config.out_hidden_size is 48, but text_config.hidden_size is 32"),
        ({"vision": {"hidden_size": 36}}, "hidden_size / num_heads is 18; it must be a multiple of 4"),
        ({"vision": {"num_position_embeddings": 35}}, "num_position_embeddings is 35; it must be a square number"),
        ({"vision": {"deepstack_visual_indexes": [2, 1]}}, "must be ascending layers from 0 to 3"),
        ({"vision": {"deepstack_visual_indexes": [4]}}, "must be ascending layers from 0 to 3"),
        ({"vision": {"hidden_act": "tanh"}}, "hidden_act"),
        ({"vision": {"window_size": 112}}, "unknown attributes.*window_size"),
        ({"vision": {"rope_parameters": {"rope_type": "yarn", "factor": 2}}}, "the tower's rope has rope_type 'axial'"),
        ({"text": {"rope_parameters": {"mrope_section": [4, 4]}}}, "mrope_section is .4, 4.; it must be three"),
        ({"text": {"rope_parameters": {"mrope_section": [2, 3, 3]}}}, "the last two are at most a third"),
        ({"text": {"rope_parameters": qwen3_vl.ROPE | {"mrope_interleaved": False}}}, "only true is supported"),
        (
            {"text": {"rope_parameters": qwen3_vl.ROPE | {"rope_type": "dynamic", "factor": 2.0}}},
            "rope type 'dynamic' is not supported with images",
        ),
        ({"image_token_id": 97}, "image_token_id is 97, but vocab_size is 97"),
    ],
)
def test_what_config_json_may_not_have(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        weights.parse(qwen3_vl.config(**changes))


def test_the_head_is_tied_as_the_whole_model_says():
    for whole, part in ((False, True), (True, False)):
        hf = qwen3_vl.config(text={"tie_word_embeddings": part}, tie_word_embeddings=whole)
        assert weights.parse(hf)[1].text.tied is whole
    del hf["tie_word_embeddings"]
    assert weights.parse(hf)[1].text.tied is False  # the default of transformers' class


def test_frequencies_are_woven():
    assert frequency_axes(8, [3, 3, 2]).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert frequency_axes(8, [6, 1, 1]).tolist() == [0, 1, 2, 0, 0, 0, 0, 0]


def placed(ids, *images):
    return MediaReader(FEATURES).place(ids, images, 0)


def test_positions_of_text_and_grids():
    found = placed(
        [1, 2, *[PLACEHOLDER] * 6, 3, *[PLACEHOLDER] * 2, *[PLACEHOLDER], 4], image(2, 3), image(2, 1), image(1, 1)
    )
    grid = [(2 + row, 2 + column) for row in range(2) for column in range(3)]
    expected = [(0, 0, 0), (1, 1, 1), *((2, *at) for at in grid), (5, 5, 5), (6, 6, 6), (6, 7, 6), (8, 8, 8), (9, 9, 9)]
    assert found.rope.at(0, 13).tolist() == [list(at) for at in expected]
    assert found.rope.shift == 9 - 12 and found.rope.at(12, 2).tolist() == [[9] * 3, [10] * 3]
    assert found.rope.at(4, 3).tolist() == found.rope.at(0, 13)[4:7].tolist() and found.rope.at(40, 0).shape == (0, 3)


def test_image_tokens_that_do_not_fit():
    with pytest.raises(ValueError, match="prompt 0: other tokens stand between the 6 image tokens .id 90. of image 0"):
        placed([*[PLACEHOLDER] * 3, 1, *[PLACEHOLDER] * 3], image(2, 3))
    with pytest.raises(ValueError, match="5 image tokens .id 90., but 1 image of 6 tokens need 6"):
        placed([PLACEHOLDER] * 5, image(2, 3))


def test_videos_and_preprocessed_pixels_are_refused_by_name():
    for key in ("video", "pixel_values"):
        with pytest.raises(ValueError, match=f"multi_modal_data has str '{key}'; this model takes 'image'[.]"):
            MediaReader(FEATURES).read({key: []}, 0)
    with pytest.raises(ValueError, match="no checkpoint with an image processor; load the model from its checkpoint"):
        MediaReader(FEATURES).read({"image": picture(9, 9)}, 0)


@pytest.mark.parametrize("change", [{"patch_size": 8}, {"merge_size": 1}])
def test_a_processor_that_does_not_match_the_model(change, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | change))
    read = MediaReader(FEATURES, None, IMAGES, ImageProcessor(IMAGES, tmp_path, {}, FEATURES.shape))
    with pytest.raises(CheckpointError, match=r"preprocessor_config.json and config.json do not match"):
        read.read({"image": picture(20, 20)}, 0)


def test_a_checkpoint_without_a_processor(tmp_path):
    read = MediaReader(FEATURES, None, IMAGES, ImageProcessor(IMAGES, tmp_path, {}, FEATURES.shape))
    with pytest.raises(CheckpointError, match=r"^[^:]* has no preprocessor_config.json .*add the model's own$"):
        read.read({"image": picture(20, 20)}, 0)


def test_images_in_chats_of_text_templates_have_the_tokens_around_them():
    assert MediaReader(FEATURES, None, IMAGES).marker == "<|vision_start|><|image_pad|><|vision_end|>"


def test_images_have_the_processor_s_size(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    read = MediaReader(FEATURES, None, IMAGES, ImageProcessor(IMAGES, tmp_path, {}, FEATURES.shape))
    found = [read.read({"image": picture(*size)}, 0)[0] for size in ((1, 150), (64, 64), (16, 48))]
    assert [one.numbers[0, 2:].tolist() for one in found] == [[25, 1], [4, 4], [6, 2]]
    with pytest.raises(ValueError, match="prompt 0, image 0 of 1 x 900 pixels cannot be preprocessed.*aspect ratio"):
        read.read({"image": picture(900, 1)}, 0)


def test_images_are_not_divided_over_an_axis():
    kinds = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 1), ("data", "model"), axis_types=kinds, devices=jax.devices()[:2])
    with pytest.raises(ConfigError, match="this model has none that takes tiles of one size"):
        weights.random(qwen3_vl.config(), mesh, dtype="float32")


def test_experts_of_shapes_that_do_not_fit():
    name = "model.language_model.layers.0.mlp.experts."
    for down, message in (((4, 24, 30), "do not fit: expected"), (None, "down_proj is not there beside")):
        held = {name + "gate_up_proj": np.zeros((4, 32, 48))} | (
            {} if down is None else {name + "down_proj": np.zeros(down)}
        )
        with pytest.raises(CheckpointError, match=message):
            TransposedExperts(MemorySource(held))
    square = {name + "gate_up_proj": np.zeros((4, 32, 32)), name + "down_proj": np.zeros((4, 16, 32))}
    turned = TransposedExperts(MemorySource(square))
    assert [tuple(turned.info(one).shape) for one in square] == [(4, 32, 32), (4, 32, 16)]
    part = turned.read(name + "down_proj", (slice(1, 3), slice(0, 5), slice(2, 16)))
    assert part.shape == (2, 5, 14)
    always = TransposedExperts(MemorySource({name + "gate_up_proj": np.zeros((4, 32, 48))}), always=True)
    assert tuple(always.info(name + "gate_up_proj").shape) == (4, 48, 32)
