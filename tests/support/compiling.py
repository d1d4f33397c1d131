"""Compilations that take as long as a test wants: programs that are compiled already and seem to be missing."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from jaxinfer.engine.runner.batch import Bucket
from jaxinfer.engine.runner.programs import Key, Programs


class Gate:
    """Programs of a runner, each of which seems to be compiled from its first use until `release`."""

    def __init__(self, programs: Programs, chosen: Callable[[Key], bool] = lambda key: isinstance(key, Bucket)):
        """Wrap programs.

        Args:
            programs: the real ones.
            chosen: whether a program seems to be missing at its first use.
        """
        self._programs, self._chosen = programs, chosen
        self.pending: dict[Key, Future[None]] = {}
        self.ready: set[Key] = set()
        """Programs that do not seem to be missing any more."""
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._programs, name)

    def start(self, key: Key, done: Callable[[], None]) -> Future[None] | None:
        """Do as `Programs.start`."""
        with self._lock:
            if key in self.ready or not self._chosen(key):
                return None
            future = self.pending.setdefault(key, Future())
        future.add_done_callback(lambda _: done())
        return future

    def release(self, error: Exception | None = None, key: Key | None = None) -> None:
        """End one or all compilations: programs are ready from now on, or an error is raised and the next use begins
        another one.
        """
        for one in list(self.pending) if key is None else [key]:
            with self._lock:
                future = self.pending.pop(one)
                if error is None:
                    self.ready.add(one)
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)


def is_prefill(key: Key) -> bool:
    """Whether a key is that of a prefill."""
    return isinstance(key, Bucket) and key.kind == "prefill"


def is_decode(key: Key) -> bool:
    """Whether a key is that of a decode step."""
    return isinstance(key, Bucket) and key.kind == "decode"
