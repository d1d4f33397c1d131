"""What a call says of itself while it runs and at its end: the bar, and a word on results that were cut."""

import logging
import time
from collections.abc import Sequence
from functools import cache

from tqdm.auto import tqdm

from jaxinfer.handle import Handle
from jaxinfer.sampling_params import DefaultInt

log = logging.getLogger(__name__)


class Progress:
    """The bar over a call: prompts done, tokens a second."""

    def __init__(self, bar: tqdm, handles: Sequence[Handle]):
        self._bar, self._left = bar, list(handles)
        self._start, self._prompt, self._made = time.perf_counter(), 0, 0

    def unfinished(self) -> bool:
        """Takes note of what has finished; whether anything is left."""
        done = [handle for handle in self._left if handle.finished]
        if done:
            self._left = [handle for handle in self._left if not handle.finished]
            self._prompt += sum(len(handle.request.prompt) for handle in done)
            self._made += sum(s.made for handle in done for s in handle.request.sequences)
            passed = max(time.perf_counter() - self._start, 1e-9)
            self._bar.set_postfix_str(
                f"est. speed input: {self._prompt / passed:.2f} toks/s, output: {self._made / passed:.2f} toks/s",
                refresh=False,
            )
            self._bar.update(len(done))
        return bool(self._left)


def say_if_cut(handles: Sequence[Handle]) -> None:
    """Log once a process that results ended at the `max_tokens` that a caller gets without giving any."""
    for handle in handles:
        most = handle.request.params.max_tokens
        if isinstance(most, DefaultInt) and any(
            s.finish_reason == "length" and s.made == most for s in handle.request.sequences
        ):
            _say_cut(int(most))
            return


@cache
def _say_cut(count: int) -> None:
    log.warning("results were cut at max_tokens=%d, the default; pass SamplingParams(max_tokens=...) for more", count)
