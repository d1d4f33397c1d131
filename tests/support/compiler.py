"""Compiler flags of the tests on CPUs: low optimisation, since compilation takes most of the test time.

With LLVM optimisation, a program of a tiny model takes two to four times as long to compile and gives the same tokens.
JAXINFER_TEST_OPTIMIZED=1 keeps XLA's default flags.
"""

import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path


def flags(devices: int) -> str:
    """Return XLA_FLAGS of a process with `devices` virtual devices."""
    chosen = [f"--xla_force_host_platform_device_count={devices}"]
    if os.environ.get("JAXINFER_TEST_OPTIMIZED") != "1":
        chosen.append("--xla_backend_optimization_level=0")
        if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # newer versions abort on this removed flag
            chosen.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(chosen)


MAX_CACHE_BYTES = 4 << 30
"""Size above which the tests' compilation cache is deleted when a run starts. One run of all tests writes 0.2 GB."""


def cache_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Return environment variables that make tests, and processes they start, share one compilation cache.

    It lies under XDG_CACHE_HOME or ~/.cache, so a second run compiles only what has changed: compilation takes 40% of
    a run. A folder that the user chose is kept, and JAX_ENABLE_COMPILATION_CACHE=false switches the cache off.
    """
    if "JAX_COMPILATION_CACHE_DIR" in environment:
        return {}
    base = Path(environment.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = base / "jaxinfer" / "test-programs"
    if folder.is_dir() and sum(file.stat().st_size for file in folder.iterdir()) > MAX_CACHE_BYTES:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        # Otherwise the folder's path becomes a part of the keys of programs for GPUs.
        "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",
    }


GPU = {"xla_backend_optimization_level": 3}
"""Compiler options of programs for GPUs, inspected at the optimisation level that users get."""
