"""Compilations that take as long as a test wants: programs that are compiled already and seem to be missing."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from jaxinfer.engine.engine import Engine
from jaxinfer.engine.request import Request
from jaxinfer.engine.runner.batch import Bucket
from jaxinfer.engine.runner.keys import Encode, EncodeCross, Key
from jaxinfer.engine.runner.programs import Programs


class Gate:
    """Programs of a runner, each of which seems to be compiled from its first use until `release`."""

    def __init__(
        self,
        programs: Programs,
        chosen: Callable[[Key], bool] = lambda key: isinstance(key, Bucket),
        *,
        substitutes: bool = False,
    ):
        """Wrap programs.

        Args:
            programs: the real ones.
            chosen: whether a program seems to be missing at its first use.
            substitutes: whether a larger decode step may take the place of one that is missing.
        """
        self._programs, self._chosen, self._substitutes = programs, chosen, substitutes
        self.pending: dict[Key, Future[None]] = {}
        self.ready: set[Key] = set()
        """Programs that do not seem to be missing any more."""
        self.failed: set[Key] = set()
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._programs, name)

    def start(self, key: Key, done: Callable[[], None]) -> Future[None] | None:
        """Do as `Programs.start`."""
        with self._lock:
            if key in self.ready or (key not in self.pending and not self._chosen(key)):
                return None
            future = self.pending.setdefault(key, Future())
        future.add_done_callback(lambda _: done())
        return future

    def has(self, key: Key) -> bool:
        """Do as `Programs.has`."""
        return key in self.ready or (key not in self.pending and not self._chosen(key))

    def covering(self, bucket: Bucket) -> Bucket | None:
        """Do as `Programs.covering`."""
        if not self._substitutes:
            return None
        return self._programs.covering(bucket, lambda key: key in self.ready or not self._chosen(key))

    def release(self, error: Exception | None = None, key: Key | None = None) -> None:
        """End one or all compilations: programs are ready from now on, or an error is raised and the next use begins
        another one.
        """
        for one in list(self.pending) if key is None else [key]:
            with self._lock:
                future = self.pending.pop(one)
                if error is None:
                    self.ready.add(one)
                    self.failed.discard(one)
                else:
                    self.failed.add(one)
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


def finish(engine: Engine, gate: Gate) -> None:
    """Step until all requests have ended, with all programs compiled; check that nothing stays allocated."""
    for _ in range(500):
        if not engine.has_work:
            break
        gate.release()
        engine.step()
    assert not engine.has_work and not engine.requests, "nothing goes on"
    assert int(engine.manager.pool.num_held) == 0
    assert engine.scheduler.encoder_cache.pool.num_pinned == 0


def go_on(
    engine: Engine, monkeypatch: Any, running: Sequence[Request], late: Sequence[Request], *, rounds: int = 3
) -> int:
    """Run requests, and then others for which the programs of encoders and prefills seem to be missing.

    Checks that the first ones go on meanwhile. After each round the programs seem to be there for one step.

    Returns:
        How often a prefill was taken back.
    """
    gate = Gate(
        engine.runner.programs, lambda key: armed and (is_prefill(key) or isinstance(key, Encode | EncodeCross))
    )
    armed, taken_back = False, 0
    monkeypatch.setattr(engine.runner, "programs", gate)
    monkeypatch.setattr(engine.runner, "compiled_aside", lambda: None)
    for request in running:
        engine.add(request)
    while not all(sequence.made > 1 or sequence.candidates for r in running for sequence in r.sequences[:1]):
        engine.step()
    armed = True
    for request in late:
        engine.add(request)
    for _ in range(rounds):
        before = [_made(request) for request in running]
        for _ in range(3):
            engine.step()
        if engine.scheduler.postponed:
            taken_back += 1
            assert gate.pending and not engine.is_held
            moved = [r.finished or _made(r) > was for r, was in zip(running, before, strict=True)]
            assert all(moved), "decoding stands still"
        gate.release()
        engine.step()
        gate.ready.clear()
    armed = False
    finish(engine, gate)
    return taken_back


def _made(request: Request) -> int:
    return sum(sequence.made for sequence in request.sequences)
