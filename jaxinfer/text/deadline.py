"""Run untrusted but pure Python code with a time limit."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")


class _Worker(threading.Thread, Generic[_T]):
    def __init__(self, work: Callable[[], _T]) -> None:
        super().__init__(name="jaxinfer-deadline", daemon=True)
        self._work = work
        self._ending = threading.Lock()
        self._ended = False
        self.result: _T | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self._work()
        except BaseException as error:
            self.error = error
        with self._ending:
            self._ended = True

    def stop(self) -> None:
        """Ask the interpreter to raise inside the worker at its next byte code, unless it is done.

        SystemExit, because `except Exception` lets it pass, and a thread that it ends does so silently.
        """
        # Never waits for good: the worker may have been ended while it held the lock.
        if not self._ending.acquire(timeout=0.05):
            return
        try:
            if not self._ended and self.ident is not None:
                raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
                raise_in(ctypes.c_ulong(self.ident), ctypes.py_object(SystemExit))
        finally:
            self._ending.release()


def run_with_deadline(work: Callable[[], _T], seconds: float) -> Any:
    """`work()`, in a thread of its own, or TimeoutError after `seconds`.

    The thread is made to end by an exception raised inside it, so it leaves no work behind. One call into C
    is not interrupted: `work` must not contain calls of unbounded length.

    Raises:
        TimeoutError: it took longer.
        Exception: whatever `work` raised.
    """
    worker = _Worker(work)
    worker.start()
    try:
        worker.join(seconds)
        late = worker.is_alive()
    finally:
        # Also on KeyboardInterrupt. Repeated: the code may be where exceptions are ignored (a finaliser).
        for _ in range(20):
            if not worker.is_alive():
                break
            worker.stop()
            worker.join(0.05)
    if late:
        raise TimeoutError
    if worker.error is not None:
        raise worker.error
    return worker.result
