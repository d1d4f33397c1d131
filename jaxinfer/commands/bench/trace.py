"""Record what a system did with a workload, and compute figures with the same formulas for all systems."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import numpy as np

from jaxinfer.commands.bench.work import Work


@dataclass(frozen=True)
class Trace:
    """One pass over the workload. Times are seconds since its start."""

    seconds: float
    """Time of the last token."""
    tokens: list[list[int]]
    """New tokens of each sample, with the samples of a request in sequence."""
    arrivals: list[float]
    """Arrival time of each request."""
    times: list[list[float]]
    """Time of each token of each sample; empty if the system does not report them."""

    @classmethod
    def of(cls, reply: Mapping[str, Any]) -> "Trace":
        """Parse a peer's reply."""
        return cls(reply["seconds"], reply["tokens"], reply["arrivals"], reply["times"])


Figures = Callable[[Work, Trace], dict[str, float]]
"""Function that computes several figures of one pass."""


def throughput(work: Work, trace: Trace) -> dict[str, float]:
    """Return requests and tokens per second."""
    return {
        "elapsed_time": trace.seconds,
        "requests_per_second": len(work.prompts) / trace.seconds,
        "tokens_per_second": (work.prompt_tokens + work.new_tokens) / trace.seconds,
        "output_tokens_per_second": work.new_tokens / trace.seconds,
    }


def first_tokens(trace: Trace) -> float:
    """Return the time at which every sample had its first token."""
    return max(times[0] for times in trace.times)


def prefill_rate(work: Work, trace: Trace) -> float:
    """Return prompt tokens per second until every sample has its first token."""
    return work.prompt_tokens / first_tokens(trace)


def decode_rate(work: Work, trace: Trace) -> float:
    """Return tokens per second after every first token, while all sequences decode.

    For one sequence: all tokens but the first, over the time from the first to the last. For several, tokens that early
    sequences produce while others are in prefill do not count.
    """
    start, end = first_tokens(trace), max(times[-1] for times in trace.times)
    return sum(at > start for times in trace.times for at in times) / (end - start)


def span(values: Sequence[float]) -> dict[str, float]:
    """Return the median, minimum and maximum of a figure over the passes."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def latency(traces: Sequence[Trace]) -> dict[str, float]:
    """Return the seconds of one batch over all passes."""
    seconds = [trace.seconds for trace in traces]
    parts = {f"p{q}_latency": float(np.percentile(seconds, q)) for q in (50, 90, 99)}
    return {"avg_latency": mean(seconds), "best_latency": min(seconds), **parts}


def serving(work: Work, trace: Trace) -> dict[str, float]:
    """Return throughput, time to first token, time per output token, and the longest gap while others are in
    prefill.
    """
    first = [times[0] - arrival for times, arrival in zip(trace.times, trace.arrivals, strict=True)]
    after = [(times[-1] - times[0]) / (len(times) - 1) for times in trace.times if len(times) > 1]
    figures = throughput(work, trace) | _statistics("ttft", first) | _statistics("tpot", after or [0.0])
    return figures | {
        "longest_gap_ms": 1e3 * max((end - start for _, start, end in _gaps(trace)), default=0.0),
        "longest_gap_while_others_prefill_ms": 1e3 * _longest_gap_beside_prefill(trace),
    }


def _statistics(name: str, seconds: Sequence[float]) -> dict[str, float]:
    figures = {"mean": mean(seconds), "median": median(seconds), "p99": float(np.percentile(seconds, 99))}
    return {f"{kind}_{name}_ms": 1e3 * value for kind, value in figures.items()}


def _gaps(trace: Trace) -> Iterator[tuple[int, float, float]]:
    """Yield (request, start, end) for any two consecutive tokens."""
    for index, times in enumerate(trace.times):
        for start, end in zip(times, times[1:], strict=False):
            yield index, start, end


def _longest_gap_beside_prefill(trace: Trace) -> float:
    """Return the longest time between two tokens of a request that overlaps with another request's wait for its
    first token.
    """
    waits = [(arrival, times[0]) for arrival, times in zip(trace.arrivals, trace.times, strict=True)]
    longest = 0.0
    for index, start, end in _gaps(trace):
        if end - start > longest and any(
            arrival < end and first > start for other, (arrival, first) in enumerate(waits) if other != index
        ):
            longest = end - start
    return longest


def medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the median of each figure over the passes."""
    return {name: median(run[name] for run in runs) for name in runs[0]}
