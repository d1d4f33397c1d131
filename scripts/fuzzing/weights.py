"""Fuzz the index of a sharded checkpoint and the headers of its files."""

import json
import random
from collections.abc import Callable
from pathlib import Path

from fuzzing.mutations import broken, broken_bytes
from fuzzing.part import Part
from jaxinfer.checkpoint.safetensors import INDEX, SINGLE
from jaxinfer.loading import weights
from jaxinfer.sharding import make_mesh

CONFIG = dict(
    architectures=["LlamaForCausalLM"],
    vocab_size=12,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    dtype="float32",
    tie_word_embeddings=True,
)
SHAPES = {
    "model.embed_tokens.weight": [12, 8],
    "model.norm.weight": [8],
    "lm_head.weight": [12, 8],
    **{
        f"model.layers.0.{name}.weight": shape
        for name, shape in {
            "input_layernorm": [8],
            "post_attention_layernorm": [8],
            "self_attn.q_proj": [8, 8],
            "self_attn.k_proj": [4, 8],
            "self_attn.v_proj": [4, 8],
            "self_attn.o_proj": [8, 8],
            "mlp.gate_proj": [12, 8],
            "mlp.up_proj": [12, 8],
            "mlp.down_proj": [8, 12],
        }.items()
    },
}
"""Tensors of `CONFIG`, including the tied head."""
FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def header(names: list[str]) -> tuple[dict[str, dict], int]:
    """Return a safetensors header for these tensors, and the size of its data in bytes."""
    made, end = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        size = 4
        for axis in SHAPES[name]:
            size *= axis
        made[name] = {"dtype": "F32", "shape": SHAPES[name], "data_offsets": [end, end + size]}
        end += size
    return made, end


def write(path: Path, text: bytes, data: int) -> None:
    """Write a safetensors file with zeros as data."""
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))


def load(folder: Path) -> Callable[[], object]:
    """Return the call that loads the folder."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return lambda: weights.load(folder, make_mesh(1), progress=False)


def make_index(rng: random.Random, folder: Path) -> Callable[[], object]:
    """Corrupt the index of two shards, as JSON or bytewise."""
    names, half = list(SHAPES), len(SHAPES) // 2
    for file, own in zip(FILES, (names[:half], names[half:]), strict=True):
        made, data = header(own)
        write(folder / file, json.dumps(made).encode(), data)
    index = {
        "metadata": {"total_size": 1.0},
        "weight_map": {name: FILES[number >= half] for number, name in enumerate(names)},
    }
    if rng.random() < 0.3:
        (folder / INDEX).write_bytes(broken_bytes(rng, json.dumps(index).encode()))
    else:
        (folder / INDEX).write_text(json.dumps(broken(rng, index)))
    return load(folder)


def make_header(rng: random.Random, folder: Path) -> Callable[[], object]:
    """Corrupt the header of a file, as JSON or bytewise, or the header length."""
    made, data = header(list(SHAPES))
    how = rng.random()
    if how < 0.6:
        write(folder / SINGLE, json.dumps(broken(rng, made)).encode(), data)
    else:
        write(folder / SINGLE, json.dumps(made).encode(), data)
        whole = (folder / SINGLE).read_bytes()
        cut = 8 if how < 0.7 else len(whole) - data
        (folder / SINGLE).write_bytes(broken_bytes(rng, whole[:cut]) + whole[cut:])
    return load(folder)


PARTS = (Part("index", make_index), Part("header", make_header))
