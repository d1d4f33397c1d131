"""Warm-up: compile all programs that a workload can need."""

import os
import time
from collections.abc import Collection
from dataclasses import dataclass

from tqdm.auto import tqdm

from jaxinfer.engine.runner.buckets import BEAMS, SAMPLING, STRUCTURED
from jaxinfer.engine.runner.programs import Programs

MOST_THREADS = 16
"""Maximum number of compiling threads; each takes about 100 MB for large models, for the program and XLA's
structures.
"""


@dataclass(frozen=True)
class Warmup:
    """Result of a warm-up."""

    programs: int
    """Number of compiled programs for the workload."""
    compiled: int
    """Number of programs compiled, or read from the compilation cache, by this warm-up."""
    seconds: float
    """Duration in seconds."""

    def __str__(self) -> str:
        return f"{self.compiled} programs compiled in {self.seconds:.1f} s, {self.programs} in all"


def check_sampling(sampling: Collection[str]) -> tuple[str, ...]:
    """Check sampling feature names and return them as a tuple.

    Raises:
        ValueError: a name is unknown.
    """
    names = (sampling,) if isinstance(sampling, str) else tuple(sampling)
    for name in names:
        if name not in (known := (*SAMPLING, STRUCTURED, BEAMS)):
            raise ValueError(f"sampling may name {', '.join(known)}; got {name!r}")
    return names


def warm_up(
    programs: Programs, sampling: Collection[str], *, threads: int | None = None, use_tqdm: bool = True
) -> Warmup:
    """Compile the missing programs, by default in as many threads as there are processors."""
    started, keys = time.perf_counter(), programs.keys(sampling)
    missing = [key for key in keys if key not in programs.seconds]
    threads = threads or default_threads()
    with tqdm(total=len(missing), desc="Compiling steps", disable=not use_tqdm, dynamic_ncols=True) as bar:
        programs.prepare(missing, threads, lambda key: bar.update())
    return Warmup(len(keys), len(missing), time.perf_counter() - started)


def default_threads() -> int:
    """Return the number of compilation threads: one per processor this process may use, up to a limit."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(processors, MOST_THREADS)
