"""Runner: owns parameters, cache and sampler state on the device, and runs compiled steps over them."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.engine.plan import Plan
from jaxinfer.engine.request import Sequence as Sample
from jaxinfer.engine.runner.batch import Bucket
from jaxinfer.engine.runner.launches import Launch, Packer, Step, describe
from jaxinfer.engine.runner.mixed import Mixed
from jaxinfer.engine.runner.programs import CompilationError, Encode, EncodeCross, Key, Programs
from jaxinfer.engine.runner.row_params import RowParams
from jaxinfer.engine.runner.steps import (
    Sampled,
    SampleMasked,
    Shapes,
    abstract_cache,
    abstract_edits,
    abstract_features,
    abstract_rows,
    replicated,
)
from jaxinfer.engine.sampling.sampler import Edits, Logprobs
from jaxinfer.engine.sampling.sampling_rows import Level
from jaxinfer.engine.sizing.memory import MemoryUse
from jaxinfer.engine.structured.masks import fill_masks
from jaxinfer.errors import EngineError
from jaxinfer.functional import Program
from jaxinfer.functional.taps import Captured
from jaxinfer.kernels.attention.paged import Cache
from jaxinfer.kv import cache as kv_cache
from jaxinfer.kv.tables import Tables


@dataclass(frozen=True)
class Result:
    """Output of a compiled step, still on the device, and the sequences it belongs to."""

    samples: Sequence[Sample]
    indices: np.ndarray
    """Index of each sequence in the step's batch."""
    sampled: Sampled
    first: bool
    """Whether these are the first tokens after a prefill."""
    places: np.ndarray | None = None
    """Decode: index of each sequence's token among those of the step."""

    def __post_init__(self) -> None:
        for array in jax.tree.leaves(self.sampled):
            array.copy_to_host_async()

    @property
    def ready(self) -> bool:
        """Whether the step has run."""
        return self.sampled.tokens.is_ready()


@dataclass
class Flight:
    """A packed plan: its launches, and once it is dispatched the outputs of its steps."""

    plan: Plan
    launches: list[Launch]
    compilations: dict[Key, Future[Any]] = field(default_factory=dict)
    """Programs of the launches that were missing when the plan was packed."""
    results: list[Result] = field(default_factory=list)
    pending: Launch | None = None
    """Launch that samples the decode step's tokens, until the tokens that its masks depend on are read."""
    started: float = field(default_factory=time.monotonic)
    """Time of the first dispatch."""

    @property
    def compiled(self) -> bool:
        """Whether no program is being compiled any more."""
        return all(future.done() for future in self.compilations.values())

    def needing(self, key: Key) -> Plan:
        """Return the part of the plan that a program is for: its prefill, its decodes, or both."""
        if isinstance(key, Bucket) and key.kind == "decode":
            return replace(self.plan, chunks=[], samples=[])
        return replace(self.plan, decodes=[]) if isinstance(key, (Bucket, Encode, EncodeCross)) else self.plan


def _of_decodes(result: Result, step: Step) -> Result:
    """Return the part of a mixed step's output that belongs to its decodes."""
    captured = {name: result.sampled.captured[name] for name in step.capture}
    sampled = result.sampled._replace(prompt_logprobs=None, captured=captured)
    return Result(step.samples, step.indices, sampled, first=False, places=step.places)


class Leader(Protocol):
    """Replays each dispatch in other processes (`multihost.replay.Leader`)."""

    def launch(self, key: Key, arrays: Sequence[np.ndarray]) -> None:
        """Send a program that is about to be dispatched with these arrays."""
        ...

    def watch(self, result: Sampled | None) -> None:
        """Compare the result of the dispatch with the other processes, once it is computed."""
        ...

    def warm(self, sampling: Collection[str], threads: int | None) -> None:
        """Have the other processes compile the programs that this one is about to compile; `warmed` waits for them."""
        ...

    def warmed(self) -> None:
        """Wait until all processes have compiled."""
        ...

    def end(self) -> None:
        """End the other processes once they have done everything; raise if something went wrong."""
        ...

    def give_up(self, error: BaseException) -> None:
        """End all processes after a failed step; raise why, unless it was an interrupt."""
        ...


class Runner:
    """Runs plans. Cache and sampler state are donated to each step and replaced by its outputs."""

    def __init__(
        self,
        program: Program,
        params: list[jax.Array],
        shapes: Shapes,
        *,
        compiler_options: Mapping[str, Any] | None = None,
        programs: Programs | None = None,
        memory: MemoryUse | None = None,
    ):
        self.program, self.params, self.shapes = program, params, shapes
        self.programs = programs or Programs(program, shapes, params, compiler_options)
        self.memory = memory
        """What the engine takes of a device's memory, where it was sized by it."""
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
        self._packer = Packer(program, shapes)
        self._abstract_cache = abstract_cache(program, shapes)
        self._replicated = replicated(program)
        self.reset()

    def reset(self) -> None:
        """Allocate empty cache, sampler state and feature pool.

        Called initially, and after a failed step has consumed the old ones by donation.
        """
        self.cache: Cache = []  # free the old one before the new one is allocated
        self.cache = kv_cache.allocate(self._abstract_cache)
        rows = self.shapes.rows
        empty = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), abstract_rows(self.program, self.shapes))
        self.rows = jax.device_put(empty, self._replicated)
        self.features: jax.Array | None = None
        if self.program.features is not None:
            pool = abstract_features(self.program, self.shapes)
            self.features = jnp.zeros(pool.shape, pool.dtype, device=pool.sharding)
        self.row_params = RowParams(rows)
        self.logits: jax.Array | None = None
        """Logits `[B, V']` of the step whose tokens are pending."""
        self.summary: jax.Array | None = None
        """Summary of its hidden states (`Sampled.summary`)."""
        self.prompt_logprobs: Logprobs | None = None
        """Log-probabilities of its prompts."""
        self.captured: Captured = {}
        """Outputs of its modules."""
        self.edits: Edits | None = None
        if self.shapes.switched:
            self._make_edits()

    def release(self) -> None:
        """Free cache, sampler state and feature pool until `reset`."""
        self.cache, self.rows, self.features, self.edits = [], None, None, None

    @property
    def compile_seconds(self) -> dict[Key, float]:
        """Seconds that tracing and compiling each program took."""
        return self.programs.seconds

    def prepare(self, sampling: Collection[str]) -> Programs:
        """Return the programs, after allocating arrays that requests with these sampling features need."""
        buckets = (key for key in self.programs.keys(sampling) if isinstance(key, Bucket | Mixed))
        if self.edits is None and any(bucket.level >= Level.EDITED for bucket in buckets):
            self._make_edits()
        return self.programs

    def run(self, plan: Plan, tables: Tables) -> Flight:
        """Pack a plan and dispatch it; returns before it has run.

        A plan is not dispatched yet if programs are compiled aside and some of its own are missing
        (`Flight.compilations`): the caller calls `dispatch` once `Flight.compiled`. After either the caller reads the
        tokens of the flight before, and then calls `sample_pending`.
        """
        flight = Flight(plan, self._packer.pack(plan, tables, self.row_params))
        if self.compiled_aside is not None:
            for key in dict.fromkeys(launch.key for launch in flight.launches):
                future = self.programs.start(key, self.compiled_aside)
                if future is not None:
                    flight.compilations[key] = future
        if not flight.compilations:
            self.dispatch(flight)
        return flight

    def dispatch(self, flight: Flight) -> None:
        """Dispatch the launches of a plan.

        Raises:
            CompilationError: a program could not be compiled.
            EngineError: a launch failed.
        """
        for key, future in flight.compilations.items():
            if (error := future.exception()) is not None:
                message = f"{describe(key)} could not be compiled: {type(error).__name__}: {error}"
                raise CompilationError(key, message) from error
        flight.started = time.monotonic()
        for launch in flight.launches:
            if isinstance(launch.key, SampleMasked) and not launch.step.first:
                flight.pending = launch  # the last launch, since such a plan has one decode step
                continue
            result = self._run_launch(launch)
            if result is not None:
                flight.results.append(result)
            if launch.decodes is not None:
                flight.results.append(_of_decodes(result, launch.decodes))

    def sample_pending(self, flight: Flight) -> None:
        """Sample the tokens of a dispatched flight's decode step, if rows of it have a grammar.

        All tokens before them must have been read. The masks are computed while the device computes the logits.
        """
        if flight.pending is not None:
            flight.results.append(self._run_launch(flight.pending))
            flight.pending = None

    def _masks(self, key: SampleMasked, step: Step) -> np.ndarray:
        started = time.perf_counter()
        masks = fill_masks(step.samples, step.indices, key.rows, self.program.vocab)
        self.masked_steps, self.late_masks = self.masked_steps + 1, self.late_masks + self.logits.is_ready()
        self.mask_seconds += time.perf_counter() - started
        return masks

    def _run_launch(self, launch: Launch) -> Result | None:
        """Dispatch a launch; return the output of a prefill or decode step."""
        key, step, arrays = launch.key, launch.step, launch.arrays
        if isinstance(key, SampleMasked):
            arrays = (*arrays, self._masks(key, step))
        try:
            sampled = self._launch(key, *arrays)
        except Exception as error:
            raise EngineError(f"{describe(key)} failed: {type(error).__name__}: {error}") from error
        if step is None:
            return None
        if isinstance(key, SampleMasked):
            sampled = sampled._replace(prompt_logprobs=self.prompt_logprobs, captured=self.captured)
            self.logits = self.summary = self.prompt_logprobs = None
            self.captured = {}
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
        return Result(step.samples, step.indices, sampled, step.first, step.places)

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
