"""Inspect Triton kernels compiled for a device."""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jaxinfer.kernels.triton import triton_launch
from jaxinfer.kernels.triton.triton_launch import Binary


@contextmanager
def compiled_kernels() -> Iterator[list[Binary]]:
    """Collect the kernels of all programs traced in this context, in order."""
    made: list[Binary] = []
    real = triton_launch.binary

    def binary(*args: object) -> Binary:
        made.append(real(*args))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_launch, "binary", binary)
        yield made


def spilled(ptx: str, folder: Path) -> int:
    """Return the register spills reported by Triton's assembler, in bytes."""
    import triton

    (folder / "kernel.ptx").write_text(ptx)
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    command = [assembler, "-v", "--gpu-name=sm_90a", folder / "kernel.ptx", "-o", folder / "kernel.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.findall(r"(\d+) bytes spill", said)
    assert found, said
    return sum(map(int, found))
