"""Requests with images for the tiny InternVL, in shapes that all tests of a worker share."""

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
"""Tokens of a tile."""
SLOTS = 6
"""Tiles that the feature pool holds."""


@cache
def image_runner(tp: int = 1) -> Runner:
    """The tiny InternVL and its steps: one for all tests of a worker."""
    with tempfile.TemporaryDirectory() as folder:
        module = weights.load(write(Path(folder), config()), make_mesh(tp), progress=False)
    program, params = functional.split(module, make_mesh(tp))
    return Runner(program, params, shapes(feature_slots=SLOTS, encode_buckets=(1, 2)))


def image(count: int = 1, seed: int = 0) -> EncoderInput:
    """An image of `count` tiles; another seed, another image."""
    return EncoderInput("image", tiles(count, seed=seed), ROWS)


def ids_of(parts: Sequence[int | EncoderInput], seed: int = 0) -> list[int]:
    """Token ids of a prompt: so many words, or an image's tokens."""
    made: list[int] = []
    for at, part in enumerate(parts):
        made += words(part, seed + at) if isinstance(part, int) else [PLACEHOLDER] * part.length
    return made


def image_request(
    name: str, parts: Sequence[int | EncoderInput], params: SamplingParams, *, seed: int = 0, **fields: Any
) -> Request:
    """A request of words and images, placed as `LLM` places them."""
    ids = ids_of(parts, seed)
    reader = MediaReader(image_runner().program.features)
    placed = reader.place(ids, tuple(part for part in parts if not isinstance(part, int)), 0)
    return make_request(name, ids, params, inputs=placed, **fields)


def alone(wanted: Sequence[Request]) -> list[list[list[int]]]:
    """What each request makes in an engine of its own: nothing shared, cached or preempted."""
    return [_alone(r.id, tuple(r.prompt.tolist()), r.params, r.seed, r.inputs) for r in wanted]


@cache
def _alone(
    name: str, ids: tuple[int, ...], params: SamplingParams, seed: int, inputs: PlacedInputs | None
) -> list[list[int]]:
    engine = make_engine(image_runner(), prefix_caching=False, block_sharing=False)
    request = make_request(name, ids, params, seed=seed, inputs=inputs)
    [made] = run(engine, [request])
    assert all(s.finish_reason != "error" for s in request.sequences)
    assert engine.scheduler.encoding.pool.num_pinned == 0
    return made


IMAGE_MARKERS = ("<img>", "</img>", "<IMG_CONTEXT>")
SIDE = 28
"""Pixels a side of a tile."""
CHAT = (
    "<s>{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}{% for part in "
    "m.content %}"
    "{% if part.type == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
"""A chat template that knows of images, in the way of InternVL's."""
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
    """That of `support.checkpoint`, with an image's tokens and a chat template that knows of images."""
    made = checkpoint.tokenizer()
    made.add_special_tokens({"additional_special_tokens": list(IMAGE_MARKERS)})
    made.chat_template = CHAT
    return made


def folder_config(**changes: Any) -> dict[str, Any]:
    """`support.internvl.config` with the vocabulary of `tokenizer`."""
    token = tokenizer().convert_tokens_to_ids(IMAGE_MARKERS[2])
    return config(**{"text": dict(vocab_size=checkpoint.PADDED_VOCAB), "image_token_id": token} | changes)


def add_files(folder: Path) -> Path:
    """What a checkpoint has beside weights and config.json: tokenizer, image processor, defaults of generation."""
    tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "max_new_tokens": 16}))
    return folder


def write_folder(folder: Path) -> Path:
    """A whole checkpoint of random weights."""
    return add_files(write(folder, folder_config()))
