"""Read the tensors of a GGUF file under the names and in the layout of the safetensors checkpoint of the same model.

llama.cpp's converter renames tensors, reorders the rows of queries and keys of the Llama lineage to interleaved rotary
pairs, adds one to Gemma's norms, and stacks experts. All of this is undone here, in float32, for the requested rows.
"""

import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxinfer.checkpoint import gguf_config
from jaxinfer.checkpoint.gguf_file import GgufFile, GgufTensor, library
from jaxinfer.errors import CheckpointError

ROW_CHUNK = 1 << 18
"""Number of values that are dequantised at a time: few enough for temporaries, which take several times the memory of
the result, to stay in a processor's cache."""

INTERLEAVED = ("llama", "granite")
"""Architectures whose rows of queries and keys are reordered to interleaved rotary pairs."""
SHIFTED_NORMS = ("gemma2", "gemma3")
"""Architectures whose norms are stored plus one."""

_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output.weight": "lm_head.weight",
    "output_norm.weight": "model.norm.weight",
}
_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_STACKS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_OF_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


class Presented(NamedTuple):
    """A tensor in the layout of the safetensors checkpoint."""

    shape: tuple[int, ...]
    dtype: str
    """Safetensors dtype name: the values are dequantised."""
    tensor: GgufTensor
    first: int = 0
    """First row of the GGUF tensor; above 0 for experts of a stack."""
    heads: int = 0
    """Number of heads whose rows are reordered; 0 if none are."""
    shift: float = 0.0
    """Value to subtract."""


class GgufReader:
    """Source of the tensors of a GGUF file, dequantised to float32 for the requested rows.

    Raises:
        CheckpointError, ConfigError: as `GgufFile` and `gguf_config.architecture`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: GgufFile | None = GgufFile(path)
        self._tensors = dict(_presented(self._file))

    def names(self) -> list[str]:
        """Return the tensor names in the order of the file."""
        return list(self._tensors)

    def info(self, name: str) -> Presented:
        """Return a tensor's dtype and shape.

        Raises:
            CheckpointError: there is no tensor of this name.
        """
        if name not in self._tensors:
            raise CheckpointError(f"{self.path} has no tensor {name!r}.")
        return self._tensors[name]

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> np.ndarray:
        """Read a tensor as float32, or the part selected by slices of step 1, one per leading axis.

        Raises:
            CheckpointError: the type of the tensor cannot be dequantised, or the reader is closed.
        """
        info = self.info(name)
        rows, *columns = slices or (slice(None),)
        if len(info.shape) == 1:
            return self._rows(name, info, np.array([0]))[0][rows] - np.float32(info.shift)
        chosen = np.arange(*rows.indices(info.shape[0]))
        if info.heads:  # row 2 i + j of a head is row i + j D/2 here
            half = info.shape[0] // info.heads // 2
            head, within = np.divmod(chosen, 2 * half)
            chosen = head * 2 * half + 2 * (within % half) + within // half
        return self._rows(name, info, info.first + chosen)[(slice(None), *columns)]

    def _rows(self, name: str, info: Presented, rows: np.ndarray) -> np.ndarray:
        """Dequantise rows of a GGUF tensor."""
        if self._file is None:
            raise CheckpointError(f"{name!r} was requested after the reader of {self.path} was closed.")
        gguf, tensor = library(), info.tensor
        raw = np.frombuffer(self._file.bytes, np.uint8, tensor.rows * tensor.row_bytes, tensor.offset)
        raw = raw.reshape(tensor.rows, tensor.row_bytes)
        made = np.empty((len(rows), tensor.shape[-1]), np.float32)
        step = max(1, ROW_CHUNK // tensor.shape[-1])
        for start in range(0, len(rows), step):
            part = raw[rows[start : start + step]]
            try:  # as one row: the package takes 16 rows at a time, and blocks do not depend on each other
                values = gguf.dequantize(part.reshape(1, -1), gguf.GGMLQuantizationType[tensor.kind])
            except NotImplementedError as error:
                raise CheckpointError(
                    f"{self.path}: tensor {name!r} has type {tensor.kind}, which the package gguf does not dequantise. "
                    "Use another file of this model."
                ) from error
            made[start : start + step] = values.reshape(len(part), -1)
        return made

    def release(self) -> None:
        """Release the memory of file pages read so far."""
        if self._file is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._file.bytes.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Close the reader."""
        self.release()
        self._file = None

    def __enter__(self) -> "GgufReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _presented(file: GgufFile) -> Any:
    """Yield the tensors of a file by the names of the safetensors checkpoint; unknown names stay as they are."""
    found = gguf_config.architecture(file)
    heads = _heads(file, found)
    for name, tensor in file.tensors.items():
        if name == gguf_config.ROPE_FREQS:  # read as a part of the configuration
            continue
        match = _OF_LAYER.fullmatch(name)
        if match is None:
            yield _WHOLE.get(name, name), _one(name, tensor, found, 0)
            continue
        layer, part, kind = match.groups()
        if part in _STACKS and len(tensor.shape) == 3:
            experts, height, width = tensor.shape
            for number in range(experts):
                yield (
                    f"model.layers.{layer}.mlp.experts.{number}.{_STACKS[part]}.{kind}",
                    Presented((height, width), "F32", tensor, number * height),
                )
            continue
        known = {**_PARTS, **_GEMMA}.get(part) if found in SHIFTED_NORMS else _PARTS.get(part)
        made = _one(name, tensor, found, heads.get(part, 0))
        yield f"model.layers.{layer}.{known}.{kind}" if known else name, made


def _one(name: str, tensor: GgufTensor, found: str, heads: int) -> Presented:
    """Return a tensor that is presented whole; `heads`: number of heads that are reordered."""
    shift = 1.0 if found in SHIFTED_NORMS and name.endswith("norm.weight") else 0.0
    if len(tensor.shape) == 1 and heads:
        raise CheckpointError(f"tensor {name!r}: biases of queries and keys are not read for the architecture {found}.")
    if heads and tensor.shape[0] % (2 * heads):
        raise CheckpointError(
            f"tensor {name!r} of shape {list(tensor.shape)} contradicts {found}.attention.head_count of {heads}."
        )
    return Presented(tensor.shape, "F32", tensor, heads=heads, shift=shift)


def _heads(file: GgufFile, found: str) -> Mapping[str, int]:
    """Return the numbers of heads of the tensors whose rows are reordered."""
    if found not in INTERLEAVED:
        return {}
    config = gguf_config.config(file)
    return {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
