"""Recovery of an engine from a failed step: rebuild the cache and recompute all sequences, or end them."""

import logging
from typing import Any

from jaxinfer.engine.beam_search import branching
from jaxinfer.engine.request import Sequence
from jaxinfer.engine.runner.programs import CompilationError
from jaxinfer.engine.sequence_state import Status
from jaxinfer.errors import DraftError, EngineDeadError, JointStepError

log = logging.getLogger(__name__)

RETRIES = 2
"""Maximum number of consecutive failed steps after which a sequence is recomputed; then it ends in error."""


class Recovery:
    """Recovers an `engine.engine.Engine`, or marks it as dead."""

    def __init__(self, engine: Any):
        self._engine = engine

    def start_over(self, error: BaseException) -> None:
        """Recover from a failed step, or mark the engine as dead if that fails.

        Raises:
            EngineDeadError: recovery failed.
            DistributedError: several processes serve the model.
        """
        engine = self._engine
        try:
            self.recover(error)
        except Exception as second:
            if engine.runner.leader is not None:
                raise
            self.kill(
                f"a step failed ({type(error).__name__}: {error}), and starting over failed as well "
                f"({type(second).__name__}: {second})"
            )
            raise EngineDeadError(engine.dead) from error

    def kill(self, reason: str) -> None:
        """End every request in error and drop the cache; no further step can run."""
        engine = self._engine
        engine.dead = engine.describe(f"the engine is dead: {reason}; close this LLM and make a new one")
        log.error("%s", engine.dead)
        requests = list(engine.requests.values())
        engine.requests.clear()
        engine.start()
        engine.control.paused = engine.control.pausing = False
        for request in requests:
            request.error = engine.dead
            for sequence in request.sequences:
                if sequence.status is not Status.FINISHED:
                    sequence.status, sequence.finish_reason, sequence.row = Status.FINISHED, "error", -1
            if request.on_finish is not None:
                request.on_finish(request)

    def recover(self, error: BaseException) -> None:
        """Rebuild the cache, which a failed step may have consumed by donation, and requeue all sequences.

        Sequences whose steps failed repeatedly end in error, so that the others can continue. An interrupt is not
        counted as a failure, but it may have come at any point. With several processes none of them continues.
        """
        engine, leader = self._engine, self._engine.runner.leader
        self._log(error, "the cache is rebuilt" if leader is None else "all processes end")
        again = self._unfinished()
        # If planning itself failed, any sequence may be the cause, unless it is the draft model. A joint step that
        # failed is not tried again, so no sequence counts its failure.
        suspects = set(engine.pipeline.suspect.sequences or again) if isinstance(error, Exception) else set()
        if isinstance(error, DraftError):
            suspects, engine.drafts = set(), False
            log.error("%s", engine.describe("the draft model drafts no more; requests continue without it"))
        if isinstance(error, JointStepError):
            suspects = set()
            log.error("%s", engine.describe("prefills and decodes of this size run as two steps from now on"))
        blamed = {id(s): s.count_failure() for s in suspects}
        for sequence in again:
            sequence.status, sequence.row, sequence.computed, sequence.pending = Status.WAITING, -1, 0, 0
        preempted, last = engine.scheduler.preempted, engine.scheduler.waiting.last_arrival
        engine.start()
        engine.scheduler.preempted, engine.scheduler.waiting.last_arrival = preempted, last
        engine.scheduler.waiting.extend(again)
        if leader is None:
            engine.runner.reset()  # after all host state is consistent: this raises if the device is lost
        for sequence in again:
            if sequence.status is Status.WAITING:
                self._resume(sequence, blamed.get(id(sequence), 0), error)
        if leader is not None:
            leader.give_up(error)

    def _unfinished(self) -> list[Sequence]:
        """Return all sequences that have not finished, oldest first; remove requests that had finished."""
        requests = self._engine.requests
        for request in [request for request in requests.values() if request.finished]:
            del requests[request.id]  # an interrupt came while the request was ending
            if request.on_finish is not None:
                request.on_finish(request)
        for request in requests.values():
            if request.beams is not None:
                branching.restore(request)
        again = [s for request in requests.values() for s in request.sequences if s.status is not Status.FINISHED]
        return sorted(again, key=lambda s: s.age)

    def _resume(self, sequence: Sequence, failures: int, error: BaseException) -> None:
        """End a requeued sequence if it failed too often or had already reached its end."""
        endings = self._engine.endings
        if sequence.request.beams is not None and not sequence.request.beams.state.running:
            endings.end_search(sequence.request)
            return
        reason = sequence.end() if sequence.made else None
        if reason is not None:
            endings.finish(sequence, reason)
        elif failures and isinstance(error, CompilationError):  # it would fail again
            endings.fail(sequence, str(error))
        elif failures > RETRIES:
            endings.fail(sequence, f"its step failed {failures} times: {type(error).__name__}: {error}")
        elif sequence.length == sequence.stage_limit:
            sequence.start_over()

    def _log(self, error: BaseException, fate: str) -> None:
        """Log a failed step or an interrupt."""
        if isinstance(error, Exception):
            log.error("%s", self._engine.describe(f"a step failed ({type(error).__name__}: {error}); {fate}"))
        else:
            log.info("%s", self._engine.describe(f"interrupted ({type(error).__name__}); {fate}"))
