"""Quantise the projections of a checkpoint to FP8, in the layouts of DeepSeek, compressed-tensors and ModelOpt."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

BLOCK = (16, 32)
"""Rows and columns of a block; published checkpoints have 128 of both."""
CHANNEL = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
STATED = {
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": CHANNEL}},
        "ignore": ["lm_head"],
    },
    "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["lm_head"]},
}
"""`quantization_config` of each format: scales of blocks, of rows, and of whole tensors."""


def layout(form: str, weight: np.ndarray) -> dict[str, np.ndarray]:
    """Return the tensors of a module in a format by their last names."""
    rows, columns = weight.shape
    down, across = {"fp8": BLOCK, "compressed-tensors": (1, columns), "modelopt": (rows, columns)}[form]
    padded = np.zeros((-(-rows // down) * down, -(-columns // across) * across), np.float32)
    padded[:rows, :columns] = weight
    blocks = np.abs(padded).reshape(len(padded) // down, down, padded.shape[1] // across, across)
    scales = (blocks.max((1, 3)) / 448).astype(np.float32)
    if form == "compressed-tensors":
        scales = scales.astype(ml_dtypes.bfloat16)
    each = np.kron(scales.astype(np.float32), np.ones((down, across), np.float32))[:rows, :columns]
    codes = np.clip(weight / each, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    if form == "fp8":
        return {"weight": codes, "weight_scale_inv": scales, "activation_scale": np.ones((), np.float32)}
    if form == "modelopt":
        return {"weight": codes, "weight_scale": scales.reshape(()), "input_scale": np.ones((), np.float32)}
    return {"weight": codes, "weight_scale": scales}


def quantise(folder: Path, out: Path, form: str) -> Path:
    """Write a checkpoint with its projections in FP8."""
    shutil.copytree(folder, out, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        parts = layout(form, tensors.pop(name))
        tensors |= {f"{name.removesuffix('.weight')}.{part}": value for part, value in parts.items()}
    save_file(tensors, out / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": STATED[form]}))
    return out
