"""Quantise the projections of a checkpoint to 4 bits, in the layouts of GPTQ, AWQ and compressed-tensors."""

import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from jaxinfer.kernels.matmul.packed_matmul import Packed

PROJECTION = re.compile(r"(_proj|\.w[123])\.weight$")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Value that AWQ puts at each position of a word."""
FLOATS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""Value of each code of MXFP4."""


def words(codes: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    """Pack rows of integers of 4 bits into int32 words, the value `order[i]` of eight at position i."""
    rows, columns = codes.shape
    padded = np.zeros((rows, -(-columns // 8) * 8), np.uint32)
    padded[:, :columns] = codes
    each = padded.reshape(rows, -1, 8)[..., list(order)] << (4 * np.arange(8, dtype=np.uint32))
    return np.bitwise_or.reduce(each, axis=-1).astype(np.uint32).view(np.int32)


def nearest(weight: np.ndarray, group: int, symmetric: bool, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes `[rows, columns]`, zero points and scales `[rows, groups]` nearest to a weight."""
    groups = weight.astype(np.float32).reshape(len(weight), -1, group)
    if symmetric:
        scales = np.abs(groups).max(-1) / 7.5
    else:
        scales = (np.maximum(groups.max(-1), 0) - np.minimum(groups.min(-1), 0)) / 15
    scales = np.maximum(scales, 1e-5).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    used = scales.astype(np.float32)[..., None]
    zeros = np.full(scales.shape, 8) if symmetric else np.clip(np.rint(-groups.min(-1) / used[..., 0]), 0, 15)
    codes = np.clip(np.rint(groups / used) + zeros[..., None], 0, 15).astype(np.uint8)
    return codes.reshape(weight.shape), zeros.astype(np.uint8), scales


def layout(form: str, codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> dict[str, np.ndarray]:
    """Return the tensors of a module in a format ("gptq", "awq" or "compressed-tensors") by their last names."""
    group = codes.shape[1] // scales.shape[1]
    if form == "awq":
        packed = {"qweight": words(codes.T, AWQ_ORDER), "qzeros": words(zeros.T, AWQ_ORDER), "scales": scales.T.copy()}
    elif form == "gptq":
        packed = {"qweight": words(codes).T.copy(), "qzeros": words(zeros.T - 1 & 15), "scales": scales.T.copy()}
        packed["g_idx"] = (np.arange(codes.shape[1]) // group).astype(np.int32)
    else:
        packed = {"weight_packed": words(codes), "weight_scale": scales, "weight_shape": np.array(codes.shape)}
        if (zeros != 8).any():
            packed["weight_zero_point"] = words(zeros.T).T.copy()
    return packed


def stated(form: str, group: int, symmetric: bool) -> dict:
    """Return the `quantization_config` of a format."""
    if form == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": not symmetric, "version": "gemm"}
    if form == "gptq":
        return {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False, "sym": symmetric}
    weights = {"num_bits": 4, "group_size": group, "symmetric": symmetric, "type": "int", "strategy": "group"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


def quantise(
    folder: Path,
    out: Path,
    form: str,
    *,
    group: int,
    symmetric: bool = False,
    dtype: str = "float16",
    skip: str = "nothing",
) -> Path:
    """Write a checkpoint with its projections in 4 bits, but for those whose name contains `skip`."""
    shutil.copytree(folder, out, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if PROJECTION.search(name) and skip not in name]:
        module = name.removesuffix(".weight")
        parts = layout(form, *nearest(tensors.pop(name), group, symmetric, dtype))
        tensors |= {f"{module}.{part}": np.ascontiguousarray(value) for part, value in parts.items()}
    save_file(tensors, out / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": stated(form, group, symmetric)}))
    return out


def dequantised(packed: Packed) -> np.ndarray:
    """Return the weight `[..., K]` in float32, computed on the host."""
    codes, scales, zeros = (None if one is None else np.asarray(one) for one in packed)
    whole = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
    if scales.dtype == np.uint8:  # MXFP4
        values, scales = (
            FLOATS[whole],
            np.where(scales < 255, np.exp2(np.minimum(scales, 254) - np.float32(127)), np.nan),
        )
    else:
        offsets = 8 if zeros is None else np.repeat(zeros.astype(np.float32), packed.group, axis=-1)
        values = whole.astype(np.float32) - offsets
    return values * np.repeat(scales.astype(np.float32), packed.group, axis=-1)


def random(shape: tuple[int, ...], group: int, form: str) -> Packed:
    """Make a weight of random codes; `form` is the dtype of its scales, with " zeros" for every zero point.

    Those of the first format of GPTQ are from 0 to 16.
    """
    dtype, _, zeros = form.partition(" ")
    rng, grid = np.random.default_rng(shape[-2]), (*shape[:-1], shape[-1] // group)
    codes = rng.integers(0, 256, (*shape[:-1], shape[-1] // 2)).astype(np.uint8)
    if dtype == "uint8":
        return Packed(codes, rng.integers(119, 125, grid).astype(np.uint8))
    scales = (rng.random(grid) * 0.1 + 0.01).astype(jnp.dtype(dtype))
    return Packed(codes, scales, (np.arange(np.prod(grid)).reshape(grid) % 17).astype(np.uint8) if zeros else None)
