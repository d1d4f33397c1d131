"""Compilation of the C++ kernels into a shared library. `setup.py` loads this file alone: it imports nothing else."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("matmul.cc", "packed_matmul.cc", "attention.cc", "rowwise.cc")
VECTORS = ("vectors.h", "vectors_avx512.h", "vectors_avx2.h")
HEADERS = (
    *VECTORS,
    "simd.h",
    "parallel.h",
    "rotate.h",
    "rows.h",
    "groups.h",
    "products.h",
    "codes.h",
    "packed_codes.h",
)
COMPILERS = ("g++", "clang++", "c++")
VARIANTS = {
    "avx512": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni"}),
    "avx2": frozenset({"avx2", "fma", "f16c", "popcnt"}),
}
"""CPU features required by the kernels of each instruction set, by their names in Linux; the fastest comes first."""
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off")
"""Without contraction the compiler fuses no multiplication with an addition on its own, which it might do in one
instance of a template and not in another, so that a row's bits would depend on the rows beside it."""
THIS_MACHINE = (*FLAGS, "-march=native")
"""Flags of a library that is compiled where it runs."""
PORTABLE = (*FLAGS, "-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL,--gc-sections", "-s")
"""Flags of a library that a wheel carries: it needs glibc, but no C++ runtime."""


def choose_variant(flags: Iterable[str]) -> str | None:
    """Return the fastest variant that a CPU with these features runs, or None."""
    return next((name for name, needed in VARIANTS.items() if needed <= set(flags)), None)


def any_machine(variant: str) -> tuple[str, ...]:
    """Return the flags of a library of a wheel that runs on all CPUs with the features of the variant."""
    return (*PORTABLE, *(f"-m{name.replace('_', '')}" for name in sorted(VARIANTS[variant])))


def find_compiler() -> str | None:
    """Return the path of the C++ compiler named by CXX, else of the first of `COMPILERS`, or None if there is none."""
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    return next((found for found in map(shutil.which, names) if found), None)


def digest(made_from: Iterable[str]) -> str:
    """Return the hash of all sources and of what else a library depends on."""
    inputs = [*made_from, *((HERE / name).read_text() for name in (*SOURCES, *HEADERS))]
    return hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]


def prebuilt(variant: str, folder: Path = HERE) -> Path:
    """Return where a wheel keeps a library compiled from just these sources; most installations have none."""
    return folder / f"prebuilt-{variant}-{digest(any_machine(variant))}.so"


def build(compiler: str, flags: Sequence[str], include: str, library: Path, sources: Path = HERE) -> None:
    """Compile all sources in parallel; the library is moved to its path only when complete.

    Args:
        compiler: path of the compiler.
        flags: its flags.
        include: folder of XLA's headers.
        library: path of the library.
        sources: folder of the sources.

    Raises:
        subprocess.CalledProcessError: the compiler failed; `stderr` is its message.
        OSError: the compiler could not be run, or the library not be written.
    """
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        options = [*flags, "-isystem", include]
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
        command = [compiler, *flags, *map(str, objects), "-o", str(whole)]
        subprocess.run(command, capture_output=True, text=True, check=True)
        whole.chmod(0o755)  # a umask of 002 lets the group write
        os.replace(whole, library)
