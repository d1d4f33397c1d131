"""Pause an engine, put it to sleep, and replace its weights between two steps."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from jaxinfer.engine.request import Sequence
from jaxinfer.engine.sequence_state import Status
from jaxinfer.errors import EngineDeadError
from jaxinfer.outputs import WeightSegment

PAUSE_MODES = (KEEP, ABORT, WAIT) = ("keep", "abort", "wait")
LEVELS = (1, 2)
"""Levels of sleep: without the cache; without the weights, too."""


class EngineControl:
    """Pauses, sleep and weight versions of an `engine.engine.Engine`. All methods run on the engine thread."""

    def __init__(self, engine: Any):
        self._engine = engine
        self.paused = False
        """Whether no step runs until `resume`."""
        self.pausing = False
        """Whether no more steps are planned, while a planned one waits for its programs."""
        self.level = 0
        """Level of sleep; 0 while awake."""
        self.version = 0
        """Number of times that weights were replaced."""

    @property
    def weightless(self) -> bool:
        """Whether the weights were dropped (`sleep(level=2)`) and have not been replaced since."""
        return self._engine.runner.params[0] is None

    def stop(self, mode: str) -> None:
        """Plan no more steps, and abort all requests if the mode is "abort"."""
        self.check_awake("pause")
        self.pausing = not self.paused
        for name in list(self._engine.requests) if mode == ABORT else ():
            self._engine.abort(name)

    def stopped(self) -> bool:
        """Pause and return True once the step that was planned last has been dispatched; its tokens are kept."""
        if self.paused or not self.pausing:
            return True
        if self._engine.is_held:
            return False
        self._engine.settle()
        self._engine.scheduler.waiting.last_arrival = None
        self.paused, self.pausing = True, False
        return True

    def drain(self) -> None:
        """Start only requests that are already queued."""
        self.check_awake("pause")
        if self.paused:
            raise RuntimeError("pause('wait'): the engine is paused, so no request would end; resume() first")
        arrivals = [request.arrival for request in self._engine.requests.values()]
        self._engine.scheduler.waiting.last_arrival = max(arrivals, default=-1)

    def drained(self) -> bool:
        """Pause and return True once all requests from before `drain` have ended."""
        last = self._engine.scheduler.waiting.last_arrival
        if last is None:
            return True
        if any(request.arrival <= last for request in self._engine.requests.values()):
            return False
        self.pausing = True
        return self.stopped()

    def give_up(self, *, paused: bool) -> None:
        """Cancel a pause whose caller was interrupted while it waited; `paused`: whether it was paused before."""
        self._engine.scheduler.waiting.last_arrival, self.pausing, self.paused = None, False, paused

    def resume(self, *, recompute: bool) -> None:
        """Run steps again.

        Args:
            recompute: whether running sequences are computed again from their first token on.

        Raises:
            RuntimeError: the engine is not paused, or asleep.
        """
        self.check_awake("resume")
        if not self.paused:
            raise RuntimeError("resume: the engine is not paused")
        if recompute:
            for sequence in sorted(self._engine.scheduler.rows.active, key=lambda s: s.age, reverse=True):
                self._engine.scheduler.preempt(sequence)
        self.paused = False

    def sleep(self, level: int) -> None:
        """Free the cache and, at level 2, the weights; compiled programs stay.

        Raises:
            RuntimeError: requests are running, or the engine sleeps at this level or a deeper one already.
        """
        engine = self._engine
        self.check_sleep(level)
        engine.reset_prefix_cache()
        engine.runner.release()
        self.level = level
        if level == LEVELS[-1]:
            engine.runner.drop_weights()

    def check_sleep(self, level: int) -> None:
        """Check that the engine can sleep now; raises as `sleep`."""
        engine = self._engine
        engine.check_alive()
        if level <= self.level:
            raise RuntimeError(f"sleep(level={level}): the engine sleeps at level {self.level} already")
        if not engine.settle() or engine.requests:
            raise RuntimeError(
                f"sleep while {len(engine.requests)} request(s) are running or paused; finish or abort them first"
            )

    def wake_up(self) -> None:
        """Allocate the cache again.

        Raises:
            RuntimeError: the engine does not sleep.
        """
        self._engine.check_alive()
        if not self.level:
            raise RuntimeError("wake_up: the engine does not sleep")
        self._engine.runner.reset()
        self.level = 0

    def check_awake(self, what: str) -> None:
        """Check that the engine is alive and does not sleep.

        Raises:
            RuntimeError: the engine sleeps.
            EngineDeadError: it has failed.
        """
        self._engine.check_alive()
        if self.level:
            raise RuntimeError(f"{what}: the engine sleeps (level {self.level}); call wake_up() first")

    def check_serves(self) -> None:
        """Check that requests can be taken.

        Raises:
            RuntimeError: the engine sleeps, or has no weights.
            EngineDeadError: it has failed.
        """
        self.check_awake("requests cannot be served")
        if self.weightless:
            raise RuntimeError(
                "requests cannot be served: sleep(level=2) has dropped the weights; pass new ones with "
                "update_weights() first"
            )

    def check_idle(self, method: str) -> None:
        """Check that no step runs, and that none will be planned for a request that is there.

        Raises:
            RuntimeError: requests are running and not paused.
            EngineDeadError: no step can run.
        """
        self._engine.check_alive()
        if not self.paused and not self._engine.settle():
            raise RuntimeError(f"{method} while requests are running; pause(), or finish or abort them, first")

    def check_replaceable(self, *, partial: bool = False) -> None:
        """Check that weights can be replaced now.

        Raises:
            RuntimeError: requests are running, or some weights are to be kept that were dropped.
            EngineDeadError: no step can run.
        """
        self.check_idle("update_weights")
        if partial and self.weightless:
            raise RuntimeError("update_weights(partial=True): sleep(level=2) has dropped the weights; give all of them")

    def replace_weights(self, replace: Callable[[list[Any]], None], *, partial: bool = False) -> int:
        """Replace weights, and forget what was cached with the old ones; return their version.

        Paused sequences keep their own cache. No other request reuses it, because it is never published. Prompts that
        are not computed yet start over.

        Args:
            replace: replaces arrays in the list of parameters.
            partial: whether it keeps some of them.

        Raises:
            RuntimeError, EngineDeadError: as `check_replaceable`, or the replacement failed half way.
        """
        engine, scheduler = self._engine, self._engine.scheduler
        self.check_replaceable(partial=partial)
        try:
            replace(engine.runner.params)
        except BaseException as error:
            engine.recovery.kill(f"replacing its weights failed half way ({type(error).__name__}: {error})")
            raise EngineDeadError(engine.dead) from error
        self.version += 1
        for sequence in sorted(scheduler.rows.active, key=lambda s: s.age, reverse=True):
            if scheduler.rows.decoding[sequence.row]:
                scheduler.inflight.unregister(sequence, sequence.num_registered)
                sequence.stale = True
            else:
                scheduler.preempt(sequence)
        engine.reset_prefix_cache()
        for request in engine.requests.values():
            [first, *_] = request.sequences
            if first.status is Status.WAITING and not first.made:
                request.forget_prompt()
            for sequence in request.sequences:
                if sequence.status is not Status.FINISHED:
                    sequence.weight_changes = (*sequence.weight_changes, (sequence.made, self.version))
        return self.version


def weight_segments(sequence: Sequence) -> tuple[WeightSegment, ...]:
    """Return which output tokens of a sequence were computed with weights of which version."""
    starts = [(0, sequence.request.weight_version), *sequence.weight_changes, (sequence.made, -1)]
    return tuple(
        WeightSegment(version, start, stop) for (start, version), (stop, _) in pairwise(starts) if start < stop
    )
