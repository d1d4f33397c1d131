"""Build the C++ kernels for this machine's CPU and register them with XLA.

A wheel may carry them compiled (`setup.py`). Otherwise, or if this JAX or this system cannot use those, they are built
on first use with the machine's C++17 compiler for its own instruction set, and cached in the user's cache folder under
a hash of all inputs. If that fails, XLA's kernels are used.
"""

import ctypes
import logging
import platform
import subprocess
import threading
from functools import cache
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxinfer._utils.cache_dir import cache_folder, is_private
from jaxinfer.errors import ConfigError
from jaxinfer.kernels.native import library as libraries

log = logging.getLogger(__name__)

TARGETS = {
    "jaxinfer_matmul": "JaxinferMatmul",
    "jaxinfer_int8_matmul": "JaxinferInt8Matmul",
    "jaxinfer_grouped_matmul": "JaxinferGroupedMatmul",
    "jaxinfer_grouped_int8_matmul": "JaxinferGroupedInt8Matmul",
    "jaxinfer_packed_matmul": "JaxinferPackedMatmul",
    "jaxinfer_grouped_packed_matmul": "JaxinferGroupedPackedMatmul",
    "jaxinfer_unpack": "JaxinferUnpack",
    "jaxinfer_attention": "JaxinferAttention",
    "jaxinfer_copy_blocks": "JaxinferCopyBlocks",
    "jaxinfer_gated": "JaxinferGated",
    "jaxinfer_rms_norm": "JaxinferRmsNorm",
    "jaxinfer_add_rms_norm": "JaxinferAddRmsNorm",
    "jaxinfer_turn": "JaxinferTurn",
}
"""XLA call targets and the library's symbols."""

_lock = threading.Lock()


@cache
def cpu_flags() -> frozenset[str]:
    """Return the CPU features that Linux reports."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))


def choose(setting: str, requested: str, mesh: Mesh) -> str:
    """Choose "native" or "xla" for the devices of a mesh.

    Args:
        setting: name of the setting, for errors.
        requested: its value: "auto", "native" or "xla".
        mesh: the devices.

    Raises:
        ConfigError: "native" cannot run; names the setting and the reason.
    """
    platform = mesh.devices.flat[0].platform
    if requested == "xla" or requested == "auto" and platform != "cpu":
        return "xla"
    reason = lacking() if platform == "cpu" else f"the devices are of platform {platform!r}, not a CPU"
    if reason is None:
        return "native"
    if requested == "native":
        raise ConfigError(f"{setting} is 'native', but {reason}; 'auto' selects a kernel that can run")
    _log_once(reason)
    return "xla"


@cache
def _log_once(reason: str) -> None:
    log.info("using XLA's kernels instead of the native CPU kernels: %s", reason)


def lacking() -> str | None:
    """Return why the kernels cannot run on this CPU, with the remedy, or None. Builds them on first use."""
    with _lock:
        return _lacking()


@cache
def _lacking() -> str | None:
    variant = libraries.choose_variant(cpu_flags())
    if platform.system() != "Linux" or variant is None:
        missing = ", ".join(sorted(libraries.VARIANTS["avx2"] - cpu_flags())) or "Linux"
        return f"native kernels need Linux on x86-64 with AVX2; missing: {missing}"
    prebuilt = libraries.prebuilt(variant)
    if prebuilt.exists():
        try:
            return _register(prebuilt)
        except (OSError, AttributeError, RuntimeError) as error:
            log.info("compiling the CPU kernels, as this installation's cannot be used: %s", error)
    compiler = libraries.find_compiler()
    if compiler is None:
        names = ", ".join(libraries.COMPILERS)
        return f"no C++ compiler was found ({names}, or CXX); install one, such as Debian's package g++"
    try:
        return _register(_built(compiler))
    except subprocess.CalledProcessError as error:
        return f"{compiler} failed: {error.stderr.strip()[-500:]}"
    except (OSError, AttributeError, RuntimeError) as error:
        return f"the library could not be built and loaded: {error}"


def _register(path: Path) -> None:
    """Load a library and register its kernels with XLA.

    Raises:
        OSError: the library cannot be loaded.
        AttributeError: it lacks a kernel.
        RuntimeError: it was compiled for a version of XLA's interface that this jaxlib does not have.
    """
    # With a backend the version is checked when a kernel is registered; without one it would fail to start later.
    jax.devices("cpu")
    library = ctypes.CDLL(str(path))
    for name, symbol in TARGETS.items():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")


def _built(compiler: str) -> Path:
    """Return the path of this machine's library; builds it if missing, or if other users could have written it."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    name = libraries.digest([version, jax.__version__, *libraries.THIS_MACHINE, *sorted(cpu_flags())])
    path = cache_folder("native") / f"kernels-{name}.so"
    if not is_private(path):
        log.info("building the CPU kernels with %s, once, into %s", compiler, path)
        libraries.build(compiler, libraries.THIS_MACHINE, jax.ffi.include_dir(), path)
    return path
