"""Run an engine on a thread of its own, so that nothing can interrupt it in the middle of a step.

Python raises KeyboardInterrupt, and whatever a signal handler raises, between any two bytecodes of the main thread. The
garbage collector closes dropped streams between any two bytecodes of the thread that happens to allocate. Neither may
touch an engine in the middle of a step. So callers never touch the engine: they put commands into a queue, which is
emptied between steps, and wait for the reply. A caller that is interrupted stops waiting, and its requests are aborted.
"""

import atexit
import os
import threading
from collections.abc import Callable, Iterable
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Protocol, runtime_checkable
from weakref import WeakSet

from jaxinfer.engine.engine import Engine
from jaxinfer.engine.request import Request
from jaxinfer.errors import EngineClosedError

CLOSED = "this LLM is closed; make a new one"
TURN = 0.1
"""Seconds between checks of a waiting caller that the thread is alive; its progress bar is redrawn as often."""
ACKNOWLEDGE = 0.005
"""Seconds that `abort` waits for the engine to process it; after a longer step it is processed without a waiter."""

AT_EXIT = 10.0
"""Seconds to wait for a running step at interpreter exit: JAX must not be torn down while it runs."""

WAKE = "wake"
"""Command that does nothing: the step that waited for a compilation may go on."""

Reply = tuple[Any, BaseException | None]


@runtime_checkable
class Replies(Protocol):
    """Where the engine thread puts replies: a queue, or an object that passes them on without blocking."""

    def put(self, reply: Reply) -> None:
        """Take a reply."""
        ...


def take_reply(replies: SimpleQueue[Any], alive: Callable[[], bool], show: Callable[[], None] = lambda: None) -> Any:
    """Wait for a reply and return it; `show` runs ten times a second.

    Raises:
        EngineClosedError: no reply can come, as the engine threads have ended.
    """
    while True:
        try:
            return replies.get(timeout=TURN)
        except Empty:
            if not alive() and replies.empty():
                raise EngineClosedError(CLOSED) from None
            show()


class Call:
    """The requests of one caller, and the condition until which the engine steps for it."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.busy: Callable[[], bool] = bool
        """While driven: returns whether the caller still waits for results."""
        self.replies: Any = SimpleQueue()


class Lease:
    """A caller's handle on its call; the requests are aborted when the last reference is dropped.

    `release` is the put method of a queue, a single C call that neither a signal nor the garbage collector can
    interrupt.
    """

    release: Callable[[Any], None] | None = None
    """None where an interrupt came before the call began."""

    def __init__(self, commands: SimpleQueue[Any]):
        self.call = Call()
        self.release = commands.put

    def __del__(self) -> None:
        if self.release is not None:
            self.release(self.call)


class EngineThread:
    """Owner of an engine: takes commands between steps, and steps while callers wait for results.

    All methods may be called from any thread but the engine's own.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._commands: SimpleQueue[Any] = SimpleQueue()
        self._driven: list[Call] = []
        self._process = os.getpid()
        engine.compile_aside(partial(self._commands.put, WAKE))
        self._thread = threading.Thread(target=self._run, name="jaxinfer engine", daemon=True)
        self._thread.start()
        _threads.add(self)

    def lease(self) -> Lease:
        """Begin a call. The caller holds the lease until it has its results, and must always release it."""
        return Lease(self._commands)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function between two steps, return its result and raise its error.

        Raises:
            EngineClosedError: the thread has ended.
            RuntimeError: called on the engine's own thread, by a finalizer or a callback that runs within a step.
        """
        replies: SimpleQueue[Reply] = SimpleQueue()
        self._check_caller()
        self._commands.put((function, arguments, replies))
        return self._wait(replies)

    def add(self, call: Call, requests: Iterable[Request]) -> None:
        """Queue requests of a call; raises as `Engine.add`."""

        def queue(several: list[Request]) -> None:
            for request in several:
                self.engine.add(request)
                call.requests.append(request)

        self.run(queue, list(requests))

    def drive(self, call: Call, busy: Callable[[], bool]) -> None:
        """Step the engine until `busy`, called on its thread after each step, returns False.

        It does not wait: `call.replies` gets the reply, or the error of an engine that has failed or was closed.
        """
        self._check_caller()
        call.busy = busy
        self._commands.put((self._drive, (call,), None))

    def post(self, function: Callable[..., Any], *arguments: Any, done: Replies) -> None:
        """Call a function between two steps without waiting; `done` gets its result or error on the engine thread."""
        self._check_caller()
        self._commands.put((function, arguments, done))

    def step_for(self, call: Call) -> None:
        """Step until `call.busy` returns False, then reply to the call; runs on the engine thread, does not wait."""
        if call not in self._driven:
            self._driven.append(call)

    def abort(self, ids: list[str]) -> None:
        """Abort requests before the next step, and wait up to `ACKNOWLEDGE` seconds for it."""
        replies: SimpleQueue[Reply] = SimpleQueue()
        self._commands.put((self._abort, (ids,), replies))
        if threading.current_thread() is not self._thread:
            try:
                replies.get(timeout=ACKNOWLEDGE)
            except Empty:
                pass

    def close(self) -> None:
        """Abort all requests, drop the cache and end the thread; raises as `Engine.close`.

        On the engine's own thread, where a finalizer may call it, it returns without waiting.
        """
        if threading.current_thread() is self._thread:
            self._commands.put((self._close, (), None))
            self.stop()
            return
        try:
            self.run(self._close)
        finally:
            self.stop()
            self._thread.join()

    def stop(self) -> None:
        """End the thread after the queued commands; waiting callers get EngineClosedError."""
        self._commands.put(None)

    def join(self, timeout: float) -> None:
        """Wait at most `timeout` seconds for the thread to end."""
        self._thread.join(timeout)

    @property
    def alive(self) -> bool:
        """Whether the thread is running."""
        return self._thread.is_alive()

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one that the thread runs in."""
        return os.getpid() != self._process

    def _check_caller(self) -> None:
        if self.forked:
            raise EngineClosedError(
                f"this LLM was made in process {self._process}, and this one is a fork of it: JAX's threads and the "
                "engine's are not copied. Make the LLM in the process that uses it, and start processes with "
                "multiprocessing's method 'spawn'"
            )
        if threading.current_thread() is self._thread:
            raise RuntimeError(
                "an LLM was called from its own engine thread; finalizers and callbacks may only call abort and close"
            )

    def _wait(self, replies: SimpleQueue[Reply]) -> Any:
        result, error = take_reply(replies, self._thread.is_alive)
        if error is not None:
            raise error
        return result

    def _run(self) -> None:
        """Take commands and, unless paused, step until stopped."""
        while self._take_commands():
            if self._driven:
                self._step()
        self._fail_calls(EngineClosedError(CLOSED))
        del self.engine  # and with it weights and cache: here, as an interrupt may end the wait of `close`

    def _take_commands(self) -> bool:
        """Run the queued commands; return False to stop.

        Waits for a command while there is nothing to step for, the engine is paused, or the next step's programs are
        compiled.
        """
        waits = not self._driven or self.engine.is_compiling or self.engine.control.paused
        while True:
            try:
                command = self._commands.get(block=waits)
            except Empty:
                return True
            waits = False
            if command is None:
                return False
            if command is WAKE:
                continue
            if isinstance(command, Call):
                self._abandon(command)
                continue
            function, arguments, replies = command
            try:
                result, error = function(*arguments), None
            except BaseException as raised:
                result, error = None, raised
            if replies is not None:
                replies.put((result, error))
            # This frame must not keep a command's objects (a module, a caller's results) alive while it waits for the
            # next.
            del command, function, arguments, replies, result, error

    def _drive(self, call: Call) -> None:
        if self._waits(call):
            self._driven.append(call)

    def _step(self) -> None:
        """Run a step and reply to the callers whose results it completed."""
        try:
            self.engine.step()
        except BaseException as error:
            self._fail_calls(error)
            return
        self._driven[:] = [call for call in self._driven if self._waits(call)]

    def _close(self) -> None:
        """Close the engine; waiting callers get EngineClosedError, not the results of their aborted requests."""
        self._fail_calls(EngineClosedError(CLOSED))
        self.engine.close()

    def _fail_calls(self, error: BaseException) -> None:
        for call in self._driven:
            call.replies.put((None, error))
        self._driven.clear()

    def _waits(self, call: Call) -> bool:
        """Return whether a call still waits for requests; otherwise reply to it."""
        try:
            if call.busy():
                return True
            self.engine.check_not_lost(call.requests)
            call.replies.put((None, None))
        except BaseException as error:
            call.replies.put((None, error))
        return False

    def _abandon(self, call: Call) -> None:
        """Abort the unfinished requests of a call whose caller has gone."""
        if call in self._driven:
            self._driven.remove(call)
        self._abort([request.id for request in call.requests if not request.finished])
        call.requests.clear()

    def _abort(self, ids: Iterable[str]) -> None:
        for one in ids:
            self.engine.abort(one)


_threads: WeakSet[EngineThread] = WeakSet()


@atexit.register
def _stop_all() -> None:
    """Stop the threads of LLMs that were not closed."""
    threads = list(_threads)
    for one in threads:
        one.stop()
    for one in threads:
        one.join(AT_EXIT)
