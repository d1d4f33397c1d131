"""What the setting `quantization` does to a checkpoint whose weights are quantised."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from jaxinfer._utils.checks import DEQUANTIZE, FP8, INT8, KEPT_QUANTIZATIONS
from jaxinfer.checkpoint.packed import kept
from jaxinfer.checkpoint.packed.declared import declared
from jaxinfer.errors import ConfigError
from jaxinfer.kernels.matmul.packed_matmul import Packing
from jaxinfer.layers.packing import packable
from jaxinfer.sharding import axes

log = logging.getLogger(__name__)


def applied(quantization: str | None, hf: Mapping[str, Any], directory: Path | None = None) -> str | None:
    """Return the quantisation that is applied while weights are loaded: "int8", or None.

    Args:
        quantization: as in `EngineConfig`.
        hf: contents of config.json.
        directory: checkpoint folder, if there is one.

    Raises:
        ConfigError: the setting names a format that is not the checkpoint's.
    """
    if quantization in KEPT_QUANTIZATIONS:
        found = declared(hf, directory)
        if found is None or found.method != quantization:
            has = "has no quantised weights" if found is None else f"is quantised with {found.method!r} ({found.where})"
            raise ConfigError(
                f"quantization is {quantization!r}, but the checkpoint {has}; leave quantization out to use it as it is"
            )
    return quantization if quantization == INT8 else None


def packings(
    module: nnx.Module,
    mesh: Mesh | AbstractMesh,
    quantization: str | None,
    hf: Mapping[str, Any],
    directory: Path | None,
    tensors: Mapping[str, Sequence[str]],
    source: Any = None,
    stated: str = "",
) -> dict[str, Packing]:
    """Return which weights of a model are kept in 4 bits or FP8, or quantised to FP8, by path.

    Args:
        module: the model with shapes in place of arrays, its weights not packed.
        mesh: mesh that the weights are placed on.
        quantization: as in `EngineConfig`.
        hf: contents of config.json.
        directory: checkpoint folder, if there is one.
        tensors: tensors of each parameter (`rules.sources`).
        source: the tensors; without it the answer is what config.json says.
        stated: dtype that config.json states; empty if it states none.
    """
    format, divided = declared(hf, directory), mesh.shape.get(axes.FSDP, 1) > 1
    if quantization == FP8:
        if divided:
            raise ConfigError(
                f"quantization is {FP8!r}, whose weights cannot be divided over the axis {axes.FSDP!r} of the mesh; "
                f"use {INT8!r}, or None"
            )
        found = kept.in_fp8(module)
        log.info("%d of %d projections are quantised to FP8", len(found), len(packable(module)))
        return found
    if format is None or quantization in (INT8, DEQUANTIZE):
        return {}
    if divided:
        log.info("weights are dequantised, as packed ones cannot be divided over %r", axes.FSDP)
        return {}
    if source is None:
        packing = kept.stated(format, stated if stated in ("float16", "bfloat16") else "float32")
    else:
        packing = partial(_of_tensor, source)
    found = kept.packings(module, tensors, packing)
    if source is not None:
        log.info(
            "%s: %d of %d projections are kept as they are quantised; other quantised weights (%s) are dequantised. "
            "quantization='dequantize' dequantises all.",
            directory,
            len(found),
            len(packable(module)),
            format.method,
        )
    return found


def _of_tensor(source: Any, name: str) -> Packing | None:
    find = getattr(source, "packed", None)
    matrix = find and find(name)
    return matrix and matrix.packing
