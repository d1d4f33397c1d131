"""Keep sequences out of steps while the programs that they need are compiled, so that decoding goes on without them.

A prefill without its programs is taken back, and its sequences wait (`Scheduler.postpone`). A sequence that would need
a larger decode step, which is not compiled, stays out of it (`Rows.held`). A plan that cannot be reduced to
compiled programs is packed, and waits for them (`Engine.is_compiling`).
"""

from collections.abc import Callable, Iterable

import numpy as np

from jaxinfer.engine.request import Sequence
from jaxinfer.engine.runner.flight import Compilations, are_done, check_compiled
from jaxinfer.engine.runner.programs import CompilationError
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.engine.sequence_state import Status


class Compiling:
    """Tracker of the programs that postponed and held sequences wait for."""

    def __init__(self, runner: Runner, scheduler: Scheduler, fail: Callable[[Sequence, str], None]):
        """Track programs of a runner.

        Args:
            runner, scheduler: of the engine.
            fail: ends a sequence in error.
        """
        self._runner, self._scheduler, self._fail = runner, scheduler, fail
        self._decoding: Compilations = {}
        """Programs that the held rows wait for."""

    @property
    def waits(self) -> bool:
        """Whether any sequence waits."""
        return bool(self._scheduler.postponed) or bool(self._scheduler.rows.held.any())

    def update(self) -> None:
        """Choose the rows that stay out of the next decode step, and end sequences whose program did not compile."""
        scheduler = self._scheduler
        for one in scheduler.postponed:
            if are_done(one.compilations):
                one.ready = True
                self._check(one.compilations, one.sequences)
        held = np.flatnonzero(scheduler.rows.held)
        if len(held) and are_done(self._decoding):
            self._check(self._decoding, [scheduler.rows.running[row] for row in held])
        scheduler.rows.held[:] = False
        rows = scheduler.decodable()
        joining = ~scheduler.rows.stepped[rows]
        if not joining.any() or joining.all():
            return
        self._decoding = self._missing(rows)
        if self._decoding and not self._missing(rows[~joining]):
            scheduler.rows.held[rows[joining]] = True

    def _missing(self, rows: np.ndarray) -> Compilations:
        scheduler = self._scheduler
        samples = [scheduler.rows.running[row] for row in rows.tolist()]
        return self._runner.missing_to_decode(samples, rows, scheduler.manager.tables)

    def _check(self, compilations: Compilations, sequences: Iterable[Sequence]) -> None:
        """End the sequences in error if the programs that they wait for could not be compiled."""
        try:
            check_compiled(compilations)
        except CompilationError as error:
            for sequence in [s for s in sequences if s.status is not Status.FINISHED]:
                self._fail(sequence, str(error))
