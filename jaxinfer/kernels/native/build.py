"""Compilation of the C++ kernels for this machine, and their registration with XLA.

They are built on first use with the machine's C++17 compiler for its own instruction set, and cached in the user's
cache folder under a hash of all inputs. If that fails, XLA's kernels are used.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from functools import cache
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxinfer._utils.cache_dir import cache_folder, is_private
from jaxinfer.errors import ConfigError

log = logging.getLogger(__name__)

SOURCES = ("matmul.cc", "attention.cc")
HEADERS = ("simd.h", "parallel.h", "rotate.h")
TARGETS = {
    "jaxinfer_matmul": "JaxinferMatmul",
    "jaxinfer_int8_matmul": "JaxinferInt8Matmul",
    "jaxinfer_grouped_matmul": "JaxinferGroupedMatmul",
    "jaxinfer_grouped_int8_matmul": "JaxinferGroupedInt8Matmul",
    "jaxinfer_attention": "JaxinferAttention",
    "jaxinfer_copy_blocks": "JaxinferCopyBlocks",
}
"""XLA call targets and the library's symbols."""
COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-O3", "-std=c++17", "-march=native", "-shared", "-fPIC", "-ffp-contract=off")
"""Without contraction the compiler fuses no multiplication with an addition on its own, which it might do in one
instance of a template and not in another, so that a row's bits would depend on the rows beside it."""
NEEDED = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni"})
"""CPU features required by the kernels, by their names in Linux."""

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
    missing = sorted(NEEDED - cpu_flags())
    if platform.system() != "Linux" or missing:
        return f"native kernels need Linux on x86-64 with AVX-512; missing: {', '.join(missing) or 'Linux'}"
    compiler = _compiler()
    if compiler is None:
        return f"no C++ compiler was found ({', '.join(COMPILERS)}, or CXX); install one, such as Debian's package g++"
    try:
        library = ctypes.CDLL(str(_built(compiler)))
        for name, symbol in TARGETS.items():
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    except subprocess.CalledProcessError as error:
        return f"{compiler} failed: {error.stderr.strip()[-500:]}"
    except (OSError, AttributeError) as error:
        return f"the library could not be built and loaded: {error}"
    return None


def _compiler() -> str | None:
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    return next((found for found in map(shutil.which, names) if found), None)


def _built(compiler: str) -> Path:
    """Return the path of this machine's library; builds it if missing, or if other users could have written it."""
    here = Path(__file__).parent
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    made_from = [version, jax.__version__, *FLAGS, *sorted(cpu_flags())]
    made_from += [(here / name).read_text() for name in (*SOURCES, *HEADERS)]
    name = hashlib.sha256("\0".join(made_from).encode()).hexdigest()[:16]
    library = cache_folder("native") / f"kernels-{name}.so"
    if not is_private(library):
        log.info("building the CPU kernels with %s, once, into %s", compiler, library)
        _build(compiler, here, library)
    return library


def _build(compiler: str, sources: Path, library: Path) -> None:
    """Compile all sources in parallel; the library is moved to its path only when complete."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        options = [*FLAGS, "-isystem", jax.ffi.include_dir()]
        objects = [Path(folder) / f"{name}.o" for name in SOURCES]
        runs = [
            subprocess.Popen(
                [compiler, *options, "-c", str(sources / name), "-o", str(made)], stderr=subprocess.PIPE, text=True
            )
            for name, made in zip(SOURCES, objects, strict=True)
        ]
        try:
            for run in runs:
                error = run.communicate()[1]
                if run.returncode:
                    raise subprocess.CalledProcessError(run.returncode, run.args, stderr=error)
        finally:  # after an interrupt or an error, the other compilers still write into the temporary folder
            for run in runs:
                run.kill()
                run.wait()
                run.stderr.close()
        whole = Path(folder) / library.name
        command = [compiler, *FLAGS, *map(str, objects), "-o", str(whole)]
        subprocess.run(command, capture_output=True, text=True, check=True)
        whole.chmod(0o755)  # a umask of 002 lets the group write
        os.replace(whole, library)
