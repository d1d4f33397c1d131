"""Measure tokens per second of a run, excluding compilation time."""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from jaxinfer.llm import LLM
from jaxinfer.outputs import RequestOutput

LEAST = 1e-3
"""Seconds that must be left beside compilation for a rate."""


class Mark(NamedTuple):
    """Timestamp of a run, with the compilation time up to then."""

    time: float
    """Time from `time.perf_counter`, in seconds."""
    compiling: float
    """Total compilation time of the engine so far, in seconds."""

    def rate(self, tokens: int, since: "Mark") -> str:
        """Format the tokens per second since another mark, excluding compilation.

        Programs that are compiled at the same time count twice, so that no time may be left.
        """
        seconds = self.time - since.time - (self.compiling - since.compiling)
        return f"{tokens / seconds:.1f} tok/s" if seconds > LEAST else "too short to say"


class Rates:
    """Prefill and decode rates of a stream: prefill lasts until the last first token, decode starts at the first
    one.
    """

    def __init__(self, llm: LLM):
        """Start the clock."""
        self._llm, self._begun = llm, set()
        self._start = self._first = self._last = self._mark()

    def watch(self, updates: Iterable[RequestOutput]) -> Iterator[RequestOutput]:
        """Yield the updates unchanged, and record when the first one of each request arrives."""
        for update in updates:
            if update.request_id not in self._begun and any(output.token_ids for output in update.outputs):
                self._last = self._mark()
                self._first = self._first if self._begun else self._last
                self._begun.add(update.request_id)
            yield update

    def of(self, outputs: Sequence[RequestOutput]) -> str:
        """Format the rates of the final results, after the stream has ended."""
        end = self._mark()
        prompt = sum(len(output.prompt_token_ids) for output in outputs)
        made = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
        rates = "nothing was generated"
        if self._begun:
            reading, writing = self._last.rate(prompt, self._start), end.rate(made, self._first)
            rates = f"prompt: {reading}, generation: {writing}"
        total, compiling = end.time - self._start.time, end.compiling - self._start.compiling
        left_out = f"; compiling took {compiling:.1f} s of it, which the rates leave out" if compiling > LEAST else ""
        return f"{rates} ({prompt} + {made} tokens in {total:.1f} s{left_out})"

    def _mark(self) -> Mark:
        [seconds] = [metric.value for metric in self._llm.get_metrics() if metric.name.endswith("compile_seconds")]
        return Mark(time.perf_counter(), float(seconds))
