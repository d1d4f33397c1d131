"""The end of sequences and requests: with a finish reason, or in error."""

import time
from collections.abc import Callable

from jaxinfer.engine.beam_search import branching
from jaxinfer.engine.metrics import Metrics
from jaxinfer.engine.request import Request, Sequence
from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.engine.sequence_state import Status

NOT_FINITE = "the model's logits are not finite, or every token is masked"


class Endings:
    """Ends the sequences of an engine's requests, and removes a request once all of its sequences have ended."""

    def __init__(
        self,
        scheduler: Scheduler,
        requests: dict[str, Request],
        metrics: Metrics,
        describe: Callable[[str], str],
    ):
        """End sequences of a scheduler.

        Args:
            scheduler: has the sequences.
            requests: the engine's requests by id.
            metrics: count finished requests.
            describe: returns an error message with the engine's name.
        """
        self._scheduler, self._requests, self._metrics, self._describe = scheduler, requests, metrics, describe

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End a sequence in any state and release its row and blocks; does nothing if it has already finished."""
        if sequence.status is Status.FINISHED:
            return
        if reason != "error":
            self._scheduler.publisher.publish(sequence)
        self._scheduler.finish(sequence, reason)
        self._metrics.success[reason] = self._metrics.success.get(reason, 0) + 1
        request = sequence.request
        if request.finished:
            request.finished_time = time.monotonic()
            self._metrics.time(request)
            if request.on_finish is not None:
                request.on_finish(request)
            del self._requests[request.id]

    def fail(self, sequence: Sequence, message: str) -> None:
        """End a sequence in error and withdraw the blocks it wrote from the prefix index."""
        sequence.request.error = self._describe(message)
        if sequence.status is Status.RUNNING:
            manager = self._scheduler.manager
            manager.withdraw(sequence.digests[sequence.hit_blocks : sequence.published])
            if sequence.request.encoded is not None:
                manager.withdraw(sequence.request.encoded.digests)
        self.finish(sequence, "error")
        if sequence.request.beams is not None:
            for beam in branching.running(sequence.request):
                self.finish(beam, "error")

    def end_search(self, request: Request) -> None:
        """End all beams of a search that has its results, or none that is finite."""
        for beam in branching.running(request):
            if request.beams.best:
                self.finish(beam, "stop" if request.beams.best[0].stopped else "length")
            else:
                self.fail(beam, NOT_FINITE)
