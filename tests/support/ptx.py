"""Inspect Triton kernels compiled for a device."""

from tuning.assembler import assemble
from tuning.candidates import compiled as compiled_kernels

__all__ = ["assemble", "compiled_kernels", "spilled"]


def spilled(ptx: str) -> int:
    """Return the register spills reported by Triton's assembler, in bytes."""
    return assemble(ptx).spilled
