"""Tiny Qwen3-VL: config.json, weights written without torch, images of several sizes, requests with them."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerFast

from jaxinfer import functional
from jaxinfer.engine.request import Request
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.loading import weights
from jaxinfer.media import EncoderInput, MediaReader
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.sharding import make_mesh
from support import checkpoint
from support.internvl import PLACEHOLDER, words
from support.internvl import write as write_internvl
from support.tiny import CONFIG, make_request, shapes

MARKER = "<|image_pad|>"
MARKERS = ("<|vision_start|>", "<|vision_end|>", MARKER, "<|video_pad|>")
PATCH = 4
"""Side of a patch in pixels; two by two become a token."""
VISION = dict(
    model_type="qwen3_vl_vision",
    depth=4,
    hidden_size=32,
    intermediate_size=40,
    num_heads=2,
    in_channels=3,
    patch_size=PATCH,
    spatial_merge_size=2,
    temporal_patch_size=2,
    out_hidden_size=32,
    num_position_embeddings=36,
    deepstack_visual_indexes=[0, 2],
    hidden_act="gelu_pytorch_tanh",
)
ROPE = {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
PROCESSOR = dict(
    image_processor_type="Qwen2VLImageProcessorFast",
    size={"shortest_edge": 256, "longest_edge": 1024},
    patch_size=PATCH,
    temporal_patch_size=2,
    merge_size=2,
    image_mean=[0.5, 0.4, 0.6],
    image_std=[0.5, 0.3, 0.5],
)
"""preprocessor_config.json: images become 4 to 16 tokens."""
CHAT = (
    "{% for m in messages %}<s>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for part in "
    "m.content %}{% if part.type == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif part.type == 'video' or 'video' in part %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
"""A chat template with the conditions and markers of Qwen3-VL's."""


def config(
    vision: Mapping[str, Any] | None = None, text: Mapping[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """Return config.json as transformers writes it."""
    own = {name: value for name, value in CONFIG.items() if name != "dtype"}
    own |= dict(model_type="qwen3_vl_text", num_hidden_layers=3, rope_parameters=ROPE)
    return (
        dict(
            architectures=["Qwen3VLForConditionalGeneration"],
            model_type="qwen3_vl",
            dtype="float32",
            vision_config=VISION | dict(vision or {}),
            text_config=own | dict(text or {}),
            image_token_id=PLACEHOLDER,
            tie_word_embeddings=False,
        )
        | changes
    )


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Return a smooth random image, so that the resizing method matters."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(small).resize((width, height)).convert(mode)


def image(rows: int, columns: int, seed: int = 0) -> EncoderInput:
    """Return an image of random values that becomes rows x columns tokens."""
    values = np.random.default_rng(seed).standard_normal((rows * columns, 4, 3, PATCH, PATCH), np.float32)
    at = np.stack(np.divmod(np.arange(rows * columns), columns), axis=1)
    numbers = np.concatenate([at, np.broadcast_to([rows, columns], at.shape)], axis=1)
    return EncoderInput("image", values, 1, numbers=numbers)


def write(folder: Path, hf: Mapping[str, Any]) -> Path:
    """Write a checkpoint of random weights."""
    return write_internvl(folder, hf)


@cache
def runner(tp: int = 1) -> Runner:
    """Return the runner of the tiny model, shared by all tests of a worker."""
    with tempfile.TemporaryDirectory() as folder:
        module = weights.load(write(Path(folder), config()), make_mesh(tp), progress=False)
    program, params = functional.split(module, make_mesh(tp))
    return Runner(program, params, shapes(feature_slots=24, encode_buckets=(8, 24)))


def ids_of(parts: Sequence[int | EncoderInput], seed: int = 0) -> list[int]:
    """Return token ids of a prompt of parts: an int for that many words, an image for its tokens."""
    made: list[int] = []
    for at, part in enumerate(parts):
        made += words(part, seed + at) if isinstance(part, int) else [PLACEHOLDER] * part.length
    return made


def placed(program: functional.Program, parts: Sequence[int | EncoderInput], seed: int = 0) -> Any:
    """Return the images of a prompt of parts, placed as `LLM` places them; None without any."""
    reader = MediaReader(program.features)
    return reader.place(ids_of(parts, seed), tuple(part for part in parts if not isinstance(part, int)), 0)


def request(
    name: str, parts: Sequence[int | EncoderInput], params: SamplingParams, *, seed: int = 0, **fields: Any
) -> Request:
    """Make a request of words and images."""
    inputs = placed(runner().program, parts, seed)
    return make_request(name, ids_of(parts, seed), params, inputs=inputs, **fields)


def tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of `support.checkpoint` with image tokens and a chat template that handles images."""
    made = checkpoint.tokenizer()
    made.add_special_tokens({"additional_special_tokens": list(MARKERS)})
    made.chat_template = CHAT
    return made


def folder_config(**changes: Any) -> dict[str, Any]:
    """Return `config` with the vocabulary of `tokenizer`."""
    token = tokenizer().convert_tokens_to_ids(MARKER)
    return config(**{"text": dict(vocab_size=checkpoint.PADDED_VOCAB), "image_token_id": token} | changes)


def add_files(folder: Path) -> Path:
    """Write the other files of a checkpoint: tokenizer, image processor, generation defaults."""
    tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "max_new_tokens": 16}))
    return folder
