"""Checkpoints of experts as tools store them: one tensor an expert, and in MXFP4."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

STACKED = re.compile(r"(.*\.experts)\.(gate_up|down)_proj")
EACH = {"qwen3_moe": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}
"""Names of an expert's gate, up and down projection, by family."""


def one_by_one(family: str, source: Path, folder: Path) -> Path:
    """Rewrite a checkpoint with one tensor per expert and projection."""
    names, found = EACH[family], {}
    for name, value in load_file(source / "model.safetensors").items():
        match = STACKED.fullmatch(name)
        if match is None:
            found[name] = value
            continue
        for expert, one in enumerate(value):
            parts = np.split(one, 2) if match[2] == "gate_up" else [one]
            for part, own in zip(parts, names[:2] if match[2] == "gate_up" else names[2:], strict=True):
                found[f"{match[1]}.{expert}.{own}.weight"] = np.ascontiguousarray(part)
    folder.mkdir()
    save_file(found, folder / "model.safetensors")
    (folder / "config.json").write_text((source / "config.json").read_text())
    return folder


def in_mxfp4(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return tensors of gpt-oss with random experts in MXFP4, as published, in place of those `[E, in, out]`."""
    found, rng = dict(tensors), np.random.default_rng(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, out = found.pop(name).shape
        found[f"{name}_blocks"] = rng.integers(0, 256, (experts, out, inner // 32, 16)).astype(np.uint8)
        found[f"{name}_scales"] = rng.integers(122, 125, (experts, out, inner // 32)).astype(np.uint8)
    return found


def mxfp4(folder: Path, out: Path) -> Path:
    """Write a checkpoint of gpt-oss with its experts in MXFP4 (`in_mxfp4`)."""
    shutil.copytree(folder, out, dirs_exist_ok=True)
    save_file(in_mxfp4(load_file(folder / "model.safetensors")), out / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (out / "config.json").write_text(json.dumps(config))
    return out
