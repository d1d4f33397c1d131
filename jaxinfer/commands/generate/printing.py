"""Print results to a terminal: streamed texts, JSON objects, speed and memory."""

import resource
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from tqdm.auto import tqdm

from jaxinfer.outputs import CompletionOutput, RequestOutput


def show(updates: Iterable[RequestOutput], prompts: Sequence[str], n: int, chat: bool) -> list[RequestOutput]:
    """Print each prompt with its streamed continuation, in prompt order; requests run concurrently, so later ones
    are buffered.
    """
    printer = Printer(prompts, n, chat)
    for update in updates:
        printer.take(update)
        printer.print()
    return printer.results()


def collect(updates: Iterable[RequestOutput], prompts: Sequence[str], n: int) -> list[RequestOutput]:
    """Collect the final results of a stream, with a progress bar over its prompts."""
    printer = Printer(prompts, n, False)
    with tqdm(total=len(prompts), desc="Processed prompts", dynamic_ncols=True) as bar:
        for update in updates:
            printer.take(update)
            bar.update(update.finished)
    return printer.results()


class Printer:
    """Buffer of a stream's updates that prints texts in prompt order, the current one as it grows."""

    def __init__(self, prompts: Sequence[str], n: int, chat: bool):
        self._prompts, self._n, self._chat = prompts, n, chat
        self._last: dict[str, RequestOutput] = {}
        self._parts: dict[str, list[list[CompletionOutput]]] = {}
        self._turn = self._printed = 0

    def take(self, update: RequestOutput) -> None:
        """Store an update."""
        self._last[update.request_id] = update
        parts = self._parts.setdefault(update.request_id, [[] for _ in range(self._n)])
        for part in update.outputs:
            parts[part.index].append(part)

    def print(self) -> None:
        """Print the new text of the current request, and of later ones once it is complete."""
        while self._turn < len(self._prompts):
            name = sorted(self._parts, key=int)[self._turn : self._turn + 1]
            if not name or not self._print(name[0]):
                break
            self._turn, self._printed = self._turn + 1, 0

    def _print(self, name: str) -> bool:
        """Print the new text of the current request; return whether the request is complete."""
        parts, done = self._parts[name], self._last[name].finished
        if not self._printed and (self._n == 1 or done):
            prompt = self._prompts[self._turn]
            shown = f"\033[1m{prompt}\033[0m" if sys.stdout.isatty() else prompt
            print(shown, end="\n" if self._chat or self._n > 1 else "")
        if self._n == 1:
            print("".join(part.text for part in parts[0][self._printed :]), end="", flush=True)
            self._printed = len(parts[0])
            if done:
                print("\n")
        elif done:
            for index, sample in enumerate(parts):
                print(f"[{index}] {''.join(part.text for part in sample).strip()}")
            print()
        return done

    def results(self) -> list[RequestOutput]:
        """Return every request with its full text and tokens."""
        whole = []
        for name in sorted(self._parts, key=int):
            outputs = [
                replace(
                    sample[-1],
                    text="".join(part.text for part in sample),
                    token_ids=[token for part in sample for token in part.token_ids],
                )
                for sample in self._parts[name]
            ]
            whole.append(replace(self._last[name], outputs=outputs))
        return whole


def as_json(output: RequestOutput) -> dict[str, Any]:
    """Convert a request's output to the object that --json prints."""
    return {
        "prompt_token_ids": list(output.prompt_token_ids),
        "outputs": [
            {"index": c.index, "token_ids": list(c.token_ids), "text": c.text, "finish_reason": c.finish_reason}
            for c in output.outputs
        ],
        "num_cached_tokens": output.num_cached_tokens,
    }


def report(rates: str) -> None:
    """Print speed and memory on stderr."""
    print(f"{rates}; peak memory: {peak_memory()}", file=sys.stderr)


def peak_memory() -> str:
    """Return the peak memory of the host process, and of the device if that is separate."""
    import jax

    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    text = f"{host / 2**30:.2f} GiB host"
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return text if peak is None else f"{text}, {peak / 2**30:.2f} GiB {jax.devices()[0].platform}"
