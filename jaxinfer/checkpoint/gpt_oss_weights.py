"""gpt-oss's checkpoints of experts as `models.moe_rules` names them: stacks of `[out, in]`, the gate's rows before
up's.

They keep `gate_up_proj` as `[E, M, 2F]` and `down_proj` as `[E, F, M]`, in bfloat16, or as MXFP4 (OCP Microscaling
Formats, https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf): `_blocks` `[E, out, in
/ 32, 16]` with two numbers of four bits a byte, the lower half first, and `_scales` `[E, out, in / 32]`, exponents of
two. In both, and in the bias, gate and up alternate.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jaxinfer.checkpoint.source import Info, Source
from jaxinfer.errors import CheckpointError

GROUP = 32
"""Numbers that share a scale."""
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
"""Of the three lower bits of a number (E2M1); the fourth is the sign."""
SIGNED = np.concatenate([VALUES, -VALUES])
PAIRS = np.stack([SIGNED[np.arange(256) & 15], SIGNED[np.arange(256) >> 4]], axis=-1)
"""`[256, 2]`: the two numbers of a byte."""

_EXPERTS = re.compile(r"(.*\.experts\.(gate_up_proj|down_proj))(_blocks|_bias)?")


class Kept(NamedTuple):
    """A tensor as `moe_rules` names it."""

    shape: tuple[int, ...]
    dtype: str
    """The dtype that holds all its numbers, by safetensors' name."""


class InterleavedExperts:
    """A source whose tensors of experts are as transformers' stacks of other models are; all others as they are.

    Numbers are turned around and dequantised as they are read, a part at a time.
    """

    def __init__(self, source: Source):
        self._source = source
        self._found: dict[str, tuple[str, str]] = {}
        """Name here -> (name in the checkpoint without an ending, the ending)."""
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
        """Raises CheckpointError where blocks and scales do not fit each other."""
        if name not in self._found:
            return self._source.info(name)
        base, ending = self._found[name]
        found = self._source.info(base + ending)
        if ending == "_bias":
            return found
        if not ending:
            first, *others = found.shape
            return Kept((first, *reversed(others)), found.dtype)
        scales = tuple(self._source.info(f"{base}_scales").shape)
        if found.shape != (*scales, GROUP // 2) or len(scales) != 3:
            raise CheckpointError(
                f"tensors {base}_blocks of shape {list(found.shape)} and {base}_scales of shape {list(scales)} do not "
                "fit: "
                f"expected [E, out, in / {GROUP}, {GROUP // 2}] and [E, out, in / {GROUP}]"
            )
        return Kept((*scales[:2], scales[2] * GROUP), "BF16")

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> np.ndarray:
        """A part of a tensor, by one slice of step 1 an axis."""
        if name not in self._found:
            return self._source.read(name, slices)
        shape = self.info(name).shape
        given = [slice(*one.indices(size)) for one, size in zip(slices or (), shape, strict=False)]
        stack, rows, *columns = [*given, *map(slice, [0] * (len(shape) - len(given)), shape[len(given) :])]
        base, ending = self._found[name]

        def read(own: slice) -> np.ndarray:
            """Rows in the checkpoint's order, `[E', rows]` or `[E', rows, columns]`."""
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
        # A scale is a number of eight bits that are all exponent.
        scales = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
        values = PAIRS[blocks].reshape(*scales.shape, GROUP) * scales[..., None]
        values = values.reshape(*scales.shape[:2], scales.shape[2] * GROUP)
        first = columns.start - groups.start * GROUP
        return values[..., first : first + columns.stop - columns.start]


def _in_order(read: Callable[[slice], np.ndarray], rows: slice, half: int) -> np.ndarray:
    """Rows of all gates, then all ups (`half` of each), of rows that alternate."""
    parts = []
    for kind in (0, 1):
        first, last = max(rows.start - kind * half, 0), min(rows.stop - kind * half, half)
        if first < last:
            parts.append(read(slice(2 * first + kind, 2 * last - 1 + kind))[:, ::2])
    return np.concatenate(parts, axis=1) if parts else read(slice(0, 0))
