"""A random Llama checkpoint with Hugging Face's names, written without torch."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

SCALE = 0.02
"""Standard deviation of the weights, as transformers initialises them."""
SIDECAR = "bench.json"
"""Written last: says what the folder was made from."""


def write(folder: Path, config: dict[str, Any], seed: int) -> None:
    """Makes the checkpoint in `folder` unless it is there already.

    Raises:
        ValueError: the folder holds something else.
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
    with ThreadPoolExecutor() as pool:  # NumPy draws outside of Python's lock; each tensor has a stream of its own
        streams = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(len(names)))
        made = pool.map(lambda stream, shape: _values(stream, shape).astype(kind), streams, sizes)
        tensors = dict(zip(names, made, strict=True))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    sidecar.write_text(json.dumps(made_from))


def _values(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Norm scales are ones, matrices are normal."""
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    return SCALE * rng.standard_normal(shape, np.float32)


def shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a Llama."""
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


def parameters(config: dict[str, Any]) -> int:
    """How many there are."""
    return sum(int(np.prod(shape)) for _, shape in shapes(config))
