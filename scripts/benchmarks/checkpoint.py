"""Write random Llama and BART checkpoints with Hugging Face tensor names, without torch."""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

SCALE = 0.02
"""Standard deviation of the weights, as in transformers' initialisation."""
SIDECAR = "bench.json"
"""Sidecar file, written last, that records the configuration the folder was made from."""


def kept(config: dict[str, Any], seed: int, folder: Path | None) -> Path:
    """Return the folder of the checkpoint, created if it does not exist; by default a temporary folder for each
    configuration.
    """
    name = hashlib.sha256(json.dumps([config, seed]).encode()).hexdigest()[:12]
    folder = folder or Path(tempfile.gettempdir()) / f"jaxinfer-bench-{name}"
    write(folder, config, seed)
    return folder


def write(folder: Path, config: dict[str, Any], seed: int) -> None:
    """Create the checkpoint in `folder` unless it already exists.

    Raises:
        ValueError: the folder holds other files.
    """
    made_from = {"config": config, "seed": seed}
    sidecar = folder / SIDECAR
    if sidecar.exists() and json.loads(sidecar.read_text()) == made_from:
        return
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--checkpoint-dir {folder} holds something else than this checkpoint; name an empty one")
    folder.mkdir(parents=True, exist_ok=True)
    kind = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float16": np.float16}[config["dtype"]]
    names, sizes = zip(*shapes(config), strict=True)
    with ThreadPoolExecutor() as pool:  # NumPy releases the GIL while it draws; each tensor has its own random stream
        streams = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(len(names)))
        made = pool.map(lambda *tensor: _values(*tensor).astype(kind), streams, names, sizes)
        tensors = dict(zip(names, made, strict=True))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    sidecar.write_text(json.dumps(made_from))


def _values(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draw a tensor: norm scales are ones, biases zeros, matrices normally distributed."""
    if name.endswith("bias"):
        return np.zeros(shape, np.float32)
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    return SCALE * rng.standard_normal(shape, np.float32)


def shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of every tensor."""
    return _bart(config) if config.get("model_type") == "bart" else _llama(config)


def _llama(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    model, ffn = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    yield "model.embed_tokens.weight", (config["vocab_size"], model)
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", (config["vocab_size"], model)
    yield "model.norm.weight", (model,)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{at}.self_attn.{name}_proj.weight", (rows, model)
        yield f"{at}.self_attn.o_proj.weight", (model, queries)
        for name in ("gate", "up"):
            yield f"{at}.mlp.{name}_proj.weight", (ffn, model)
        yield f"{at}.mlp.down_proj.weight", (model, ffn)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}.{name}.weight", (model,)


def _bart(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    model = config["d_model"]
    yield "model.shared.weight", (config["vocab_size"], model)
    yield "final_logits_bias", (1, config["vocab_size"])

    def affine(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape[:1]

    for half in ("encoder", "decoder"):
        yield f"model.{half}.embed_positions.weight", (config["max_position_embeddings"] + 2, model)
        yield from affine(f"model.{half}.layernorm_embedding", model)
        attentions = ("self_attn",) if half == "encoder" else ("self_attn", "encoder_attn")
        for layer in range(config[f"{half}_layers"]):
            at, ffn = f"model.{half}.layers.{layer}", config[f"{half}_ffn_dim"]
            for attention in attentions:
                for name in ("q", "k", "v", "out"):
                    yield from affine(f"{at}.{attention}.{name}_proj", model, model)
                yield from affine(f"{at}.{attention}_layer_norm", model)
            yield from affine(f"{at}.fc1", ffn, model)
            yield from affine(f"{at}.fc2", model, ffn)
            yield from affine(f"{at}.final_layer_norm", model)


def parameters(config: dict[str, Any]) -> int:
    """Return the number of parameters."""
    return sum(int(np.prod(shape)) for _, shape in shapes(config))


def laid_over(folder: Path, overrides: dict[str, Any], into: Path) -> Path:
    """Create a folder with links to a checkpoint's files and an overridden config.json; return it.

    For benchmarks, so that every system that reads the folder sees the overrides.
    """
    from jaxinfer.checkpoint.hf import read_config

    for path in folder.iterdir():
        (into / path.name).symlink_to(path.resolve())
    (into / "config.json").unlink()
    config = {name: value for name, value in read_config(folder, overrides).items() if value is not None}
    (into / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return into
