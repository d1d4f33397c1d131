"""Metrics: counters, gauges and histograms with vLLM's names, and the periodic log line."""

import logging
import time
from bisect import bisect_left
from dataclasses import dataclass, field

from jaxinfer.engine.plan import Plan
from jaxinfer.engine.request import Request

log = logging.getLogger(__name__)

SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
PREFIX = "jaxinfer:"
COUNTERS = (
    "prompt_tokens",
    "prompt_tokens_cached",
    "generation_tokens",
    "num_preemptions",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "mm_cache_queries",
    "mm_cache_hits",
    "encoder_inputs",
    "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
)
SUCCESS = "request_success"
"""Counter of finished requests by their finish reason."""
LOOKUPS = "prefix_cache_lookups"
"""Counter of requests by the reason why no longer prefix of the prompt was cached; "complete" is not a miss."""


@dataclass
class Histogram:
    """Histogram: counts by upper bound, and the sum of all values."""

    bounds: tuple[int | float, ...]
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Add one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def copy(self) -> "Histogram":
        """Return a copy with the current counts."""
        made = Histogram(self.bounds, self.total)
        made.counts = list(self.counts)
        return made


@dataclass(frozen=True)
class Metric:
    """One reading of a counter, gauge or histogram."""

    name: str
    value: float | Histogram
    labels: tuple[tuple[str, str], ...] = ()


class Metrics:
    """Counters and histograms of an engine."""

    def __init__(self, interval: float):
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.success: dict[str, int] = {}
        self.lookups: dict[str, int] = {}
        self.histograms = {
            name: Histogram(SECONDS)
            for name in (
                "time_to_first_token_seconds",
                "inter_token_latency_seconds",
                "e2e_request_latency_seconds",
                "request_queue_time_seconds",
                "request_prefill_time_seconds",
                "request_decode_time_seconds",
            )
        }
        self.histograms["iteration_tokens_total"] = Histogram(TOKENS)
        self._interval = interval
        self._last = self._stepped = time.monotonic()
        self._seen = (0, 0)

    def add(self, name: str, amount: int = 1) -> None:
        """Increase a counter."""
        self.counters[name] += amount

    def observe(self, name: str, value: float) -> None:
        """Add a value to a histogram."""
        self.histograms[name].observe(value)

    def count_step(self, plan: Plan) -> None:
        """Count the tokens computed by a plan's steps."""
        if plan:
            prompts = sum(chunk.count for chunk in plan.chunks)
            decodes = sum(plan.tokens) // plan.steps
            for _ in range(plan.steps):
                self.observe("iteration_tokens_total", prompts + decodes)

    def count_hits(self, request: Request) -> None:
        """Count the prefix cache hits of a request."""
        self.add("prefix_cache_queries", len(request.prompt))
        self.add("prefix_cache_hits", request.cached_tokens)
        self.add("prompt_tokens_cached", request.cached_tokens)
        if request.miss_reason is not None:
            self.lookups[request.miss_reason] = self.lookups.get(request.miss_reason, 0) + 1

    def count_inputs(self, plan: Plan) -> None:
        """Count the encoder inputs of a plan: encoded ones and cache hits."""
        self.add("mm_cache_queries", len(plan.encodes) + len(plan.reads) + plan.reused)
        self.add("mm_cache_hits", plan.reused)
        self.add("encoder_inputs", sum(one.count for one, _ in plan.encodes) + len(plan.reads))

    def time(self, request: Request) -> None:
        """Record the latencies of a finished request: time to first token, queue, prefill, decode, end to end."""
        first, scheduled, end = request.first_token_time, request.first_scheduled_time, request.finished_time
        if first is None or scheduled is None or end is None:
            return
        self.observe("time_to_first_token_seconds", first - request.arrival_time)
        self.observe("e2e_request_latency_seconds", end - request.arrival_time)
        self.observe("request_queue_time_seconds", scheduled - request.arrival_time)
        self.observe("request_prefill_time_seconds", first - scheduled)
        self.observe("request_decode_time_seconds", end - first)
        steps = sum(s.made for s in request.sequences) // len(request.sequences) - 1
        if steps > 0:
            self.observe("inter_token_latency_seconds", (end - first) / steps)

    def readings(self, gauges: dict[str, float]) -> list[Metric]:
        """Return all metrics, in the form of `LLM.get_metrics`."""
        rows = [Metric(PREFIX + name, value) for name, value in (gauges | self.counters).items()]
        rows += [Metric(PREFIX + SUCCESS, n, (("finished_reason", r),)) for r, n in dict(self.success).items()]
        rows += [Metric(PREFIX + LOOKUPS, n, (("reason", r),)) for r, n in dict(self.lookups).items()]
        return rows + [Metric(PREFIX + name, histogram.copy()) for name, histogram in self.histograms.items()]

    def wake(self) -> None:
        """Begin a new interval of the log where the engine was idle for one: its rates are not averaged over that."""
        now = time.monotonic()
        if now - self._stepped >= self._interval:
            self._last, self._seen = now, self._tokens

    @property
    def _tokens(self) -> tuple[int, int]:
        return self.counters["prompt_tokens"], self.counters["generation_tokens"]

    def maybe_log(self, running: int, waiting: int, usage: float) -> None:
        """Log one line per interval while there is work."""
        now = self._stepped = time.monotonic()
        if now - self._last < self._interval:
            return
        seen = self._tokens
        prompt, made = ((b - a) / (now - self._last) for a, b in zip(self._seen, seen, strict=True))
        queries = self.counters["prefix_cache_queries"]
        rate = self.counters["prefix_cache_hits"] / queries if queries else 0.0
        log.info(
            "prompt %.1f tok/s, generation %.1f tok/s, running %d, waiting %d, cache use %.1f%%, prefix hits %.1f%%",
            prompt,
            made,
            running,
            waiting,
            100 * usage,
            100 * rate,
        )
        self._last, self._seen = now, seen
