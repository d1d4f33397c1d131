"""Passes over the work, in turn: jaxinfer, then each peer, and again, so that all see the same machine."""

import sys
import time
from collections.abc import Sequence
from typing import Protocol

from benchmarks.trace import Trace
from benchmarks.work import Work

PAUSE = 0.3
"""Seconds between passes of different systems: thread pools spin for a while when they run out of work."""
SETTLING = 5
"""How often a pass that compiled something is thrown away and done again."""


class System(Protocol):
    """Something that does the work."""

    name: str

    def run(self, work: Work) -> Trace:
        """One pass."""
        ...


class Ours(System, Protocol):
    """jaxinfer."""

    def compiled(self) -> tuple[int, float]:
        """Steps compiled so far, and the seconds that took."""
        ...


def alternate(
    ours: Ours, peers: Sequence[System], work: Work, *, repeats: int, warmup: int = 1
) -> dict[str, list[Trace]]:
    """`repeats` passes of each system, after `warmup` that do not count; by the system's name."""
    for round_ in range(warmup):
        for system in (ours, *peers):
            seconds = system.run(work).seconds
            _say(f"warm-up {round_ + 1}: {system.name} took {seconds:.2f} s")
    traces: dict[str, list[Trace]] = {system.name: [] for system in (ours, *peers)}
    for round_ in range(repeats):
        for system in (ours, *peers):
            time.sleep(PAUSE)
            trace = _settled(ours, work) if system is ours else system.run(work)
            _say(f"pass {round_ + 1}: {system.name} took {trace.seconds:.2f} s")
            traces[system.name].append(trace)
    return traces


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _settled(ours: Ours, work: Work) -> Trace:
    """A pass in which nothing was compiled."""
    for _ in range(SETTLING):
        before, _ = ours.compiled()
        trace = ours.run(work)
        if ours.compiled()[0] == before:
            return trace
    raise RuntimeError(f"{SETTLING} passes over the same work each compiled a new step; there is no settled figure")


def agreement(ours: Sequence[Trace], theirs: Sequence[Trace]) -> float:
    """The share of requests whose tokens are the same in the last passes; 1 is expected in float32 alone."""
    pairs = list(zip(ours[-1].tokens, theirs[-1].tokens, strict=True))
    return sum(a == b for a, b in pairs) / len(pairs)
