"""Requests with images for the tiny InternVL, in compiled shapes shared by all tests of a worker."""

import json
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from jaxinfer import functional
from jaxinfer.engine.request import Request
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.loading import weights
from jaxinfer.media import EncoderInput, MediaReader, PlacedInputs
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.sharding import make_mesh
from support import checkpoint
from support.internvl import PLACEHOLDER, config, tiles, words, write
from support.tiny import make_engine, make_request, run, shapes

ROWS = 4
"""Tokens per tile."""
SLOTS = 6
"""Capacity of the feature pool, in tiles."""


@cache
def image_runner(tp: int = 1) -> Runner:
    """Return the runner of the tiny InternVL, shared by all tests of a worker."""
    with tempfile.TemporaryDirectory() as folder:
        module = weights.load(write(Path(folder), config()), make_mesh(tp), progress=False)
    program, params = functional.split(module, make_mesh(tp))
    return Runner(program, params, shapes(feature_slots=SLOTS, encode_buckets=(1, 2)))


@cache
def deterministic_runner() -> Runner:
    """Return the runner of a deterministic engine of the tiny InternVL in bfloat16, which encodes each tile alone."""
    with tempfile.TemporaryDirectory() as folder:
        module = weights.load(write(Path(folder), config()), make_mesh(1), dtype="bfloat16", progress=False)
    program, params = functional.split(module, make_mesh(1), deterministic=True)
    return Runner(program, params, shapes(feature_slots=SLOTS, encode_buckets=(1,), switched=True))


def image(count: int = 1, seed: int = 0) -> EncoderInput:
    """Return a random image of `count` tiles for a seed."""
    return EncoderInput("image", tiles(count, seed=seed), ROWS)


def ids_of(parts: Sequence[int | EncoderInput], seed: int = 0) -> list[int]:
    """Return token ids of a prompt of parts: an int for that many words, an image for its tokens."""
    made: list[int] = []
    for at, part in enumerate(parts):
        made += words(part, seed + at) if isinstance(part, int) else [PLACEHOLDER] * part.length
    return made


def image_request(
    name: str, parts: Sequence[int | EncoderInput], params: SamplingParams, *, seed: int = 0, **fields: Any
) -> Request:
    """Make a request of words and images, placed as `LLM` places them."""
    ids = ids_of(parts, seed)
    reader = MediaReader(image_runner().program.features)
    placed = reader.place(ids, tuple(part for part in parts if not isinstance(part, int)), 0)
    return make_request(name, ids, params, inputs=placed, **fields)


def alone(wanted: Sequence[Request]) -> list[list[list[int]]]:
    """Return the tokens of each request run alone on its own engine, without prefix-cache hits or preemption."""
    return [_alone(r.id, tuple(r.prompt.tolist()), r.params, r.seed, r.inputs) for r in wanted]


@cache
def _alone(
    name: str, ids: tuple[int, ...], params: SamplingParams, seed: int, inputs: PlacedInputs | None
) -> list[list[int]]:
    engine = make_engine(image_runner(), prefix_caching=False, block_sharing=False)
    request = make_request(name, ids, params, seed=seed, inputs=inputs)
    [made] = run(engine, [request])
    assert all(s.finish_reason != "error" for s in request.sequences)
    assert engine.scheduler.encoder_cache.pool.num_pinned == 0
    return made


IMAGE_MARKERS = ("<img>", "</img>", "<IMG_CONTEXT>")
SIDE = 28
"""Side length of a tile, in pixels."""
CHAT = (
    "<s>{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}{% for part in "
    "m.content %}"
    "{% if part.type == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
"""A chat template that handles images, in the style of InternVL's."""
PROCESSOR = dict(
    image_processor_type="GotOcr2ImageProcessor",
    size={"height": SIDE, "width": SIDE},
    crop_to_patches=False,
    min_patches=1,
    max_patches=4,
    image_mean=[0.485, 0.456, 0.406],
    image_std=[0.229, 0.224, 0.225],
    resample=3,
)
"""preprocessor_config.json."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of `support.checkpoint` with image tokens and a chat template that handles images."""
    made = checkpoint.tokenizer()
    made.add_special_tokens({"additional_special_tokens": list(IMAGE_MARKERS)})
    made.chat_template = CHAT
    return made


def folder_config(**changes: Any) -> dict[str, Any]:
    """Return `support.internvl.config` with the vocabulary of `tokenizer`."""
    token = tokenizer().convert_tokens_to_ids(IMAGE_MARKERS[2])
    return config(**{"text": dict(vocab_size=checkpoint.PADDED_VOCAB), "image_token_id": token} | changes)


def add_files(folder: Path) -> Path:
    """Write the other files of a checkpoint: tokenizer, image processor, generation defaults."""
    tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "max_new_tokens": 16}))
    return folder


def write_folder(folder: Path) -> Path:
    """Write a complete checkpoint of random weights."""
    return add_files(write(folder, folder_config()))
