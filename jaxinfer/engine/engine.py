"""The engine: schedules requests, runs steps and commits sampled tokens."""

import logging
import time
from collections.abc import Callable, Iterable

import numpy as np

from jaxinfer.engine import captures
from jaxinfer.engine.beam_search import branching
from jaxinfer.engine.control import EngineControl
from jaxinfer.engine.metrics import Metric, Metrics
from jaxinfer.engine.plan import Plan
from jaxinfer.engine.recorder import Recorder
from jaxinfer.engine.request import Request, Sequence, Status
from jaxinfer.engine.runner.batch import spans, wants_prompt_logprobs
from jaxinfer.engine.runner.multi_step import MultiStep
from jaxinfer.engine.runner.programs import CompilationError
from jaxinfer.engine.runner.runner import Flight, Result, Runner
from jaxinfer.engine.sampling.sampler import BAD_TOKEN, Candidates, Logprobs
from jaxinfer.engine.scheduler import Limits, Scheduler
from jaxinfer.engine.sizing.capacity import Capacity
from jaxinfer.engine.sizing.settings import HostSettings
from jaxinfer.engine.structured.masks import ends_without_token
from jaxinfer.errors import EngineDeadError, EngineError
from jaxinfer.functional.taps import EXPERTS
from jaxinfer.kv.contiguous import RowManager
from jaxinfer.kv.interface import CacheManager
from jaxinfer.kv.manager import BlockManager

log = logging.getLogger(__name__)

RETRIES = 2
"""Maximum number of consecutive failed steps after which a sequence is recomputed; then it ends in error."""
NOT_FINITE = "the model's logits are not finite, or every token is masked"
NO_TOKEN_LEFT = (
    "structured_outputs: no token is left: those that the structure allows next are masked by bad_words, "
    "allowed_token_ids, logit_bias, no_repeat_ngram_size or min_tokens, or the model's logits are not finite"
)
STUCK = (
    "the cache has no room for this request although nothing else is running, and the check at queueing passed; this "
    "is a bug of the engine, please report it with the request and the engine's settings"
)


class Engine:
    """Continuous batching over a runner. Not thread-safe: in an `LLM` only its `EngineThread` calls it."""

    def __init__(self, runner: Runner, settings: HostSettings):
        self.runner, self.settings = runner, settings
        self.capacity = Capacity(runner, settings)
        self.requests: dict[str, Request] = {}
        self.metrics = Metrics(settings.log_interval)
        self.recorder: Recorder | None = None
        """Event log of the steps while a recording runs (`LLM.start_recording`)."""
        self._multi_step = MultiStep(settings.decode_steps)
        self._flight: Flight | None = None
        """The step that was dispatched last, until its tokens are read."""
        self._held: Flight | None = None
        """The next step, while programs that it needs are compiled. Nothing is scheduled until it is dispatched."""
        self._suspect = Plan()
        self._said_clamped = False
        self.dead: str | None = None
        """Why no further step can run, or None."""
        self.control = EngineControl(self)
        self._start()

    def _start(self) -> None:
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
        self.scheduler = Scheduler(self.manager, limits)

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
        return self._flight is not None or self._held is not None or self.scheduler.has_work

    @property
    def is_held(self) -> bool:
        """Whether a step is planned and not dispatched yet."""
        return self._held is not None

    @property
    def is_compiling(self) -> bool:
        """Whether the next step waits for programs that are being compiled aside; `step` then does nothing."""
        return self._held is not None and not self._held.compiled

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
        self.capacity.check(request)

    def add(self, request: Request) -> None:
        """Queue a request, its length clamped to what the cache holds; raises as `check`."""
        self.check(request)
        self._clamp(request)
        request.weight_version = self.control.version
        self.requests[request.id] = request
        self.scheduler.add(request)
        self.metrics.add("prompt_tokens", len(request.prompt))

    def _clamp(self, request: Request) -> None:
        """Clamp a request's maximum length to the cache's capacity; log the first time that this reduces it."""
        prompt, asked = len(request.prompt), request.limit if request.asked is None else request.asked
        request.limit = min(request.limit, self.capacity.tokens(0 if request.cross is None else request.cross.length))
        if request.limit >= asked:
            return
        request.clamped_max_tokens = request.limit - prompt
        if not self._said_clamped:
            self._said_clamped = True
            log.warning(
                "request %s: max_tokens lowered to %d from %d: the cache holds sequences of at most %d tokens and the "
                "prompt has %d; raise kv_cache_memory_bytes (or pool_blocks, if set). Logged once; each such result "
                "has metrics.clamped_max_tokens",
                request.id,
                request.limit - prompt,
                asked - prompt,
                request.limit,
                prompt,
            )

    def abort(self, request_id: str) -> None:
        """End a request in any state and release its blocks; ignore unknown and finished ids."""
        request = self.requests.get(request_id)
        if request is not None:
            for sequence in request.sequences:
                self._finish(sequence, "abort")
            self._drop_held_if_unwanted()

    def step(self) -> None:
        """Schedule and dispatch the next step (or several decode steps), then commit the previous one.

        After a failed step the cache is rebuilt and the running sequences are recomputed. While a step waits for its
        programs (`is_compiling`) nothing is done.

        Raises:
            EngineDeadError: recovery failed as well, now or earlier.
            DistributedError: the step failed and several processes serve the model.
        """
        self.check_alive()
        if self.is_compiling or self.control.paused or (self.control.pausing and self._held is None):
            return
        plan = self._suspect = Plan()
        try:
            plan = self._next() if self._held is None else self._dispatch_held()
        except BaseException as error:
            self._start_over(error)
            if not isinstance(error, Exception):
                raise
        self._observe(plan)

    def _next(self) -> Plan:
        """Schedule and run a plan, then commit the previous one."""
        if self.scheduler.needs_history:
            self._commit(self._take_flight())
        idle = self._flight is None
        plan = self.scheduler.schedule(self._multi_step.steps)
        flight = self._run(plan) if plan else None
        self._commit(self._take_flight())
        if idle and not plan:
            self._end_stuck()
        if flight is not None and flight.compilations:
            self._held = flight
            self._drop_held_if_unwanted()
            return Plan()
        if flight is not None:
            self.runner.sample_pending(flight)  # with masks that depend on the tokens just read
        self._flight = flight
        return plan

    def _drop_held_if_unwanted(self) -> None:
        """Drop the plan that waits for its programs if all of its sequences have ended, as no other may wait for it."""
        if self._held is None or any(s.status is not Status.FINISHED for s in self._held.plan.sequences):
            return
        self.scheduler.drop(self._held.plan)
        self._held = None

    def _dispatch_held(self) -> Plan:
        """Dispatch the plan that has waited for its programs."""
        held, self._held = self._held, None
        self._suspect = held.plan
        try:
            self.runner.dispatch(held)
        except CompilationError as error:
            self._suspect = held.needing(error.key)
            raise
        self._dispatched(held.plan)
        self.runner.sample_pending(held)
        self._flight = held
        return held.plan

    def check_alive(self) -> None:
        """Raise EngineDeadError if no further step can run."""
        if self.dead is not None:
            raise EngineDeadError(self.dead)

    def check_not_lost(self, requests: Iterable[Request]) -> None:
        """Raise EngineDeadError if any of these requests ended because the engine died."""
        if self.dead is not None and any(request.error == self.dead for request in requests):
            raise EngineDeadError(self.dead)

    def _start_over(self, error: BaseException) -> None:
        """Recover from a failed step, or mark the engine as dead if that fails."""
        try:
            self._recover(error)
        except Exception as second:
            if self.runner.leader is not None:
                raise
            self.kill(
                f"a step failed ({type(error).__name__}: {error}), and starting over failed as well "
                f"({type(second).__name__}: {second})"
            )
            raise EngineDeadError(self.dead) from error

    def kill(self, reason: str) -> None:
        """End every request in error and drop the cache; no further step can run."""
        self.dead = f"the engine is dead: {reason}; close this LLM and make a new one"
        log.error("%s", self.dead)
        requests, self.requests, self._flight, self._held = list(self.requests.values()), {}, None, None
        self._start()
        self.control.paused = self.control.pausing = False
        for request in requests:
            request.error = self.dead
            for sequence in request.sequences:
                if sequence.status is not Status.FINISHED:
                    sequence.status, sequence.finish_reason, sequence.row = Status.FINISHED, "error", -1
            if request.on_finish is not None:
                request.on_finish(request)

    def _end_stuck(self) -> None:
        """Fail the first sequence if nothing was planned and nothing is in flight: it would wait forever."""
        stuck = next(iter([*self.scheduler.active, *self.scheduler.waiting]), None)
        if stuck is not None and self.scheduler.last_arrival is None:
            self._fail(stuck, STUCK)

    def _run(self, plan: Plan) -> Flight:
        self._suspect, now = plan, time.monotonic()
        for chunk in plan.chunks:
            if chunk.sequence.request.first_scheduled_time is None:
                chunk.sequence.request.first_scheduled_time = now
                self.metrics.count_hits(chunk.sequence.request)
        flight = self.runner.run(plan, self.manager.tables)
        if flight.compilations:
            self.scheduler.hold(plan)
        else:
            self._dispatched(plan)
        return flight

    def _dispatched(self, plan: Plan) -> None:
        self.scheduler.dispatched(plan)
        self.metrics.count_inputs(plan)

    def _take_flight(self) -> Flight | None:
        flight, self._flight = self._flight, None
        return flight

    def _commit(self, flight: Flight | None) -> None:
        """Read a step's tokens, append them to their sequences and end those that are done."""
        if flight is None:
            return
        self._suspect = flight.plan
        late = flight.results[-1].ready
        for result in flight.results:
            if result.sampled.prompt_logprobs is not None:
                self._take_prompt_logprobs(flight.plan, Logprobs(*map(np.asarray, result.sampled.prompt_logprobs)))
            if result.sampled.captured:
                captures.take_captured(flight.plan, result)
            self._take_tokens(result)
        for sequence in [chunk.sequence for chunk in flight.plan.chunks if captures.ends_here(chunk)]:
            sequence.pending -= 1
            self._finish(sequence, "length")
        self._multi_step.note(
            0 if flight.plan.chunks else flight.plan.steps, flight.started, time.monotonic(), late=late
        )

    def _take_tokens(self, result: Result) -> None:
        """Append sampled tokens to their sequences; inline fast path for tokens that need no other handling."""
        sampled, indices, size = result.sampled, result.indices, self.runner.shapes.block_size
        tokens = np.asarray(sampled.tokens)[indices].tolist()
        beside = None if sampled.logprobs is None else Logprobs(*(np.asarray(c)[indices] for c in sampled.logprobs))
        offers = None if sampled.candidates is None else [np.asarray(c)[indices] for c in sampled.candidates]
        finished, made = Status.FINISHED, 0
        for i, (sequence, token) in enumerate(zip(result.samples, tokens, strict=True)):
            sequence.pending -= 1
            if sequence.status is finished:
                continue
            request, length = sequence.request, sequence.length + 1
            if (
                result.first
                or token < 0
                or sequence.needs_full_commit
                or length >= sequence.commit_limit
                or token in request.stop_ids
            ):
                made += token != BAD_TOKEN
                if request.beams is None:
                    self._take_token(sequence, token, beside, i)
                else:
                    self._take_candidates(sequence, Candidates(*(column[i] for column in offers)))
                    continue
            else:
                made += 1
                sequence.tokens[length - 1] = token
                sequence.length = length
            if sequence.length % size == 0:
                self.scheduler.publish(sequence)
        self.metrics.add("generation_tokens", made)

    def _take_token(self, sequence: Sequence, token: int, beside: Logprobs | None, i: int) -> None:
        """Append a token with full handling: NaN logits, log-probabilities, timestamps, listener, finish reasons."""
        request = sequence.request
        if sequence.matcher is not None and sequence.matcher.error is not None:
            self._fail(sequence, sequence.matcher.error)
            return
        if token == BAD_TOKEN:
            if ends_without_token(sequence):
                self._finish(sequence, "stop")
            else:
                self._fail(sequence, NOT_FINITE if sequence.matcher is None else NO_TOKEN_LEFT)
            return
        if beside is not None and request.params.logprobs is not None:
            sequence.cumulative_logprob += float(beside.chosen[i])
            sequence.logprobs.append((float(beside.chosen[i]), int(beside.rank[i]), beside.top_ids[i], beside.top[i]))
        if request.first_token_time is None:
            request.first_token_time = time.monotonic()
        try:
            reason = sequence.add(token)
        except Exception as error:  # a listener's error ends its own request only
            log.exception("request %s: the listener failed", request.id)
            self._fail(sequence, f"listener failed: {error}")
            return
        if sequence.matcher is not None and sequence.matcher.error is not None:
            self._fail(sequence, sequence.matcher.error)
        elif reason is not None:
            self._finish(sequence, reason)
        elif sequence.length == sequence.stage_limit:
            self.scheduler.recompute(sequence)

    def _take_candidates(self, sequence: Sequence, found: Candidates) -> None:
        """Store a beam's continuations; once all beams of the search have theirs, advance the search."""
        request, sequence.candidates = sequence.request, found
        if np.isnan(found.scores).any():
            self._fail(sequence, NOT_FINITE)
            return
        if request.first_token_time is None:
            request.first_token_time = time.monotonic()
        if not branching.complete(request):
            return
        beams, running = request.beams, branching.running(request)
        chosen = beams.advance([beam.candidates for beam in running])
        if chosen:
            self.runner.row_params.write(s for s in branching.regroup(self.scheduler, request, chosen) if s.row >= 0)
        else:
            self._end_search(request)

    def _end_search(self, request: Request) -> None:
        for beam in branching.running(request):
            if request.beams.best:
                self._finish(beam, "stop" if request.beams.best[0].stopped else "length")
            else:
                self._fail(beam, NOT_FINITE)

    def _take_prompt_logprobs(self, plan: Plan, found: Logprobs) -> None:
        for span, chunk in zip(spans(plan), plan.chunks, strict=True):
            request = chunk.sequence.request
            if not wants_prompt_logprobs(chunk) or chunk.sequence.index:
                continue
            # Some are already known if the prompt was preempted half way and recomputed.
            known = request.first_scored + sum(len(part.chosen) for part in request.prompt_logprobs)
            first, end = max(0, known - chunk.start), min(chunk.count, len(request.prompt) - 1 - chunk.start)
            if first < end:
                span = slice(span.start + first, span.start + end)
                request.prompt_logprobs.append(Logprobs(*(column[span] for column in found)))

    def _fail(self, sequence: Sequence, message: str) -> None:
        """End a sequence in error and withdraw the blocks it wrote from the prefix index."""
        sequence.request.error = message
        if sequence.status is Status.RUNNING:
            self.manager.withdraw(sequence.digests[sequence.hit_blocks : sequence.published])
            if sequence.request.encoded is not None:
                self.manager.withdraw(sequence.request.encoded.digests)
        self._finish(sequence, "error")
        if sequence.request.beams is not None:
            for beam in branching.running(sequence.request):
                self._finish(beam, "error")

    def _finish(self, sequence: Sequence, reason: str) -> None:
        if sequence.status is Status.FINISHED:
            return
        if reason != "error":
            self.scheduler.publish(sequence)
        self.scheduler.finish(sequence, reason)
        self.metrics.success[reason] = self.metrics.success.get(reason, 0) + 1
        request = sequence.request
        if request.finished:
            request.finished_time = time.monotonic()
            self.metrics.time(request)
            if request.on_finish is not None:
                request.on_finish(request)
            del self.requests[request.id]

    def _recover(self, error: BaseException) -> None:
        """Rebuild the cache, which a failed step may have consumed by donation, and requeue all sequences.

        Sequences whose steps failed repeatedly end in error, so that the others can continue. An interrupt is not
        counted as a failure, but it may have come at any point. With several processes none of them continues.
        """
        leader = self.runner.leader
        fate = "the cache is rebuilt" if leader is None else "all processes end"
        if isinstance(error, Exception):
            log.error("a step failed (%s: %s); %s", type(error).__name__, error, fate)
        else:
            log.info("interrupted (%s); %s", type(error).__name__, fate)
        for request in [request for request in self.requests.values() if request.finished]:
            del self.requests[request.id]  # an interrupt came while the request was ending
            if request.on_finish is not None:
                request.on_finish(request)
        for request in self.requests.values():
            if request.beams is not None:
                branching.restore(request)
        again = [s for r in self.requests.values() for s in r.sequences if s.status is not Status.FINISHED]
        # If planning itself failed, any sequence may be the cause.
        suspects = set(self._suspect.sequences or again) if isinstance(error, Exception) else set()
        blamed = {id(s): s.count_failure() for s in suspects}
        self._flight, self._held, self._suspect, preempted = None, None, Plan(), self.scheduler.preempted
        for sequence in again:
            sequence.status, sequence.row, sequence.computed, sequence.pending = Status.WAITING, -1, 0, 0
        last = self.scheduler.last_arrival
        self._start()
        self.scheduler.preempted, self.scheduler.last_arrival = preempted, last
        again.sort(key=lambda s: s.age)
        self.scheduler.waiting.extend(again)
        if leader is None:
            self.runner.reset()  # after all host state is consistent: this raises if the device is lost
        for sequence in again:
            if sequence.status is Status.WAITING:
                self._resume(sequence, blamed.get(id(sequence), 0), error)
        if leader is not None:
            leader.give_up(error)

    def _resume(self, sequence: Sequence, failures: int, error: BaseException) -> None:
        """End a requeued sequence if it failed too often or had already reached its end."""
        if sequence.request.beams is not None and not sequence.request.beams.state.running:
            self._end_search(sequence.request)
            return
        reason = sequence.end() if sequence.made else None
        if reason is not None:
            self._finish(sequence, reason)
        elif failures and isinstance(error, CompilationError):  # it would fail again
            self._fail(sequence, str(error))
        elif failures > RETRIES:
            self._fail(sequence, f"its step failed {failures} times: {type(error).__name__}: {error}")
        elif sequence.length == sequence.stage_limit:
            sequence.start_over()

    def settle(self) -> bool:
        """Commit the step in flight and return whether nothing is left to do."""
        try:
            self._commit(self._take_flight())
        except Exception as error:
            self._start_over(error)
        self._record(Plan())
        return not self.has_work

    def reset_prefix_cache(self) -> None:
        """Drop all cached prefixes and encoded images, e.g. after new weights."""
        self.manager.reset_index()
        self.scheduler.encoder_cache.reset()
        for sequence in self.scheduler.active:
            sequence.published = sequence.hit_blocks = 0

    def close(self) -> None:
        """Abort every request and drop the cache.

        Raises:
            EngineError: blocks are still held, which is a bug; the message carries the accounting.
        """
        for request_id in list(self.requests):
            self.abort(request_id)
        self._flight = self._held = None
        held = self.manager.pool.num_held
        if held:
            raise EngineError(f"{held} blocks are held with nothing running: {self.manager.pool}")

    def _observe(self, plan: Plan) -> None:
        self.metrics.count_step(plan)
        self.metrics.counters["num_preemptions"] = self.scheduler.preempted
        self.metrics.maybe_log(self.scheduler.rows_in_use, len(self.scheduler.waiting), self.manager.usage)
        self._record(plan)
        if self.settings.check_invariants:
            self.manager.check()
            self.scheduler.encoder_cache.check()

    def _record(self, plan: Plan) -> None:
        """Append a plan that was just dispatched, or an empty one, to the recording if there is one."""
        if self.recorder is None:
            return
        try:
            if self._held is not None:
                self.recorder.wait(time.monotonic())
            else:
                self.recorder.observe(self.scheduler, plan, self._flight.started if plan else time.monotonic())
        except Exception:  # a view of the engine must not end requests
            log.exception("the recording failed and is switched off")
            self.recorder = None

    def readings(self) -> list[Metric]:
        """Return the current value of every metric; may be called from any thread while a step runs."""
        return self.metrics.readings(
            {
                "num_requests_running": self.scheduler.rows_in_use,
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
