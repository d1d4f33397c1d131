"""Tokens a second of a run, without the time that programs were compiled."""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from jaxinfer import LLM, RequestOutput


class Mark(NamedTuple):
    """A moment of the run."""

    time: float
    """Seconds of `time.perf_counter`."""
    compiling: float
    """Seconds that the engine has compiled so far."""

    def since(self, other: "Mark") -> float:
        """Seconds from another moment to this one in which nothing was compiled."""
        return max(self.time - other.time - (self.compiling - other.compiling), 1e-9)


class Rates:
    """The times of a stream: prompts are read until the last first token, text is made from the first token on."""

    def __init__(self, llm: LLM):
        """Start the clock."""
        self._llm, self._begun = llm, set()
        self._start = self._first = self._last = self._mark()

    def watch(self, updates: Iterable[RequestOutput]) -> Iterator[RequestOutput]:
        """Pass updates on, and note when the first one of each request comes."""
        for update in updates:
            if update.request_id not in self._begun and any(output.token_ids for output in update.outputs):
                self._last = self._mark()
                self._first = self._first if self._begun else self._last
                self._begun.add(update.request_id)
            yield update

    def of(self, outputs: Sequence[RequestOutput]) -> str:
        """Return the rates of the whole results, once the stream is at its end."""
        end = self._mark()
        prompt = sum(len(output.prompt_token_ids) for output in outputs)
        made = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
        rates = "nothing was generated"
        if self._begun:
            reading, writing = self._last.since(self._start), end.since(self._first)
            rates = f"prompt: {prompt / reading:.1f} tok/s, generation: {made / writing:.1f} tok/s"
        total, compiling = end.time - self._start.time, end.compiling - self._start.compiling
        left_out = f"{compiling:.1f} s of it compiling, which the rates leave out"
        return f"{rates} ({prompt} + {made} tokens in {total:.1f} s; {left_out})"

    def _mark(self) -> Mark:
        [seconds] = [metric.value for metric in self._llm.get_metrics() if metric.name.endswith("compile_seconds")]
        return Mark(time.perf_counter(), float(seconds))
