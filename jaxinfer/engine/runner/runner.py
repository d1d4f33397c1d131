"""Runner: owns parameters, cache and sampler state on the device, and runs compiled steps over them."""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.distributed.wire import ALLOCATED, DROPPED, FREED
from jaxinfer.engine.plan import Plan
from jaxinfer.engine.request import Sequence as Sample
from jaxinfer.engine.runner import batch as batches
from jaxinfer.engine.runner.batch import Bucket
from jaxinfer.engine.runner.device_state import (
    abstract_cache,
    abstract_draft_cache,
    abstract_edits,
    abstract_features,
    abstract_rows,
    replicated,
)
from jaxinfer.engine.runner.draft_steps import DraftFill, DraftSteps
from jaxinfer.engine.runner.flight import Compilations, Flight, Result, check_compiled, of_decodes
from jaxinfer.engine.runner.keys import Key
from jaxinfer.engine.runner.launches import Launch, Packer, Step, describe
from jaxinfer.engine.runner.leader import Leader
from jaxinfer.engine.runner.logits import Logits, SampleLogits
from jaxinfer.engine.runner.logits import programs as programs_of
from jaxinfer.engine.runner.programs import Programs
from jaxinfer.engine.runner.row_params import RowParams
from jaxinfer.engine.runner.shapes import Shapes
from jaxinfer.engine.runner.step_sampling import Sampled
from jaxinfer.engine.sampling.sampler import Edits, Logprobs
from jaxinfer.engine.sizing.memory import MemoryUse
from jaxinfer.engine.structured.masks import fill_masks
from jaxinfer.errors import DraftError, EngineError, JointStepError
from jaxinfer.functional import Program
from jaxinfer.functional.taps import Captured
from jaxinfer.kernels.attention.paged import Cache
from jaxinfer.kv import cache as kv_cache
from jaxinfer.kv.tables import Tables


class Runner:
    """Runner of plans. Cache and sampler state are donated to each step and replaced by its outputs."""

    def __init__(
        self,
        program: Program,
        params: list[Any],
        shapes: Shapes,
        *,
        draft_params: Sequence[Any] = (),
        compiler_options: Mapping[str, Any] | None = None,
        programs: Programs | None = None,
        memory: MemoryUse | None = None,
    ):
        self.program, self.params, self.shapes = program, params, shapes
        self.draft_params = list(draft_params)
        """Parameters of the draft model; empty without one."""
        self.programs = programs or Programs(program, shapes, params, compiler_options, draft_params=draft_params)
        self.memory = memory
        """Memory use of the engine on each device; None if the cache was not sized by memory."""
        self.leader: Leader | None = None
        """Sends dispatches to the other processes of a multi-process mesh; None in a single process."""
        self.compiled_aside: Callable[[], None] | None = None
        """Called on another thread when a program is compiled. If None, a launch compiles the program that it needs."""
        self.places = self.padding = 0
        """Total number of token places in the steps so far, and how many of them were padding."""
        self.masked_steps = self.late_masks = 0
        """Number of steps with masks so far, and of those whose logits waited for the masks."""
        self.mask_seconds = 0.0
        """Seconds that computing masks has taken so far."""
        self._packer = Packer(program, shapes, self._substitute, self._has_joint)
        self._wanted: Sequence[Key] = ()
        """Programs of a joint step that the plan being packed could have used."""
        self._failed: set[Key] = set()
        """Joint steps that failed when they ran."""
        self._abstract_cache = abstract_cache(program, shapes)
        self._replicated = replicated(program)
        self.reset()

    def reset(self) -> None:
        """Allocate empty cache, sampler state and feature pool, in all processes.

        Called initially, after `release`, and after a failed step has consumed the old ones by donation.
        """
        if self.leader is not None:
            self.leader.cache(ALLOCATED)
        self.cache: Cache = []  # free the old ones before the new ones are allocated
        self.draft_cache: Cache = []
        self.drafted: jax.Array | None = None
        """Tokens that the draft model has made last."""
        self.cache = kv_cache.allocate(self._abstract_cache)
        self.draft_cache = kv_cache.allocate(abstract_draft_cache(self.program, self.shapes))
        rows = self.shapes.rows
        empty = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), abstract_rows(self.program, self.shapes))
        self.rows = jax.device_put(empty, self._replicated)
        self.features: jax.Array | None = None
        if self.program.features is not None:
            pool = abstract_features(self.program, self.shapes)
            self.features = jnp.zeros(pool.shape, pool.dtype, device=pool.sharding)
        self.row_params = RowParams(rows)
        self.logits: Logits | None = None
        """Logits of the step whose tokens are pending."""
        self.prompt_logprobs: Logprobs | None = None
        """Log-probabilities of the pending step's prompts."""
        self.captured: Captured = {}
        """Outputs of the pending step's modules."""
        self.edits: Edits | None = None
        if self.shapes.switched:
            self._make_edits()

    def release(self) -> None:
        """Free cache, sampler state and feature pool until `reset`, in all processes."""
        if self.leader is not None:
            self.leader.cache(FREED)
        self.cache, self.draft_cache, self.rows, self.features, self.edits = [], [], None, None, None
        self.forget_pending()

    def forget_pending(self) -> None:
        """Free the outputs of a pending step, once its tokens are sampled."""
        self.logits = self.prompt_logprobs = None
        self.captured = {}

    def drop_weights(self) -> None:
        """Free the parameters, in all processes."""
        if self.leader is not None:
            self.leader.cache(DROPPED)
        self.params[:] = [None] * len(self.params)

    @property
    def compile_seconds(self) -> dict[Key, float]:
        """Seconds that tracing and compiling each program took."""
        return self.programs.seconds

    def prepare(self, sampling: Collection[str]) -> Programs:
        """Return the programs, after allocating arrays that requests with these sampling features need."""
        if self.edits is None and any("edits" in key.takes for key in self.programs.keys(sampling)):
            self._make_edits()
        return self.programs

    def run(self, plan: Plan, tables: Tables, postpone: Callable[[Compilations], Plan]) -> Flight:
        """Pack a plan and dispatch it; returns before it has run.

        A plan is not dispatched yet if programs are compiled aside and some of its own are missing
        (`Flight.compilations`): the caller calls `dispatch` once `Flight.compiled`. In both cases the caller then reads
        the tokens of the previous flight and calls `sample_pending`.

        Args:
            plan: the plan.
            tables: the block tables of its rows.
            postpone: called if programs of the plan's prefill are being compiled, while it has decodes that need not
                wait for them; takes the prefill back and returns what is left of the plan.
        """
        packer, params, entries = self._packer, self.row_params, tables.take_unsent()
        encodes, steps, self._wanted = packer.encodes(plan), [], ()
        both = plan.decodes and plan.chunks
        if both and self.shapes.joint_buckets and not self._missing([*packer.tables(entries), *encodes]):
            steps = packer.joint(plan, tables, params)
        if not steps:
            prefill = packer.prefill(plan, params)
            if both and (missing := self._missing([*packer.tables(entries), *encodes, *prefill])):
                plan, encodes, prefill = postpone(missing), [], []
                self._wanted = ()  # compiled later, not beside what a prompt waits for
                entries = entries[:, np.isin(entries[1], tables.used())]
            steps = [*prefill, *packer.decodes(plan, tables, params)]
        launches = [*packer.copies(*plan.copies), *packer.tables(entries), *encodes, *steps]
        flight = Flight(plan, launches, self._missing(launches))
        if not flight.compilations:
            self.dispatch(flight)
            self._start(self._wanted)
        return flight

    def missing_to_decode(self, samples: Sequence[Sample], rows: np.ndarray, tables: Tables) -> Compilations:
        """Begin to compile the programs that a decode step of these rows and their sequences lacks; return them."""
        if self.compiled_aside is None or self.program.deterministic:
            return {}
        keys = self._packer.decode_keys(samples, rows, tables.lengths[rows], tables, self.row_params)
        return self._start(keys)

    def lacks_to_verify(self, samples: Sequence[Sample], rows: np.ndarray, tokens: int) -> bool:
        """Return whether a program is missing that verifies drafts of `tokens` tokens, which then is compiled aside.

        One that did not compile is missing for good, and nothing is drafted that would need it.
        """
        return self.compiled_aside is not None and self.lacks(
            self._packer.verify_keys(samples, rows, tokens, self.row_params)
        )

    def lacks(self, keys: Collection[Key]) -> bool:
        """Return whether one of these programs did not compile, or is missing and is then compiled aside."""
        if self.compiled_aside is None:
            return False
        return not self.programs.failed.isdisjoint(keys) or bool(self._start(keys))

    def draft(self, key: DraftFill | DraftSteps, parts: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """Run a step of the draft model on the parts of its packed vector; return what it drafts, `[most, B]`.

        Raises:
            DraftError: the step failed.
        """
        try:
            self._launch(key, batches.pack(key, parts))
            return np.asarray(self.drafted) if isinstance(key, DraftSteps) else None
        except Exception as error:
            raise DraftError(f"the {key} failed: {type(error).__name__}: {error}") from error

    def _missing(self, launches: Iterable[Launch]) -> Compilations:
        """Begin to compile the programs that launches lack, and return them."""
        return self._start(dict.fromkeys(launch.key for launch in launches))

    def _start(self, keys: Iterable[Key]) -> Compilations:
        if self.compiled_aside is None:
            return {}
        futures = ((key, self.programs.start(key, self.compiled_aside)) for key in keys)
        return {key: future for key, future in futures if future is not None}

    def _substitute(self, bucket: Bucket) -> Bucket:
        """Return a decode step, or a compiled one that covers it while it is compiled or if it does not compile."""
        if self.compiled_aside is None:
            return bucket
        keys = programs_of(self.shapes, bucket)
        if self.programs.failed.isdisjoint(keys) and not self._start(keys):
            return bucket
        return self.programs.covering(bucket) or bucket

    def _has_joint(self, keys: Sequence[Key]) -> bool:
        """Return whether a joint step may run: its programs are compiled, or compiled by their launch.

        If not, they are compiled aside once a plan that could use them runs as two steps. With several processes, which
        compile nothing aside, only a warm-up compiles them. A step that failed once runs as two from then on.
        """
        if not self._failed.isdisjoint(keys):
            return False
        if all(map(self.programs.has, keys)):
            return True
        if self.compiled_aside is None:
            return self.leader is None
        self._wanted = keys if self.programs.failed.isdisjoint(keys) else ()
        return False

    def dispatch(self, flight: Flight) -> None:
        """Dispatch the launches of a plan.

        Raises:
            CompilationError: a program could not be compiled.
            EngineError: a launch failed; `JointStepError` for that of a joint step.
        """
        check_compiled(flight.compilations)
        flight.started = time.monotonic()
        for launch in flight.launches:
            if isinstance(launch.key, SampleLogits) and launch.key.masked and not launch.step.first:
                flight.pending = launch  # the last launch, since such a plan has one decode step
                continue
            result = self._run_launch(launch)
            if result is not None:
                flight.results.append(result)
            if result is not None and launch.decodes is not None:
                flight.results.append(of_decodes(result, launch.decodes))

    def sample_pending(self, flight: Flight) -> None:
        """Sample the tokens of a dispatched flight's decode step, if rows of it have a grammar.

        All tokens before them must have been read. The masks are computed while the device computes the logits.
        """
        if flight.pending is not None:
            flight.results.append(self._run_launch(flight.pending))
            flight.pending = None

    def _masks(self, key: SampleLogits, step: Step) -> np.ndarray:
        started = time.perf_counter()
        masks = fill_masks(step.samples, step.indices, key.rows, self.program.vocab)
        self.masked_steps, self.late_masks = self.masked_steps + 1, self.late_masks + self.logits.values.is_ready()
        self.mask_seconds += time.perf_counter() - started
        return masks

    def _run_launch(self, launch: Launch) -> Result | None:
        """Dispatch a launch; return the output of a prefill or decode step."""
        key, step, arrays = launch.key, launch.step, launch.arrays
        if isinstance(key, SampleLogits) and key.masked:
            arrays = (self._masks(key, step),)
        try:
            sampled = self._launch(key, *arrays)
        except Exception as error:
            joint = getattr(key, "decodes", 0) > 0
            if joint:
                self._failed.add(key)
            kind = JointStepError if joint else EngineError
            raise kind(f"{describe(key)} failed: {type(error).__name__}: {error}") from error
        if step is None:
            return None
        if isinstance(key, SampleLogits):
            sampled = sampled._replace(prompt_logprobs=self.prompt_logprobs, captured=self.captured)
            self.forget_pending()
        else:
            self.places += key.tokens
            self.padding += key.tokens - step.tokens
            if key.pending:
                return None
        wanted = dict.fromkeys(step.capture + (() if launch.decodes is None else launch.decodes.capture))
        sampled = Sampled(
            sampled.tokens,
            sampled.logprobs if step.needs.logprobs >= 0 else None,
            sampled.prompt_logprobs if step.needs.prompt_logprobs else None,
            sampled.candidates,
            captured={name: sampled.captured[name] for name in wanted},
        )
        return Result(step.samples, step.indices, sampled, step.first, step.places, step.drafts)

    def _launch(self, key: Key, *arrays: np.ndarray) -> Any:
        """Dispatch a program, after sending it to the other processes if there are any."""
        if self.leader is None:
            return self.replay(key, arrays)
        self.leader.launch(key, arrays)
        result = self.replay(key, arrays)
        self.leader.watch(result)
        return result

    def replay(self, key: Key, arrays: Sequence[np.ndarray]) -> Any:
        """Run a program on the runner state that its key takes, store what its key gives, and return the rest."""
        program = self.programs.get(key)
        if "edits" in key.takes and self.edits is None:
            self._make_edits()
        made = program(*(None if name is None else getattr(self, name) for name in key.takes), *arrays)
        made = (made,) if len(key.gives) == 1 else made
        for name, value in zip(key.gives, made):
            if name is not None:
                setattr(self, name, value)
        return made[-1] if len(made) > len(key.gives) else None

    def _make_edits(self) -> None:
        make = partial(jnp.zeros, device=self._replicated)
        self.edits = jax.tree.map(lambda a: make(a.shape, a.dtype), abstract_edits(self.program, self.shapes))
