"""The engine: schedules requests, runs steps and commits sampled tokens."""

import logging
import time
from collections.abc import Callable, Iterable

from jaxinfer.engine.commit import Committer
from jaxinfer.engine.control import EngineControl
from jaxinfer.engine.endings import Endings
from jaxinfer.engine.metrics import Metric, Metrics
from jaxinfer.engine.pipeline import Pipeline
from jaxinfer.engine.plan import Limits, Plan
from jaxinfer.engine.recorder import Recorder
from jaxinfer.engine.recovery import Recovery
from jaxinfer.engine.request import Request
from jaxinfer.engine.runner.multi_step import MultiStep
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.engine.sizing.capacity import Capacity
from jaxinfer.engine.sizing.settings import HostSettings
from jaxinfer.engine.speculation.drafter import Drafter
from jaxinfer.engine.speculation.model_drafter import ModelDrafter
from jaxinfer.errors import EngineDeadError, EngineError
from jaxinfer.functional.taps import EXPERTS
from jaxinfer.kv.contiguous import RowManager
from jaxinfer.kv.interface import CacheManager
from jaxinfer.kv.manager import BlockManager

log = logging.getLogger(__name__)


class Engine:
    """Continuous batching over a runner. Not thread-safe: in an `LLM` only its `EngineThread` calls it."""

    def __init__(self, runner: Runner, settings: HostSettings):
        self.runner, self.settings = runner, settings
        self.drafts = True
        """Whether the draft model, if there is one, is used; False after one of its steps has failed."""
        self.capacity = Capacity(runner, settings)
        self.requests: dict[str, Request] = {}
        self.metrics = Metrics(settings.log_interval)
        self.recorder: Recorder | None = None
        """Event log of the steps while a recording runs (`LLM.start_recording`)."""
        self.multi_step = MultiStep(settings.decode_steps)
        self.name = ""
        """Name of the engine in errors, if several serve the model."""
        self.dead: str | None = None
        """Why no further step can run, or None."""
        self.control = EngineControl(self)
        self.recovery = Recovery(self)
        self.start()

    def start(self) -> None:
        """Start with an empty cache and nothing scheduled; `requests` stay as they are."""
        shapes, settings = self.runner.shapes, self.settings
        self.manager = self._make_manager()
        limits = Limits(
            settings.token_budget,
            shapes.prefill_rows,
            settings.block_sharing,
            shapes.feature_slots,
            max(shapes.cross_buckets, default=0),
            whole_prompts=EXPERTS in shapes.capture,
        )
        self.scheduler = Scheduler(self.manager, limits, self._make_drafter())
        self.endings = Endings(self.scheduler, self.requests, self.metrics, self.describe)
        self.committer = Committer(self.runner, self.scheduler, self.endings, self.metrics)
        self.pipeline = Pipeline(
            self.runner, self.scheduler, self.endings, self.committer, self.multi_step, self.metrics
        )

    def _make_drafter(self) -> Drafter | None:
        config, runner = self.settings.speculative, self.runner
        if config is None:
            return None
        if runner.program.draft is not None:
            return ModelDrafter(config, runner, self.manager) if self.drafts else None
        return Drafter(config, runner.shapes.verify_buckets[-1], runner.lacks_to_verify)

    def _make_manager(self) -> CacheManager:
        shapes, settings = self.runner.shapes, self.settings
        if shapes.contiguous:
            return RowManager(shapes.regions, shapes.block_size, self.runner.program.layout.kinds, shapes.state_slots)
        return BlockManager(
            settings.pool_blocks,
            shapes.rows,
            shapes.width,
            shapes.block_size,
            prefix_caching=settings.prefix_caching,
            kinds=self.runner.program.layout.kinds,
            state_slots=shapes.state_slots,
        )

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self.pipeline.has_work or self.scheduler.has_work

    @property
    def is_held(self) -> bool:
        """Whether a step is planned and not dispatched yet."""
        return self.pipeline.held is not None

    @property
    def is_compiling(self) -> bool:
        """Whether the next step waits for programs that are being compiled aside; `step` then does nothing."""
        return self.pipeline.is_compiling

    def compile_aside(self, done: Callable[[], None] | None) -> None:
        """Compile missing programs on threads of their own from now on; without effect if there are several processes.

        Those must dispatch the same programs in the same order, and compile at the same time by waiting for each other.

        Args:
            done: called on another thread when the next step may have its programs; None to compile within steps, as
                is the default.
        """
        if self.runner.leader is None:
            self.runner.compiled_aside = done

    def check(self, request: Request) -> None:
        """Check whether a request can be queued, without changing any state.

        Raises:
            ValueError: the request id is in use.
            CapacityError: the request can never fit into the cache (`Capacity.check`).
            EngineDeadError: the device was lost.
        """
        self.control.check_serves()
        if request.id in self.requests:
            raise ValueError(f"request id {request.id!r} is in use; choose another, or wait until it has finished")
        if request.adapter is not None and request.adapter.removed:
            raise ValueError(
                f"adapter {request.adapter.name!r} was removed before the request was queued; add it again"
            )
        self.capacity.check(request)

    def add(self, request: Request) -> None:
        """Queue a request, its length clamped to what the cache holds; raises as `check`."""
        self.check(request)
        self.capacity.clamp(request)
        if not self.requests:
            self.metrics.wake()
        request.weight_version = self.control.version
        self.requests[request.id] = request
        self.scheduler.add(request)
        self.metrics.add("prompt_tokens", len(request.prompt))

    def abort(self, request_id: str) -> None:
        """End a request in any state and release its blocks; ignore unknown and finished ids."""
        request = self.requests.get(request_id)
        if request is not None:
            for sequence in request.sequences:
                self.endings.finish(sequence, "abort")
            self.pipeline.drop_if_unwanted()

    def step(self) -> None:
        """Schedule and dispatch the next step (or several decode steps), then commit the previous one.

        After a failed step the cache is rebuilt and the running sequences are recomputed. While a step waits for its
        programs (`is_compiling`) nothing is done.

        Raises:
            EngineDeadError: recovery failed as well, now or earlier.
            DistributedError: the step failed and several processes serve the model.
        """
        self.check_alive()
        if self.is_compiling or self.control.paused or (self.control.pausing and not self.is_held):
            return
        plan = Plan()
        try:
            plan = self.pipeline.advance()
        except BaseException as error:
            self.recovery.start_over(error)
            if not isinstance(error, Exception):
                raise
        self._observe(plan)

    def check_alive(self) -> None:
        """Raise EngineDeadError if no further step can run."""
        if self.dead is not None:
            raise EngineDeadError(self.dead)

    def describe(self, message: str) -> str:
        """Return a message with the engine's name before it, if it has one."""
        return f"{self.name}: {message}" if self.name else message

    def check_not_lost(self, requests: Iterable[Request]) -> None:
        """Raise EngineDeadError if any of these requests ended because the engine died."""
        if self.dead is not None and any(request.error == self.dead for request in requests):
            raise EngineDeadError(self.dead)

    def settle(self) -> bool:
        """Commit the step in flight and return whether nothing is left to do."""
        try:
            self.pipeline.commit()
        except Exception as error:
            self.recovery.start_over(error)
        self._record(Plan())
        return not self.has_work

    def reset_prefix_cache(self) -> None:
        """Drop all cached prefixes and encoded images, e.g. after new weights."""
        self.manager.reset_index()
        self.scheduler.encoder_cache.reset()
        if self.scheduler.drafter is not None:
            self.scheduler.drafter.forget()
        for sequence in self.scheduler.rows.active:
            sequence.published = sequence.hit_blocks = 0

    def close(self) -> None:
        """Abort every request and drop the cache.

        Raises:
            EngineError: blocks are still held, which is a bug; the message carries the accounting.
        """
        for request_id in list(self.requests):
            self.abort(request_id)
        self.pipeline.flight = self.pipeline.held = None
        held = self.manager.pool.num_held
        if held:
            raise EngineError(f"{held} blocks are held with nothing running: {self.manager.pool}")

    def _observe(self, plan: Plan) -> None:
        self.metrics.count_step(plan)
        self.metrics.counters["num_preemptions"] = self.scheduler.preempted
        self.metrics.maybe_log(self.scheduler.rows.num_used, len(self.scheduler.waiting), self.manager.usage)
        self._record(plan)
        if self.settings.check_invariants:
            self.manager.check()
            self.scheduler.encoder_cache.check()

    def _record(self, plan: Plan) -> None:
        """Append a plan that was just dispatched, or an empty one, to the recording if there is one."""
        if self.recorder is None:
            return
        try:
            if self.is_held:
                self.recorder.wait(time.monotonic())
            else:
                self.recorder.observe(self.scheduler, plan, self.pipeline.flight.started if plan else time.monotonic())
        except Exception:  # a view of the engine must not end requests
            log.exception("the recording failed and is switched off")
            self.recorder = None

    def readings(self) -> list[Metric]:
        """Return the current value of every metric; may be called from any thread while a step runs."""
        return self.metrics.readings(
            {
                "num_requests_running": self.scheduler.rows.num_used,
                "num_requests_waiting": len(self.scheduler.waiting),
                "kv_cache_usage_perc": self.manager.usage,
                "compiled_steps": len(self.runner.compile_seconds),
                "compile_seconds": sum(tuple(self.runner.compile_seconds.values())),
                "step_tokens": self.runner.places,
                "padding_tokens": self.runner.padding,
                "padding_perc": self.runner.padding / max(1, self.runner.places),
                **({} if self.runner.memory is None else self.runner.memory.gauges()),
            }
        )
