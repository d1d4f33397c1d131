"""How the tests compile for a CPU: fast, as most of their time is compilation.

Optimised by LLVM a program of a tiny model takes two to four times as long to compile, and computes the same tokens.
JAXINFER_TEST_OPTIMIZED=1 leaves XLA as users have it.
"""

import os
from importlib.metadata import version


def flags(devices: int) -> str:
    """XLA_FLAGS of a process with so many virtual devices."""
    chosen = [f"--xla_force_host_platform_device_count={devices}"]
    if os.environ.get("JAXINFER_TEST_OPTIMIZED") != "1":
        chosen.append("--xla_backend_optimization_level=0")
        if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # newer ones know it no more, and would end
            chosen.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(chosen)


GPU = {"xla_backend_optimization_level": 3}
"""Compiler options of programs for a GPU, which are read as users have them."""
