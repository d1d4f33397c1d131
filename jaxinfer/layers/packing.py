"""Weights in codes of 4 or 8 bits: which modules can have them, and their parameters (`kernels.packed_matmul`)."""

from collections.abc import Mapping
from math import gcd
from typing import Any

from flax import nnx

from jaxinfer.kernels.matmul import packed_matmul
from jaxinfer.kernels.matmul.packed_matmul import LEAST_GROUP, Packing
from jaxinfer.layers.embedding import Embedding
from jaxinfer.layers.linear import FusedLinear, MatmulModule, RowLinear
from jaxinfer.layers.moe import ExpertLinear

CODES_OF, SCALES, ZEROS = "codes", "scales", "zeros"
"""What a parameter of a packed weight holds (`packed` in its metadata)."""


def packable(module: nnx.Module) -> dict[str, MatmulModule]:
    """Return the modules whose weight can be packed, by the path of the weight.

    These are projections, those of experts too, and heads that are not tied to an embedding. Batched projections have
    products of their own.
    """
    found = ((".".join(map(str, (*path, "weight"))), part) for path, part in nnx.iter_modules(module))
    return {path: part for path, part in found if _is_packable(part)}


def _is_packable(part: nnx.Module) -> bool:
    return isinstance(part, FusedLinear | RowLinear | ExpertLinear) or isinstance(part, Embedding) and not part.lookup


def group_within(part: MatmulModule, group: int) -> int:
    """Return the largest group of columns that divides `group` and fits the module, or 0 if there is none.

    A shard of a weight whose columns are divided, and a unit of its input where units are reordered, has whole groups.
    """
    columns = part.weight.shape[-1]
    if isinstance(part, RowLinear):
        columns = columns // part.tp if part.inputs.stored is None else part.inputs.width
    elif isinstance(part, ExpertLinear):
        columns //= part.divided
    fitting = gcd(group, columns)
    return fitting if fitting % LEAST_GROUP == 0 else 0


def pack(module: nnx.Module, packings: Mapping[str, Packing]) -> nnx.Module:
    """Replace weights by their packed form, rounding their values, and return the module.

    Args:
        module: the model, with values or while it is traced.
        packings: how each weight is packed, by its path; its module is one of `packable`.
    """
    parts = packable(module) if packings else {}
    for path, packing in packings.items():
        part = parts[path]
        codes, scales, zeros = packed_matmul.quantise(part.weight[...], packing)
        metadata = {**part.weight.get_metadata(), "packing": packing}
        part.activations = packing.activations
        part.weight = nnx.Param(codes, packed=CODES_OF, **_divided(metadata, packing.codes))
        shared = {"scales_of": "weight", **_divided(metadata, packing.group)}
        part.weight_scale = nnx.data(nnx.Param(scales, packed=SCALES, **shared))
        if zeros is not None:
            part.weight_zero = nnx.Param(zeros, packed=ZEROS, **shared)
    return module


def packings_of(module: nnx.Module) -> dict[str, Packing]:
    """Return how each weight of a module is packed, by its path; weights that are not are left out."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    found = ((path, param.get_metadata()) for path, param in flat)
    return {".".join(map(str, path)): own["packing"] for path, own in found if own.get("packed") == CODES_OF}


def _divided(metadata: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return a weight's metadata for a parameter with one column for `count` of the weight's."""
    made = dict(metadata)
    if "inputs" in made:
        made["inputs"] = made["inputs"].divided(count)
    if made.get("unpadded"):
        *rows, columns = made["unpadded"]
        made["unpadded"] = (*rows, columns // count)
    return made
