"""Assemble PTX with Triton's `ptxas`, to see what a kernel needs of a multiprocessor."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
"""Most KiB of shared memory of a program, by compute capability (CUDA programming guide, table of capabilities)."""


@dataclass(frozen=True)
class Assembled:
    """What `ptxas` says of a kernel."""

    registers: int
    """Registers of a thread."""
    spilled: int
    """Bytes of registers that are kept in memory, stores and loads."""


def assemble(ptx: str, capability: int = 90) -> Assembled:
    """Assemble a kernel for a device of this compute capability, such as 90 for 9.0."""
    import triton

    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    name = f"sm_{capability}" + ("a" if capability >= 90 else "")
    with TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [assembler, "-v", f"--gpu-name={name}", source, "-o", source.with_suffix(".cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled, used = re.findall(r"(\d+) bytes spill", said), re.search(r"Used (\d+) registers", said)
    if not spilled or used is None:
        raise RuntimeError(f"ptxas says neither spills nor registers: {said}")
    return Assembled(int(used[1]), sum(map(int, spilled)))
