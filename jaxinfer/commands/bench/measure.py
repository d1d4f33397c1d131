"""Run passes over the workload, jaxinfer and peers in turns, so that all see the same state of the machine."""

import sys
import time
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxinfer.commands.bench.trace import Trace
from jaxinfer.commands.bench.work import Work

PAUSE = 0.3
"""Pause in seconds between passes of different systems, because idle thread pools spin for a while."""
SETTLING = 5
"""Maximum repetitions of a pass in which something was compiled."""


@runtime_checkable
class System(Protocol):
    """System under measurement."""

    name: str

    def run(self, work: Work) -> Trace:
        """Run one pass."""
        ...


@runtime_checkable
class Ours(System, Protocol):
    """jaxinfer under measurement."""

    def compiled(self) -> tuple[int, float]:
        """Return the number of compiled steps so far, and their compilation time in seconds."""
        ...


def alternate(
    ours: Ours, peers: Sequence[System], work: Work, *, repeats: int, warmup: int = 1
) -> dict[str, list[Trace]]:
    """Run `repeats` passes of each system after `warmup` discarded ones; return the traces by system name."""
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
    """Run passes until one in which nothing was compiled; return its trace."""
    for _ in range(SETTLING):
        before, _ = ours.compiled()
        trace = ours.run(work)
        if ours.compiled()[0] == before:
            return trace
    raise RuntimeError(f"{SETTLING} passes over the same work each compiled a new step; there is no settled figure")


def agreement(ours: Sequence[Trace], theirs: Sequence[Trace]) -> float:
    """Return the share of requests with equal tokens in the last passes; 1 is expected in float32 only."""
    pairs = list(zip(ours[-1].tokens, theirs[-1].tokens, strict=True))
    return sum(a == b for a, b in pairs) / len(pairs)
