"""Compiling ahead all that a workload can need."""

import os
import time
from collections.abc import Collection
from dataclasses import dataclass

from tqdm.auto import tqdm

from jaxinfer.engine.runner.buckets import SAMPLING
from jaxinfer.engine.runner.programs import Programs

MOST_THREADS = 16
"""Each holds a program's code and XLA's structures while it compiles, some 100 MB for large models."""


@dataclass(frozen=True)
class Warmup:
    """What a warm-up did."""

    programs: int
    """Programs that there are now for such a workload."""
    compiled: int
    """Of them, those that it compiled or read from the compilation cache."""
    seconds: float
    """It took."""

    def __str__(self) -> str:
        return f"{self.compiled} programs compiled in {self.seconds:.1f} s, {self.programs} in all"


def check_sampling(sampling: Collection[str]) -> tuple[str, ...]:
    """The names, each known.

    Raises:
        ValueError: one that is not.
    """
    names = (sampling,) if isinstance(sampling, str) else tuple(sampling)
    for name in names:
        if name not in SAMPLING:
            raise ValueError(f"sampling may name {', '.join(SAMPLING)}; got {name!r}")
    return names


def warm_up(
    programs: Programs, sampling: Collection[str], *, threads: int | None = None, use_tqdm: bool = True
) -> Warmup:
    """Compiles what is not compiled yet, by default in as many threads as there are processors."""
    started, keys = time.perf_counter(), programs.keys(sampling)
    missing = [key for key in keys if key not in programs.seconds]
    threads = threads or min(_processors(), MOST_THREADS)
    with tqdm(total=len(missing), desc="Compiling steps", disable=not use_tqdm, dynamic_ncols=True) as bar:
        programs.prepare(missing, threads, lambda key: bar.update())
    return Warmup(len(keys), len(missing), time.perf_counter() - started)


def _processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
