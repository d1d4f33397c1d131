"""Present stacked experts in the layout of `models.moe_rules`, `[E, out, in]`, if a checkpoint stores `[E, in, out]`.

Llama 4's checkpoints always store them so: `gate_up_proj` is `[E, M, 2F]`, the gate's columns first, and `down_proj`
`[E, F, M]`. Qwen3-VL's published checkpoints do, too, but transformers 5 writes `[E, out, in]` and reads both. There
the two tensors of a layer tell which it is: with F columns an expert, gate and up have 2F and down has F. A weight
update reads tensors one by one, so it is refused.
"""

import re
from typing import Any, NamedTuple

from jaxinfer.checkpoint.packed.matrix import Kept
from jaxinfer.checkpoint.source import Info, Source
from jaxinfer.errors import CheckpointError

_EXPERTS = re.compile(r"(.*\.experts\.)(gate_up_proj|down_proj)")


class Turned(NamedTuple):
    """Shape and dtype of a tensor whose last two axes are swapped."""

    shape: tuple[int, ...]
    dtype: str


class TransposedExperts:
    """Source of tensors whose stacked experts are `[E, out, in]`, however the checkpoint stores them.

    Only the requested slices are read.
    """

    def __init__(self, source: Source, *, always: bool = False):
        """Find the tensors to transpose.

        Args:
            source: tensors of a checkpoint.
            always: whether stacks of experts are known to be `[E, in, out]`; otherwise their shapes tell.

        Raises:
            CheckpointError: one of a layer's two tensors is missing, or their shapes do not fit; not with `always`.
        """
        self._source = source
        stacks = {name: found[1] for name in source.names() if (found := _EXPERTS.fullmatch(name))}
        if always:
            self._turned = {name for name in stacks if len(source.info(name).shape) == 3}
        else:
            self._turned = {name for name, prefix in stacks.items() if self._is_turned(prefix)}

    def _is_turned(self, prefix: str) -> bool:
        """Return whether a layer's experts are stored as `[E, in, out]`."""
        shapes = {}
        for part in ("gate_up_proj", "down_proj"):
            if prefix + part not in self._source.names():
                raise CheckpointError(
                    f"{prefix}{part} is not there beside its counterpart: only gate_up_proj and down_proj together "
                    "show which way experts are stored. Weights of these experts cannot be updated by name, as an "
                    "update reads tensors one by one; load a checkpoint that has both"
                )
            shapes[part] = tuple(self._source.info(prefix + part).shape)
        (_, *gate_up), (_, *down) = shapes.values()
        if len(gate_up) == len(down) == 2:
            if (gate_up[0], gate_up[1]) == (2 * down[1], down[0]):
                return False
            if (gate_up[1], gate_up[0]) == (2 * down[0], down[1]):
                return True
        raise CheckpointError(
            f"{prefix}gate_up_proj of shape {list(shapes['gate_up_proj'])} and {prefix}down_proj of shape "
            f"{list(shapes['down_proj'])} do not fit: expected [E, M, 2F] and [E, F, M], or [E, 2F, M] and [E, M, F]"
        )

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return self._source.names()

    def release(self) -> None:
        """Free what the source keeps."""
        self._source.release()

    def info(self, name: str) -> Info:
        """Return a tensor's shape and dtype."""
        found = self._source.info(name)
        if name not in self._turned:
            return found
        experts, rows, columns = found.shape
        return Turned((experts, columns, rows), found.dtype)

    def packed(self, name: str) -> Kept | None:
        """Return a matrix that can be kept as it is stored (`DequantisedSource.packed`); none if it is turned."""
        find = getattr(self._source, "packed", None)
        return None if name in self._turned or find is None else find(name)

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Any:
        """Read a tensor, or the part selected by slices, one per leading axis; an array of NumPy or of JAX."""
        if name not in self._turned:
            return self._source.read(name, slices)
        stack, rows, columns = (*(slices or ()), *[slice(None)] * 3)[:3]
        return self._source.read(name, (stack, columns, rows)).swapaxes(1, 2)


def transposed(name: str, values: Any) -> Any:
    """Return an array of `models.moe_rules` as published checkpoints store it, the inverse of `TransposedExperts`."""
    return values.swapaxes(1, 2) if _EXPERTS.fullmatch(name) else values
