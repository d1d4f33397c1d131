"""Time asynchronously dispatched device work."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax


@dataclass(frozen=True)
class Timed:
    """Seconds per call, over several batches of calls."""

    median: float
    least: float
    most: float

    @property
    def spread(self) -> float:
        """(max - min) / median; smaller differences are noise."""
        return (self.most - self.least) / self.median


def measure(call: Callable[[], Any], *, seconds: float = 0.3, repeats: int = 5) -> Timed:
    """Time a call that dispatches work and returns its arrays.

    Calls are dispatched without waiting, except for the last one of a batch, so that host time is hidden as long as it
    is shorter than device time.

    Args:
        call: function to time; warmed up twice.
        seconds: approximate duration of all batches together.
        repeats: number of batches.
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
