"""Pipeline of steps: a step is dispatched before the tokens of the one before it are read."""

import time
from functools import partial

from jaxinfer.engine.commit import Committer
from jaxinfer.engine.compiling import Compiling
from jaxinfer.engine.endings import Endings
from jaxinfer.engine.metrics import Metrics
from jaxinfer.engine.plan import Plan
from jaxinfer.engine.runner.flight import Flight
from jaxinfer.engine.runner.multi_step import MultiStep
from jaxinfer.engine.runner.programs import CompilationError
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.engine.sequence_state import Status

STUCK = (
    "the cache has no room for this request although nothing else is running, and the check at queueing passed; this "
    "is a bug of the engine, please report it with the request and the engine's settings"
)


class Pipeline:
    """The step in flight, and the next one while it waits for its programs."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        endings: Endings,
        committer: Committer,
        multi_step: MultiStep,
        metrics: Metrics,
    ):
        self.flight: Flight | None = None
        """The step that was dispatched last, until its tokens are read."""
        self.held: Flight | None = None
        """The next step, while programs that it needs are compiled. Nothing is scheduled until it is dispatched."""
        self.suspect = Plan()
        """The plan that is scheduled, dispatched or committed at the moment: if that fails, it may be the cause."""
        self._runner, self._scheduler, self._endings, self._committer = runner, scheduler, endings, committer
        self._multi_step, self._metrics = multi_step, metrics
        self._compiling = Compiling(runner, scheduler, endings.fail)

    @property
    def has_work(self) -> bool:
        """Whether a step is in flight or waits for its programs."""
        return self.flight is not None or self.held is not None

    @property
    def is_compiling(self) -> bool:
        """Whether the next step waits for programs that are being compiled aside."""
        held = self.held  # callers ask on threads of their own
        return held is not None and not held.compiled

    def advance(self) -> Plan:
        """Dispatch the next step, or the one that has waited for its programs; return its plan, empty if there is none.

        The previous step is committed when the next one has been scheduled.
        """
        self.suspect = Plan()
        return self._next() if self.held is None else self._dispatch_held()

    def _next(self) -> Plan:
        """Schedule and run a plan, then commit the previous one."""
        if self._scheduler.needs_tokens or (self.flight is not None and self.flight.plan.drafts is not None):
            self.commit()
        idle = self.flight is None
        self._compiling.update()
        plan = self._scheduler.schedule(self._multi_step.steps)
        flight = self._run(plan) if plan else None
        self.commit()
        if flight is None:
            if idle and not self._compiling.waits:
                self._end_stuck()
            return plan
        if flight.compilations:
            self.held = flight
            self.drop_if_unwanted()
            return Plan()
        self._runner.sample_pending(flight)  # with masks that depend on the tokens just read
        self.flight = flight
        return flight.plan

    def _run(self, plan: Plan) -> Flight:
        self.suspect, now = plan, time.monotonic()
        flight = self._runner.run(plan, self._scheduler.manager.tables, partial(self._scheduler.postpone, plan))
        self.suspect = plan = flight.plan
        for chunk in plan.chunks:
            if chunk.sequence.request.first_scheduled_time is None:
                chunk.sequence.request.first_scheduled_time = now
                self._metrics.count_hits(chunk.sequence.request)
        if flight.compilations:
            self._scheduler.hold(plan)
        else:
            self._dispatched(plan)
        return flight

    def _dispatched(self, plan: Plan) -> None:
        self._scheduler.dispatched(plan)
        self._metrics.count_inputs(plan)

    def _dispatch_held(self) -> Plan:
        """Dispatch the plan that has waited for its programs."""
        held, self.held = self.held, None
        self.suspect = held.plan
        try:
            self._runner.dispatch(held)
        except CompilationError as error:
            self.suspect = held.needing(error.key)
            raise
        self._dispatched(held.plan)
        self._runner.sample_pending(held)
        self.flight = held
        return held.plan

    def commit(self) -> None:
        """Commit the step in flight, if there is one."""
        flight, self.flight = self.flight, None
        if flight is None:
            return
        self.suspect = flight.plan
        late = flight.results[-1].ready
        self._committer.commit(flight)
        plan, drafter = flight.plan, self._scheduler.drafter
        decodes_alone = plan.drafts is None and not plan.chunks
        seconds = self._multi_step.note(plan.steps * decodes_alone, flight.started, time.monotonic(), late=late)
        if drafter is not None:
            drafter.note_step(None if plan.chunks else seconds / plan.steps)

    def drop_if_unwanted(self) -> None:
        """Drop the plan that waits for its programs if all of its sequences have ended, as no other may wait for it."""
        if self.held is None or any(s.status is not Status.FINISHED for s in self.held.plan.sequences):
            return
        self._scheduler.drop(self.held.plan)
        self.held = None

    def _end_stuck(self) -> None:
        """Fail the first sequence if nothing was planned and nothing is in flight: it would wait forever."""
        scheduler = self._scheduler
        stuck = next(iter([*scheduler.rows.active, *scheduler.waiting]), None)
        if stuck is not None and scheduler.waiting.last_arrival is None:
            self._endings.fail(stuck, STUCK)
