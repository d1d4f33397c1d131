"""Fuse a checkpoint's tensors into a parameter, and take a parameter apart, as operations on whole arrays.

`rules.load` copies pieces of files on the host. Here the tensors are arrays already: of JAX, under jit, or of NumPy.
Both follow the same declarations: the weight table's rules, and the outputs and inputs of the parameter's metadata.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flax import nnx

from jaxinfer.kernels.matmul import int8_matmul, packed_matmul
from jaxinfer.kernels.matmul.packed_matmul import Packing
from jaxinfer.layers.linear import Output

Array = Any
"""A NumPy or JAX array, or a tracer."""


@dataclass(frozen=True)
class Layout:
    """Where the rows and columns of tensors lie in a parameter. Equal and hashable for layers of the same shape."""

    shape: tuple[int, ...]
    dtype: np.dtype
    outputs: tuple[Output, ...] = ()
    """Outputs of a fused weight `[tp, columns, ...]`; empty if the parameter holds one tensor."""
    inputs: Output | None = None
    """Projection output that produces the columns of the weight."""
    unpadded: tuple[int, ...] | None = None
    """Shape of the tensor, if it differs."""
    stacked: bool = False
    """Whether the first axis stacks several such weights."""
    block: int | None = None
    """For an int8 weight, which has scales: columns per block that are rotated (`int8_matmul.rotation`)."""
    packing: Packing | None = None
    """For a weight that is quantised to FP8, which has scales, too."""

    @classmethod
    def of(cls, param: nnx.Param) -> "Layout":
        """Read the layout of a parameter other than the scales of a quantised weight."""
        metadata = param.get_metadata()
        return cls(
            tuple(param.shape),
            np.dtype(param.dtype),
            tuple(metadata.get("outputs", ())),
            metadata.get("inputs"),
            metadata.get("unpadded"),
            bool(metadata.get("stacked", False)),
            metadata["block"] if param.dtype == np.int8 else None,
            metadata.get("packing"),
        )

    @property
    def quantised(self) -> bool:
        """Whether tensors are quantised, and the parameter has scales."""
        return self.block is not None or self.packing is not None

    @property
    def entry(self) -> "Layout":
        """The layout of one entry of a stack."""
        return replace(self, shape=self.shape[1:], stacked=False)

    @property
    def plain(self) -> bool:
        """Whether the parameter is a tensor as it is."""
        moved = self.inputs is not None and self.inputs.stored is not None
        return not self.outputs and not moved and self.unpadded in (None, self.shape)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the outputs; one empty name if the parameter holds one tensor."""
        return tuple(output.name for output in self.outputs) or ("",)


def fuse(
    layout: Layout,
    parts: Sequence[tuple[str, ...]],
    tensors: Sequence[Array],
    old: Sequence[Array] | None = None,
) -> tuple[Array, ...]:
    """Fuse tensors into a parameter's layout and dtype; padding is zero.

    Args:
        layout: layout of the parameter.
        parts: outputs whose rows each tensor stacks; empty for a tensor that is all of the parameter.
        tensors: the tensors; of a stacked parameter, each with the stack's axis first.
        old: the parameter before, and its scales if it is quantised, for outputs that no tensor has.

    Returns:
        The parameter; if it is quantised, also its scales.
    """
    lead = int(layout.stacked)
    if not layout.outputs:
        return _finish(layout, _placed(layout, tensors[0], lead))
    rows = {output.name: output.rows for output in layout.outputs}
    found: dict[str, Array] = {}
    for names, values in zip(parts, tensors, strict=True):
        ends = np.cumsum([rows[name] for name in names])
        for name, end in zip(names, ends.tolist(), strict=True):
            found[name] = values[(slice(None),) * lead + (slice(end - rows[name], end),)]
    tp, column, pieces = layout.shape[lead], 0, []
    for output in layout.outputs:
        width = output.columns(tp)
        if output.name in found:
            values = _take(found[output.name], _stored_rows(output, tp).ravel(), lead)
            values = values.reshape(*values.shape[:lead], tp, width, *values.shape[lead + 1 :])
            pieces.append(_finish(layout, values))
        else:
            own = (slice(None),) * (lead + 1) + (slice(column, column + width),)
            pieces.append(tuple(array[own] for array in old or ()))
        column += width
    xp = pieces[0][0].__array_namespace__()
    return tuple(xp.concatenate(arrays, axis=lead + 1) for arrays in zip(*pieces, strict=True))


def unfuse(layout: Layout, parts: Sequence[tuple[str, ...]], values: Array) -> list[Array]:
    """Return the tensors of an unquantised parameter, the inverse of `fuse`.

    Args:
        layout: layout of the parameter.
        parts: outputs whose rows each of the tensors stacks; empty for a tensor that is all of the parameter.
        values: the parameter.
    """
    lead = int(layout.stacked)
    if not layout.outputs:
        if layout.inputs is not None:
            values = _take(values, _places(_stored_rows(layout.inputs, 1)[0]), lead + 1)
        bounds = layout.unpadded or layout.shape[lead:]
        if tuple(values.shape[lead:]) != tuple(bounds):
            values = values[(slice(None),) * lead + tuple(map(slice, bounds))]
        return [values]
    tp, column, found = layout.shape[lead], 0, {}
    for output in layout.outputs:
        width = output.columns(tp)
        own = values[(slice(None),) * (lead + 1) + (slice(column, column + width),)]
        flat = own.reshape(*own.shape[:lead], tp * width, *own.shape[lead + 2 :])
        found[output.name] = _take(flat, _places(_stored_rows(output, tp).ravel()), lead)
        column += width
    xp = values.__array_namespace__()
    return [
        found[names[0]] if len(names) == 1 else xp.concatenate([found[name] for name in names], axis=lead)
        for names in parts
    ]


def _placed(layout: Layout, values: Array, lead: int) -> Array:
    """Place the rows and columns of the one tensor that a parameter holds."""
    if layout.inputs is not None:
        values = _take(values, _stored_rows(layout.inputs, 1)[0], lead + 1)
    padding = [(0, size - found) for size, found in zip(layout.shape, values.shape, strict=True)]
    return values.__array_namespace__().pad(values, padding) if any(more for _, more in padding) else values


def _finish(layout: Layout, values: Array) -> tuple[Array, ...]:
    """Convert placed values to the parameter's dtype, or to codes and scales."""
    if layout.packing is not None:
        return packed_matmul.quantise(values, layout.packing)[:2]
    if layout.block is None:
        return (values.astype(layout.dtype),)
    return int8_matmul.quantise_weight(values, layout.block)


def _stored_rows(output: Output, tp: int) -> np.ndarray:
    """Return the tensor's row in each column of each shard, `[tp, columns]`; -1 for padding."""
    rows = np.full((tp, output.columns(tp)), -1)
    for shard, own in enumerate(rows):
        for piece in output.pieces(shard, tp):
            own[piece.column : piece.column + piece.stop - piece.start] = np.arange(piece.start, piece.stop)
    return rows


def _places(stored: np.ndarray) -> np.ndarray:
    """Return the first place of each row in `stored`, the inverse of a `_stored_rows`."""
    rows, first = np.unique(stored, return_index=True)
    return first[rows >= 0]


def _take(values: Array, order: np.ndarray, axis: int) -> Array:
    """Take entries along an axis; zeros for those at -1."""
    if np.array_equal(order, np.arange(values.shape[axis])):
        return values
    xp = values.__array_namespace__()
    taken = xp.take(values, np.maximum(order, 0), axis=axis, mode="clip")
    if (order >= 0).all():
        return taken
    real = (order >= 0).reshape(-1, *[1] * (values.ndim - axis - 1))
    return xp.where(real, taken, xp.zeros_like(taken))


def named(params: Mapping[str, nnx.Param], table: Sequence[Any]) -> dict[str, tuple[Layout, list[Any]]]:
    """Return the layout of each parameter of a weight table with the rules of its tensors, by path.

    Each tensor has the first of its names, experts are stacked, and tied tensors are left out: as in the state of
    transformers' model.
    """
    found: dict[str, tuple[Layout, list[Any]]] = {}
    for rule in table:
        if rule.target is not None and not rule.tied:
            layout = found[rule.target] if rule.target in found else (Layout.of(params[rule.target]), [])
            layout[1].append(rule)
            found[rule.target] = layout
    return found
