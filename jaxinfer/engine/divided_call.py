"""The requests of one caller, divided over the engines that serve a model."""

import operator
from collections.abc import Callable, Collection, Iterable
from queue import SimpleQueue
from typing import Any

from jaxinfer.engine.engine_thread import EngineThread, take_reply
from jaxinfer.engine.request import Request


class DividedCall:
    """A call on one or several engine threads, which waits for whichever replies first.

    The caller must exhaust `release` in the end, by `list(call.release)`: a single call of C code, which neither a
    signal nor the garbage collector can interrupt. It aborts the requests that are unfinished, on all engines.
    """

    def __init__(self, threads: Collection[EngineThread]):
        self._replies: SimpleQueue[Any] = SimpleQueue()
        self._leases = {thread: thread.lease() for thread in threads}
        self._driven: set[EngineThread] = set()
        leases = list(self._leases.values())
        for thread, lease in self._leases.items():
            lease.call.replies = _Signed(self._replies, thread)
        self.release = map(operator.call, [lease.release for lease in leases], [lease.call for lease in leases])

    def add(self, thread: EngineThread, requests: Iterable[Request]) -> None:
        """Queue requests on one of the engines; raises as `Engine.add`."""
        thread.add(self._leases[thread].call, requests)

    def drive(self, thread: EngineThread, busy: Callable[[], bool]) -> None:
        """Step one of the engines until `busy`, called on its thread after each step, returns False."""
        self._driven.add(thread)
        thread.drive(self._leases[thread].call, busy)

    def wait(self, show: Callable[[], None] = lambda: None) -> EngineThread:
        """Wait until one of the driven engines is no longer busy, and return its thread.

        Args:
            show: runs ten times a second, and at the end.

        Raises:
            EngineError: an engine has failed for good.
            EngineClosedError: the engines were closed meanwhile.
        """
        thread, (_, error) = take_reply(self._replies, lambda: all(one.alive for one in self._driven), show)
        self._driven.discard(thread)
        if error is not None:
            raise error
        show()
        return thread

    def wait_for_all(self, show: Callable[[], None] = lambda: None) -> None:
        """Wait until none of the driven engines is busy; raises as `wait`."""
        while self._driven:
            self.wait(show)


class _Signed:
    """Stand-in for a queue of replies that notes from which thread each reply came."""

    def __init__(self, replies: SimpleQueue[Any], thread: EngineThread):
        self._replies, self._thread = replies, thread

    def put(self, reply: Any) -> None:
        self._replies.put((self._thread, reply))
