"""Track finished requests of a call, stream updates, and show progress."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from operator import itemgetter
from typing import Any

from tqdm.auto import tqdm

from jaxinfer.engine.request import Listener, Request
from jaxinfer.engine.request import Sequence as Sample
from jaxinfer.outputs import RequestOutput
from jaxinfer.results.output_processor import Handle
from jaxinfer.sampling_params import DefaultInt

RUNNING, COMPILING = "Processed prompts", "Compiling steps"
"""Descriptions of a bar; the second while nothing runs because programs are missing."""

log = logging.getLogger(__name__)


class Running:
    """Unfinished handles of a call.

    The engine reports finished requests (`Request.on_finish`), so that no step iterates over all handles.
    """

    def __init__(self, handles: Iterable[Handle] = ()):
        self._left: dict[str, Handle] = {}
        self._ended: deque[str] = deque()
        for handle in handles:
            self.add(handle)

    def __len__(self) -> int:
        return len(self._left)

    @property
    def some_ended(self) -> bool:
        """Whether requests have finished since the last `take_ended`."""
        return bool(self._ended)

    def undisturbed(self) -> bool:
        """Return whether no request has finished since the last `take_ended`."""
        return not self._ended

    def add(self, handle: Handle) -> None:
        """Track a handle whose request is not queued yet."""
        self._left[handle.request.id] = handle
        handle.request.on_finish = self._end

    def _end(self, request: Request) -> None:
        self._ended.append(request.id)

    def take_ended(self) -> list[Handle]:
        """Return the handles whose requests have finished since the last call."""
        ended = []
        while self._ended:
            handle = self._left.pop(self._ended.popleft(), None)  # None: reported twice
            if handle is not None:
                ended.append(handle)
        return ended


class Updates:
    """New outputs of a stream after each step; visits only handles whose requests got a token or finished."""

    def __init__(self, handles: Sequence[Handle]):
        self._running = Running(handles)
        self._places = {handle.request.id: (place, handle) for place, handle in enumerate(handles)}
        self._changed: set[str] = set()
        self.found: list[RequestOutput] = []
        """Outputs that the last call of `awaited` found."""
        self.left = bool(handles)
        """Whether requests were unfinished at the last call of `awaited`."""
        for handle in handles:
            handle.request.listener = _UpdateRecorder(self._changed, handle.request.listener)

    def unfinished(self) -> bool:
        """Record finished requests and return whether any are left."""
        self._changed.update(handle.request.id for handle in self._running.take_ended())
        return len(self._running) > 0

    def awaited(self) -> bool:
        """Take new outputs and return whether a step is needed for the next ones; runs on the engine thread."""
        self.found, self.left = self.take(), self.unfinished()
        return self.left and not self.found

    def take(self) -> list[RequestOutput]:
        """Return the new outputs of all handles since the last call, in the order of the handles."""
        self.unfinished()
        changed = [self._places[name] for name in self._changed]
        self._changed.clear()
        found = [handle.update(handle.request.params.output_kind) for _, handle in sorted(changed, key=itemgetter(0))]
        return [update for update in found if update is not None]


class _UpdateRecorder:
    """Listener that records which requests got tokens, then calls the handle's own listener."""

    def __init__(self, changed: set[str], own: Listener | None):
        self._changed, self._own = changed, own

    def on_token(self, sequence: Sample, *rest: Any) -> str | None:
        """Record the request and forward the token."""
        self._changed.add(sequence.request.id)
        return None if self._own is None else self._own.on_token(sequence, *rest)


class Counted:
    """Finished requests of a call on one engine, and their tokens."""

    def __init__(self, handles: Sequence[Handle]):
        self._running = Running(handles)
        self.prompt, self.made, self.done = 0, 0, 0

    def unfinished(self) -> bool:
        """Count finished requests and return whether any are left; runs on the engine's thread."""
        if self._running.some_ended:
            done = self._running.take_ended()
            self.prompt += sum(len(handle.request.prompt) for handle in done)
            self.made += sum(s.made for handle in done for s in handle.request.sequences)
            self.done += len(done)
        return len(self._running) > 0


class Progress:
    """Progress bar of a call, drawn on its caller's thread: finished prompts, tokens per second, waiting for programs.

    Args:
        bar: the bar.
        shares: the requests that each engine has.
        compiles: returns whether an engine waits for programs that are being compiled.
    """

    def __init__(self, bar: tqdm, shares: Iterable[Sequence[Handle]], compiles: Callable[[], bool]):
        self._bar, self.parts = bar, [Counted(handles) for handles in shares]
        self._compiles, self._description = compiles, RUNNING
        self._start = time.perf_counter()

    def show(self) -> None:
        """Update the bar with the requests finished since the last call, and say whether programs are compiled."""
        shown = COMPILING if self._compiles() else RUNNING
        if shown != self._description:
            self._description = shown
            self._bar.set_description_str(shown)
        fresh = sum(part.done for part in self.parts) - self._bar.n
        if fresh:
            passed = max(time.perf_counter() - self._start, 1e-9)
            prompt, made = (sum(counts) for counts in zip(*((part.prompt, part.made) for part in self.parts)))
            self._bar.set_postfix_str(
                f"est. speed input: {prompt / passed:.2f} toks/s, output: {made / passed:.2f} toks/s",
                refresh=False,
            )
            self._bar.update(fresh)


def warn_if_truncated(handles: Sequence[Handle]) -> None:
    """Warn, once per process, if results were cut at the default `max_tokens`."""
    for handle in handles:
        most = handle.request.params.max_tokens
        if isinstance(most, DefaultInt) and any(
            s.finish_reason == "length" and s.made == most for s in handle.request.sequences
        ):
            _warn_truncated(int(most))
            return


@cache
def _warn_truncated(count: int) -> None:
    log.warning("results were cut at max_tokens=%d, the default; pass SamplingParams(max_tokens=...) for more", count)
