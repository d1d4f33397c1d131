"""Compiler flags of the tests on CPUs: low optimisation, since compilation takes most of the test time.

With LLVM optimisation, a program of a tiny model takes two to four times as long to compile and gives the same tokens.
JAXINFER_TEST_OPTIMIZED=1 keeps XLA's default flags.
"""

import os
from importlib.metadata import version


def flags(devices: int) -> str:
    """Return XLA_FLAGS of a process with `devices` virtual devices."""
    chosen = [f"--xla_force_host_platform_device_count={devices}"]
    if os.environ.get("JAXINFER_TEST_OPTIMIZED") != "1":
        chosen.append("--xla_backend_optimization_level=0")
        if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # newer versions abort on this removed flag
            chosen.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(chosen)


GPU = {"xla_backend_optimization_level": 3}
"""Compiler options of programs for GPUs, inspected at the optimisation level that users get."""
