"""Weights that stay in 4 bits or FP8: which ones a model can keep, and the tensors that fill them."""

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import gcd
from typing import Any

import numpy as np
from flax import nnx

from jaxinfer._utils.checks import KEPT_QUANTIZATIONS
from jaxinfer.checkpoint.packed.declared import Declared
from jaxinfer.checkpoint.packed.matrix import MXFP4
from jaxinfer.checkpoint.source import Info
from jaxinfer.kernels.matmul.packed_matmul import Packing
from jaxinfer.layers.embedding import Embedding
from jaxinfer.layers.moe import ExpertLinear
from jaxinfer.layers.packing import CODES_OF, group_within, packable

_OTHER = re.compile(r"vision|visual|audio|projector")
"""Modules beside the language model, which tools leave as they are."""


class PackedSource:
    """Source of one part of packed weights: codes, those of 4 bits two a byte, or scales or zero points by group.

    Args:
        source: source whose method `packed` gives the matrices.
        part: "codes", "scales" or "zeros".
        packing: how the parameter is packed; its groups divide those of the file.
    """

    def __init__(self, source: Any, part: str, packing: Packing) -> None:
        self._source, self._part = source, part
        self._columns = packing.codes if part == CODES_OF else packing.group

    def names(self) -> list[str]:
        return self._source.names()

    def info(self, name: str) -> Info:
        return self._source.info(name)

    def release(self) -> None:
        self._source.release()

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> np.ndarray:
        """Read the part's rows and columns, by slices for both; of a stack, by one for its entries before these."""
        matrix = self._source.packed(name)
        shape = *matrix.shape[:-1], matrix.shape[-1] // self._columns
        *rows, columns = (slice(*one.indices(size)[:2]) for one, size in zip(slices or map(slice, shape), shape))
        first, end = columns.start * self._columns, columns.stop * self._columns
        if self._part == CODES_OF:
            return matrix.octets(*rows, slice(first, end))
        return matrix.by_group(self._part, *rows, np.arange(first, end, self._columns))


def packings(
    module: nnx.Module, tensors: Mapping[str, Sequence[str]], packing: Callable[[str], Packing | None]
) -> dict[str, Packing]:
    """Return how each weight of a model can be kept in 4 bits or FP8, by its path.

    A fused weight is kept if all of its tensors can be. Groups become smaller where shards or fused tensors need it.

    Args:
        module: the model with shapes in place of arrays, its weights not packed.
        tensors: names of the tensors that fill each parameter, by its path.
        packing: returns how a tensor is packed, None if it is not.
    """
    found = {}
    for path, part in packable(module).items():
        own = [packing(name) for name in tensors.get(path, ())]
        kinds = {one.fp8 for one in own if one is not None}
        # Products of experts take no FP8.
        if not own or None in own or len(kinds) > 1 or kinds == {True} and isinstance(part, ExpertLinear):
            continue
        group = group_within(part, gcd(*(one.group for one in own)))
        if group:
            dtypes = {one.scale_dtype for one in own}
            symmetric = all(one.symmetric for one in own)
            dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
            found[path] = replace(own[0], group=group, symmetric=symmetric, scale_dtype=dtype)
    return found


def in_fp8(module: nnx.Module) -> dict[str, Packing]:
    """Return how projections are quantised to FP8 with a scale a row, by the paths of their weights.

    Heads are left as they are, and projections beside the language model: tools for FP8 do so, too. Products of experts
    take no FP8.
    """
    found = {}
    for path, part in packable(module).items():
        left = isinstance(part, Embedding | ExpertLinear) or _OTHER.search(path)
        group = 0 if left else group_within(part, part.weight.shape[-1])
        if group:
            found[path] = Packing(group, True, "float32", fp8=True, activations=True)
    return found


def stated(declared: Declared, scale_dtype: str) -> Callable[[str], Packing | None]:
    """Return how tensors are packed as far as config.json says, for plans without weights.

    Args:
        declared: what the checkpoint declares.
        scale_dtype: dtype of its scales.
    """
    if declared.method == "mxfp4":
        return lambda name: MXFP4 if ".experts." in name else None
    made = _stated(declared, scale_dtype)
    if made is None:
        return lambda name: None
    settings = declared.settings
    lists = ("ignore", "modules_to_not_convert", "exclude_modules", "ignored_layers")
    ignored = [str(one) for name in lists for one in settings.get(name) or ()]
    heads = bool(settings.get("lm_head", False)) or declared.method in ("compressed-tensors", "modelopt")

    def packing(name: str) -> Packing | None:
        module = name.removesuffix(".weight")
        unnamed = _OTHER.search(module) or not heads and module.split(".")[-1] == "lm_head"
        if unnamed or any(_names(one, module) for one in ignored):
            return None
        return made

    return packing


def _stated(declared: Declared, scale_dtype: str) -> Packing | None:
    """Return how all quantised tensors are packed; a group of 0 columns is a whole row."""
    if declared.fp8:
        # Others write float32 or a half of it, which config.json does not say: an upper bound.
        scale_dtype = scale_dtype if declared.method == "compressed-tensors" else "float32"
        size = declared.block[1] if declared.block else max(0, *declared.group_sizes, -1)
        return Packing(size, True, scale_dtype, fp8=True)
    if declared.method not in KEPT_QUANTIZATIONS or declared.bits != (4,) or len(declared.group_sizes) > 1:
        return None
    symmetric, ordered = _options(declared)
    size = declared.group_sizes[0] if declared.group_sizes else -1
    return Packing(max(0, size), symmetric, scale_dtype) if ordered else None


def _options(declared: Declared) -> tuple[bool, bool]:
    """Return whether zero points are all in the middle, and whether groups are in the order of the columns."""
    settings = declared.settings
    if declared.method == "gptq":
        # With one group a row the order of the columns makes no difference.
        return bool(settings.get("sym", True)), not settings.get("desc_act", False) or settings.get("group_size") == -1
    if declared.method == "awq":
        return not settings.get("zero_point", True), True
    weights = [one.get("weights") or {} for one in (settings.get("config_groups") or {}).values()]
    packed = settings.get("format") == "pack-quantized"
    ordered = all(one.get("actorder") in (None, False, "weight", "static") for one in weights)
    return all(one.get("symmetric", True) for one in weights), packed and ordered


def _names(pattern: str, module: str) -> bool:
    """Return whether an entry of a list of modules that are not quantised names a module."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    if "*" in pattern:  # ModelOpt
        return fnmatch.fnmatchcase(module, pattern)
    return pattern == module or module.endswith(f".{pattern}") or f"{pattern}." in module
