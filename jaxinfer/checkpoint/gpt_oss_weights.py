"""Convert gpt-oss expert tensors to the layout of `models.moe_rules`: stacks of `[out, in]`, gate rows before up rows.

gpt-oss stores `gate_up_proj` as `[E, M, 2F]` and `down_proj` as `[E, F, M]`, in bfloat16 or as MXFP4 (OCP Microscaling
Formats, https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf): `_blocks` is `[E, out,
in / 32, 16]` with two 4-bit values a byte, the low half first, and `_scales` is `[E, out, in / 32]`, exponents of two.
Gate and up rows alternate in both encodings and in the bias.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxinfer.checkpoint.packed.matrix import E2M1_PAIRS, MXFP4, Kept
from jaxinfer.checkpoint.source import Info, Source
from jaxinfer.errors import CheckpointError

GROUP = MXFP4.group
"""Number of values that share a scale."""

_EXPERTS = re.compile(r"(.*\.experts\.(gate_up_proj|down_proj))(_blocks|_bias)?")


class Stored(NamedTuple):
    """Shape and dtype of a tensor in the layout of `models.moe_rules`."""

    shape: tuple[int, ...]
    dtype: str
    """Safetensors name of a dtype that represents every value exactly."""


class PackedExperts:
    """Stack of matrices in MXFP4, `[E, out, in]`, as `PackedMatrix` keeps one, with gate rows before up rows."""

    packing = MXFP4

    def __init__(self, source: Source, name: str, shape: tuple[int, ...]):
        self._source, self._name, self.shape = source, name, shape

    def octets(self, stack: slice, rows: slice, columns: slice) -> np.ndarray:
        """Return the codes of a part of the stack two a byte, `[E', rows, columns / 2]` uint8."""
        groups = slice(columns.start // GROUP, -(-columns.stop // GROUP))
        found = self._read("blocks", stack, rows, groups)
        found = found.reshape(*found.shape[:2], found.shape[2] * found.shape[3])
        first = (columns.start - groups.start * GROUP) // 2
        return found[..., first : first + (columns.stop - columns.start) // 2]

    def by_group(self, what: str, stack: slice, rows: slice, columns: np.ndarray) -> np.ndarray:
        """Return the exponents of some columns, `[E', rows, columns]` uint8."""
        groups = columns // GROUP
        found = self._read("scales", stack, rows, slice(int(groups[0]), int(groups[-1]) + 1))
        return found[..., groups - groups[0]]

    def _read(self, part: str, stack: slice, rows: slice, groups: slice) -> np.ndarray:
        def read(own: slice) -> np.ndarray:
            return self._source.read(f"{self._name}_{part}", (stack, own, groups))

        return _in_order(read, rows, self.shape[1] // 2) if "gate_up_proj" in self._name else read(rows)


class InterleavedExperts:
    """Present gpt-oss expert tensors as the expert stacks of other models; pass other tensors through unchanged.

    Tensors are transposed, reordered and dequantised on each read, for the requested slices only.
    """

    def __init__(self, source: Source):
        self._source = source
        self._found: dict[str, tuple[str, str]] = {}
        """Presented name -> (checkpoint name without suffix, suffix)."""
        names, hidden = set(source.names()), set()
        for name in names:
            match = _EXPERTS.fullmatch(name)
            if match is None or match[3] == "_blocks" and f"{match[1]}_scales" not in names:
                continue
            self._found[match[1] if match[3] == "_blocks" else name] = match[1], match[3] or ""
            if match[3] == "_blocks":
                hidden |= {name, f"{match[1]}_scales"}
        self._names = [name for name in source.names() if name not in hidden]
        self._names += [name for name in self._found if name not in names]

    def names(self) -> list[str]:
        return self._names

    def release(self) -> None:
        self._source.release()

    def info(self, name: str) -> Info:
        """Return a tensor's shape and dtype.

        Raises:
            CheckpointError: the shapes of MXFP4 blocks and scales do not match.
        """
        if name not in self._found:
            return self._source.info(name)
        base, ending = self._found[name]
        found = self._source.info(base + ending)
        if ending == "_bias":
            return found
        if not ending:
            first, *others = found.shape
            return Stored((first, *reversed(others)), found.dtype)
        scales = tuple(self._source.info(f"{base}_scales").shape)
        if found.shape != (*scales, GROUP // 2) or len(scales) != 3:
            raise CheckpointError(
                f"tensors {base}_blocks of shape {list(found.shape)} and {base}_scales of shape {list(scales)} do not "
                f"fit: expected [E, out, in / {GROUP}, {GROUP // 2}] and [E, out, in / {GROUP}]"
            )
        return Stored((*scales[:2], scales[2] * GROUP), "BF16")

    def packed(self, name: str) -> Kept | None:
        """Return experts in MXFP4, or another matrix that can be kept in 4 bits (`DequantisedSource.packed`)."""
        if self._found.get(name, ("", ""))[1] == "_blocks":
            return PackedExperts(self._source, self._found[name][0], self.info(name).shape)
        find = getattr(self._source, "packed", None)
        return find and find(name)

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Any:
        """Read a tensor, or the part selected by slices of step 1, one per leading axis.

        The array is of NumPy, or of JAX if the source's are.
        """
        if name not in self._found:
            return self._source.read(name, slices)
        shape = self.info(name).shape
        given = [slice(*one.indices(size)) for one, size in zip(slices or (), shape, strict=False)]
        stack, rows, *columns = [*given, *map(slice, [0] * (len(shape) - len(given)), shape[len(given) :])]
        base, ending = self._found[name]

        def read(own: slice) -> Any:
            """Read rows in the checkpoint's order, `[E', rows]` or `[E', rows, columns]`."""
            if ending == "_blocks":
                return self._dequantised(base, stack, own, *columns)
            if ending == "_bias":
                return self._source.read(name, (stack, own))
            return self._source.read(name, (stack, *columns, own)).swapaxes(1, 2)

        return _in_order(read, rows, shape[1] // 2) if "gate_up_proj" in base else read(rows)

    def _dequantised(self, base: str, stack: slice, rows: slice, columns: slice) -> np.ndarray:
        groups = slice(columns.start // GROUP, -(-columns.stop // GROUP))
        blocks = self._source.read(f"{base}_blocks", (stack, rows, groups))
        scales = self._source.read(f"{base}_scales", (stack, rows, groups))
        # Scales are E8M0: eight exponent bits, no sign and no mantissa.
        scales = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
        values = E2M1_PAIRS[blocks].reshape(*scales.shape, GROUP) * scales[..., None]
        values = values.reshape(*scales.shape[:2], scales.shape[2] * GROUP)
        first = columns.start - groups.start * GROUP
        return values[..., first : first + columns.stop - columns.start]


def _in_order(read: Callable[[slice], Any], rows: slice, half: int) -> Any:
    """Read interleaved gate and up rows as all gate rows, then all up rows (`half` of each)."""
    parts = []
    for kind in (0, 1):
        first, last = max(rows.start - kind * half, 0), min(rows.stop - kind * half, half)
        if first < last:
            parts.append(read(slice(2 * first + kind, 2 * last - 1 + kind))[:, ::2])
    return parts[0].__array_namespace__().concatenate(parts, axis=1) if parts else read(slice(0, 0))


def interleave(name: str, values: Any) -> Any:
    """Return an array of `models.moe_rules` in the layout of gpt-oss in bfloat16, the inverse of `InterleavedExperts`.

    Args:
        name: name of the tensor; those that are not of experts are returned unchanged.
        values: array of NumPy or JAX.
    """
    match = _EXPERTS.fullmatch(name)
    if match is None:
        return values
    if match[2] == "gate_up_proj":
        xp, (experts, rows, *_) = values.__array_namespace__(), values.shape
        halves = values.reshape(experts, 2, rows // 2, *values.shape[2:])
        values = xp.moveaxis(halves, 1, 2).reshape(values.shape)
    return values if match[3] == "_bias" else values.swapaxes(1, 2)
