"""Tiny Llama 3.2 Vision: config.json, weights written without torch, images."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerFast

from jaxinfer.media import CrossInputs, EncoderInput
from jaxinfer.models.mllama.prompt import ranges
from support import checkpoint

VOCAB, SIDE, PATCHES, TILES = 96, 28, 17, 4
"""Tokens of the head; side length of a tile in pixels; patches per tile, including the class token; maximum tiles per
image."""
IMAGE = VOCAB
"""Image token id: the first row of the embedding beyond the head's tokens."""
RATIOS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]

VISION = dict(
    model_type="mllama_vision_model",
    hidden_size=32,
    num_hidden_layers=3,
    num_global_layers=2,
    attention_heads=4,
    intermediate_size=48,
    image_size=SIDE,
    patch_size=7,
    max_num_tiles=TILES,
    intermediate_layers_indices=[0, 2],
    vision_output_dim=96,
    num_channels=3,
    hidden_act="gelu",
    norm_eps=0.02,
    supported_aspect_ratios=RATIOS,
)
TEXT = dict(
    model_type="mllama_text_model",
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    cross_attention_layers=[1, 3],
    max_position_embeddings=256,
    hidden_act="silu",
    rms_norm_eps=0.05,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    rope_parameters={
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
)
PROCESSOR = dict(
    image_processor_type="MllamaImageProcessor",
    size={"height": SIDE, "width": SIDE},
    max_image_tiles=TILES,
    image_mean=[0.48, 0.46, 0.41],
    image_std=[0.27, 0.26, 0.28],
    resample=2,
    do_pad=True,
    do_resize=True,
)
MARKER = "<|image|>"


def config(
    vision: Mapping[str, Any] | None = None, text: Mapping[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """Return config.json as transformers writes it."""
    return (
        dict(
            architectures=["MllamaForConditionalGeneration"],
            model_type="mllama",
            dtype="float32",
            image_token_index=IMAGE,
            vision_config=VISION | dict(vision or {}),
            text_config=TEXT | dict(text or {}),
        )
        | changes
    )


def noise(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Return random values of a tensor, scaled for activations of order one; no bias, gate or norm is neutral."""
    values = generator.standard_normal(shape, np.float32)
    if name.endswith(("norm.weight", "layernorm_pre.weight", "layernorm_post.weight")):
        return 1 + 0.4 * values
    if name.endswith(
        ("cross_attn_attn_gate", "cross_attn_mlp_gate")
    ):  # larger gates would make every image predict the same token
        return np.float32(0.3 if "attn_attn" in name else 0.1) * np.sign(values)
    if "gate" in name and "proj" not in name:
        return np.sign(values) * (0.5 + 0.3 * np.abs(values))
    if name.endswith("bias"):
        return 0.5 * values
    if "embed" in name and "patch" not in name:
        return values
    if name.endswith("lm_head.weight"):
        return 0.7 * values
    scale = 3.0 if name.endswith(("down_proj.weight", "fc2.weight")) else 1.5
    return scale * np.float32(np.prod(shape[1:]) ** -0.5) * values


def write(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write a checkpoint of random weights with its image processor."""
    folder.mkdir(parents=True, exist_ok=True)
    hf, generator = config(**changes), np.random.default_rng(seed)
    made = {name: noise(name, value.shape, generator) for name, value in sorted(checkpoint.tensors(hf).items())}
    save_file(made, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf))
    return add_files(folder)


def add_files(folder: Path) -> Path:
    """Write the files of a checkpoint other than weights and config.json."""
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "max_new_tokens": 16}))
    return folder


CHAT = (
    "<s>{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}{% for part in "
    "m.content %}"
    "{% if part.type == 'image' %}<|image|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
"""A chat template that handles images, in the style of Llama 3.2's."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of `support.checkpoint` plus the image token, its last id, which the head does not have."""
    made = checkpoint.tokenizer()
    made.add_special_tokens({"additional_special_tokens": [MARKER]})
    made.chat_template = CHAT
    return made


def write_folder(folder: Path) -> Path:
    """Write a checkpoint with a tokenizer."""
    made = tokenizer()
    token = made.convert_tokens_to_ids(MARKER)
    write(folder, text={"vocab_size": token}, image_token_index=token)
    made.save_pretrained(folder)
    return folder


def image(canvas: int = 1, seed: int = 0) -> EncoderInput:
    """Return a random image with this canvas (aspect-ratio id), as the media reader makes it."""
    down, across = RATIOS[canvas - 1]
    tiles = np.zeros((TILES, 3, SIDE, SIDE), np.float32)
    tiles[: down * across] = np.random.default_rng(seed).standard_normal((down * across, 3, SIDE, SIDE))
    return EncoderInput("image", tiles[None], TILES * PATCHES, down * across * PATCHES, np.array([[canvas]], np.int32))


def cross(ids: Sequence[int], images: Sequence[EncoderInput]) -> CrossInputs | None:
    """Return the cross-attention inputs of a prompt, as the reader makes them."""
    if not images:
        return None
    places = [at for at, token in enumerate(ids) if token == IMAGE]
    return CrossInputs(tuple(images), ranges(places, [one.length for one in images]))


def words(count: int, seed: int = 0) -> list[int]:
    """Return random token ids of text."""
    return np.random.default_rng(seed).integers(3, VOCAB, count).tolist()
