"""Hold the steps of an engine until a test has seen or done something, so that no result depends on how fast they
are."""

import time
from collections.abc import Callable
from threading import Event
from typing import Any

from jaxinfer.engine.engine import Engine

PATIENCE = 120.0
"""Seconds until a wait fails. On a busy machine milliseconds become seconds; only a fault takes longer than this."""

IN_VAIN = "what the steps are held for does not come"


def always() -> bool:
    """Return True."""
    return True


def never() -> bool:
    """Return False."""
    return False


def wait_until(condition: Callable[[], Any], alive: Callable[[], bool] = always) -> None:
    """Poll until a condition holds.

    Args:
        condition: what to wait for.
        alive: whether it can still come; False fails at once.
    """
    until = time.monotonic() + PATIENCE
    while not condition():
        assert alive() or condition(), "it ended before the condition held"
        assert time.monotonic() < until, f"the condition does not hold after {PATIENCE:.0f} s"
        time.sleep(0.001)


def begun(engine: Engine) -> bool:
    """Whether a sequence of an engine has its first token."""
    return any(sequence.made for request in engine.requests.values() for sequence in request.sequences)


class Held:
    """Context in which an engine's steps do nothing from one moment on until another; commands are taken meanwhile.

    Leaving the context lets the steps go on, and fails if what they were held for has not come.
    """

    def __init__(self, engine: Engine, when: Callable[[], Any] = always, until: Callable[[], Any] = never):
        """Describe what is held; both conditions are looked at before each step, on the engine's thread.

        Args:
            engine: the engine.
            when: the steps before this first holds are taken.
            until: the steps after this first holds are taken as well; by default those after `release`.
        """
        self._engine, self._when, self._until = engine, when, until
        self._reached, self._released = Event(), Event()
        self._in_vain = False

    def __enter__(self) -> "Held":
        self._patched = "step" in vars(self._engine)
        self._step = self._engine.step
        self._engine.step = self._hold_or_step
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exception: object) -> None:
        self.release()
        if self._patched:
            self._engine.step = self._step
        else:
            del self._engine.step
        # The error of a step ends its requests, and where nobody waits for these, nobody hears of it.
        assert kind is not None or not self._in_vain, IN_VAIN

    def wait(self, alive: Callable[[], bool] = always) -> None:
        """Wait until the steps are held, as `wait_until`."""
        wait_until(self._reached.is_set, alive)

    def release(self) -> None:
        """Let the steps go on."""
        self._released.set()

    def _hold_or_step(self) -> None:
        if not self._reached.is_set() and self._when():
            self._began = time.monotonic()
            self._reached.set()
        if not self._reached.is_set() or self._released.is_set():
            return self._step()
        if self._until():
            self.release()
            return self._step()
        self._in_vain = time.monotonic() > self._began + PATIENCE
        assert not self._in_vain, IN_VAIN
        self._released.wait(0.001)
