"""Break a decode step's time down by category: profiler trace events, joined with the operations of the compiled
programs.
"""

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
from jaxinfer.commands.bench.ours import Online
from jaxinfer.commands.bench.work import Work

STEPS = re.compile(r"decode|prefill")
"""Pattern in the names of compiled steps."""
Event = dict[str, Any]


def profile(ours: Online, work: Work, steps: int, out: Path) -> dict[str, float]:
    """Run the workload under the profiler; return milliseconds per decode step and of the prefill, by category.

    Args:
        ours: system whose steps were compiled in an earlier pass, which is not traced.
        work: workload with `steps` + 1 new tokens per prompt.
        steps: number of decode steps of the workload.
        out: folder of the trace, readable by xprof and perfetto.
    """
    ours.run(work)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # tracing every Python call would slow the host down
    with jax.profiler.trace(str(out), profiler_options=options):
        ours.run(work)
    found = sorted(out.glob("plugins/profile/*/*.trace.json.gz"))
    if not found:
        raise RuntimeError(f"the profiler left no trace.json.gz under {out}")
    with gzip.open(found[-1]) as file:
        events = json.load(file)["traceEvents"]
    return table(events, _operations(), steps)


def _operations() -> dict[str, list[Operations]]:
    """Return the operations of every compiled step by module name; buckets share a name."""
    programs = defaultdict(list)
    for executable in get_backend().live_executables():
        for module in executable.hlo_modules():
            if STEPS.search(module.name):
                programs[module.name].append(Operations.of(module.to_string()))
    return programs


def table(events: Iterable[Event], programs: Mapping[str, list[Operations]], steps: int) -> dict[str, float]:
    """Return milliseconds per decode step, and of the prefill, by category; "elapsed" is wall-clock time.

    Operations that run concurrently on several threads add up to more than the elapsed time.

    Raises:
        RuntimeError: the trace has no named operations, or none of a decode step.
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
    """Return the program with these operations; programs that share a name differ in their buckets."""
    names = {event["args"]["hlo_op"] for event in events}
    if not programs:
        module = events[0]["args"]["hlo_module"]
        raise RuntimeError(f"the trace has a program {module} that is not among the compiled ones")
    return max(programs, key=lambda program: len(names & program.names))


def self_times(events: list[Event]) -> list[tuple[Event, float]]:
    """Return each event with its self time in microseconds, without events nested in it on the same thread."""
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
