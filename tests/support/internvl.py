"""Tiny InternVL: config.json, weights written without torch, image tiles."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from support import checkpoint
from support.tiny import CONFIG, prompt

PLACEHOLDER = 90
"""Image token id of the tiny vocabulary."""

VISION = dict(
    model_type="internvl_vision",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=8,
    image_size=[28, 28],
    patch_size=[7, 7],
    num_channels=3,
    norm_type="layer_norm",
    hidden_act="gelu",
    layer_norm_eps=1e-6,
    use_qk_norm=False,
    attention_bias=False,
)
"""Vision configuration of four by four patches, which become four feature rows."""


def config(
    vision: Mapping[str, Any] | None = None, text: Mapping[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """Return config.json as transformers writes it."""
    own = {name: value for name, value in CONFIG.items() if name != "dtype"}
    return (
        dict(
            architectures=["InternVLForConditionalGeneration"],
            model_type="internvl",
            dtype="float32",
            vision_config=VISION | dict(vision or {}),
            text_config=dict(own, model_type="qwen2") | dict(text or {}),
            image_token_id=PLACEHOLDER,
            image_seq_length=4,
            downsample_ratio=0.5,
            projector_hidden_act="gelu",
            tie_word_embeddings=False,
        )
        | changes
    )


def noise(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Return random values of a tensor, scaled for activations of order one; no bias, norm or scale is neutral."""
    values = generator.standard_normal(shape, np.float32)
    if name.endswith(("norm.weight", "layernorm_before.weight", "layernorm_after.weight", "lambda_1", "lambda_2")):
        return 1 + 0.4 * values
    if name.endswith("bias"):
        return 0.5 * values
    if "embed" in name and "projection" not in name:
        return values
    if name.endswith("lm_head.weight"):
        return 0.7 * values
    scale = 3.0 if name.endswith(("down_proj.weight", "fc2.weight")) else 1.5
    return scale * np.float32(np.prod(shape[1:]) ** -0.5) * values


def write(folder: Path, hf: Mapping[str, Any], seed: int = 0) -> Path:
    """Write a checkpoint of random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    made = {name: noise(name, value.shape, generator) for name, value in sorted(checkpoint.tensors(hf).items())}
    save_file(made, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf))
    return folder


def tiles(count: int, side: int = 28, seed: int = 0) -> np.ndarray:
    """Return random pixel values `[count, 3, side, side]`."""
    return np.random.default_rng(seed).standard_normal((count, 3, side, side), np.float32)


def words(count: int, seed: int = 0) -> list[int]:
    """Return random token ids of text, without the image token."""
    return [token if token != PLACEHOLDER else PLACEHOLDER + 1 for token in prompt(count, seed)]


def feature_index(ids: list[list[int]], length: int) -> np.ndarray:
    """Return the feature `index` of a step with these prompts in order: image tokens take the pool's rows in order."""
    flat = np.array([token for prompt in ids for token in prompt])
    places = flat == PLACEHOLDER
    index = np.full(length, -1, np.int32)
    index[: len(flat)] = np.where(places, np.cumsum(places) - 1, -1)
    return index
