"""Where a decode step's time goes: a trace of the profiler, joined by operation with the compiled programs."""

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.extend.backend import get_backend

from benchmarks.hlo import Operations
from benchmarks.ours import Online
from benchmarks.work import Work

STEPS = re.compile(r"decode|prefill")
"""In the names of the compiled steps."""
Event = dict[str, Any]


def profile(ours: Online, work: Work, steps: int, out: Path) -> dict[str, float]:
    """Runs the work once more with the profiler on: milliseconds of a decode step and of the prefill, by category.

    Args:
        ours: it has its steps compiled in a first pass, which is not traced.
        work: prompts and `steps` + 1 new tokens of each.
        steps: decode steps of it.
        out: folder of the trace, which xprof and perfetto read.
    """
    ours.run(work)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # an event a Python call would slow the host down
    with jax.profiler.trace(str(out), profiler_options=options):
        ours.run(work)
    found = sorted(out.glob("plugins/profile/*/*.trace.json.gz"))
    if not found:
        raise RuntimeError(f"the profiler left no trace.json.gz under {out}")
    with gzip.open(found[-1]) as file:
        events = json.load(file)["traceEvents"]
    return table(events, _operations(), steps)


def _operations() -> dict[str, list[Operations]]:
    """Of every compiled step there is, by the name of its module; buckets share names."""
    programs = defaultdict(list)
    for executable in get_backend().live_executables():
        for module in executable.hlo_modules():
            if STEPS.search(module.name):
                programs[module.name].append(Operations.of(module.to_string()))
    return programs


def table(events: Iterable[Event], programs: Mapping[str, list[Operations]], steps: int) -> dict[str, float]:
    """Milliseconds a decode step, and of the prefill, by category; "elapsed" is what the clock says.

    Operations that ran at the same time on several threads add up to more than elapsed.

    Raises:
        RuntimeError: the trace names no operations, or none of a decode step.
    """
    runs: dict[tuple[str, str], list[Event]] = defaultdict(list)
    for event in events:
        labels = event.get("args", {})
        if event.get("ph") == "X" and "hlo_op" in labels:
            runs[labels["hlo_module"], labels.get("run_id", "")].append(event)
    totals: dict[str, dict[str, float]] = {"decode": defaultdict(float), "prefill": defaultdict(float)}
    for (module, _), own in runs.items():
        kind = STEPS.search(module)
        if kind is None:
            continue
        milliseconds = totals[kind.group()]
        operations = _program(programs.get(module, []), own)
        for event, seconds in self_times(own):
            milliseconds[operations.category(event["args"]["hlo_op"])] += seconds / 1e3
        milliseconds["elapsed"] += (max(e["ts"] + e["dur"] for e in own) - min(e["ts"] for e in own)) / 1e3
    if not totals["decode"]:
        raise RuntimeError("the trace names no operation of a decode step; open it in xprof or perfetto instead")
    figures = {f"decode_step_{name}_ms": value / steps for name, value in sorted(totals["decode"].items())}
    return figures | {f"prefill_{name}_ms": value for name, value in sorted(totals["prefill"].items())}


def _program(programs: list[Operations], events: list[Event]) -> Operations:
    """The one that has these operations: programs of one name differ in their buckets."""
    names = {event["args"]["hlo_op"] for event in events}
    if not programs:
        module = events[0]["args"]["hlo_module"]
        raise RuntimeError(f"the trace has a program {module} that is not among the compiled ones")
    return max(programs, key=lambda program: len(names & program.names))


def self_times(events: list[Event]) -> list[tuple[Event, float]]:
    """Each event with its microseconds, those of the events inside it on the same thread taken off."""
    found: list[tuple[Event, float]] = []
    open_: dict[int, list[int]] = defaultdict(list)
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        stack = open_[event["tid"]]
        while stack and found[stack[-1]][0]["ts"] + found[stack[-1]][0]["dur"] <= event["ts"]:
            stack.pop()
        if stack:
            outer, left = found[stack[-1]]
            found[stack[-1]] = outer, left - event["dur"]
        stack.append(len(found))
        found.append((event, event["dur"]))
    return found
