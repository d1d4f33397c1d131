"""Seconds of work that a device does behind the host's back."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax


@dataclass(frozen=True)
class Timed:
    """Seconds a call, over several batches of calls."""

    median: float
    least: float
    most: float

    @property
    def spread(self) -> float:
        """(most - least) / median: differences smaller than this are noise."""
        return (self.most - self.least) / self.median


def measure(call: Callable[[], Any], *, seconds: float = 0.3, repeats: int = 5) -> Timed:
    """Times a call that dispatches work and returns arrays of it.

    Calls are dispatched one after another and only the last of a batch is waited for, so that the host's own time
    is hidden as long as it is shorter than the device's.

    Args:
        call: warmed up twice, then repeated.
        seconds: about how long all batches take together.
        repeats: batches.
    """
    for _ in range(2):
        start = time.perf_counter()
        jax.block_until_ready(call())
        once = time.perf_counter() - start
    count = max(1, min(1000, int(seconds / repeats / once)))
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(count):
            result = call()
        jax.block_until_ready(result)
        found.append((time.perf_counter() - start) / count)
    return Timed(median(found), min(found), max(found))
