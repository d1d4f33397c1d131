"""Runner: owns parameters, cache and sampler state on the device, and runs compiled steps over them."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.engine.plan import Plan
from jaxinfer.engine.request import Sequence as Sample
from jaxinfer.engine.request import bias_row
from jaxinfer.engine.runner import batch as batches
from jaxinfer.engine.runner.batch import Bucket
from jaxinfer.engine.runner.buckets import (
    TABLE_WIDTHS,
    Needs,
    copy_widths,
    decode_bucket,
    encode_pieces,
    encode_shape,
    encode_steps,
    least,
    prefill_bucket,
    read_size,
)
from jaxinfer.engine.runner.programs import Copies, Encode, EncodeCross, Install, InstallTables, Key, Programs
from jaxinfer.engine.runner.row_params import RowParams
from jaxinfer.engine.runner.steps import (
    Sampled,
    Shapes,
    abstract_cache,
    abstract_edits,
    abstract_features,
    abstract_rows,
    replicated,
)
from jaxinfer.engine.sampling.sampler import Edits
from jaxinfer.engine.sampling.sampling_rows import Level
from jaxinfer.engine.sizing.memory import MemoryUse
from jaxinfer.errors import EngineError
from jaxinfer.functional import Program
from jaxinfer.functional.encoder_batch import EncodeJob, encode_batch
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

    def __post_init__(self) -> None:
        for array in jax.tree.leaves(self.sampled):
            array.copy_to_host_async()

    @property
    def ready(self) -> bool:
        """Whether the step has run."""
        return self.sampled.tokens.is_ready()


@dataclass(frozen=True)
class Flight:
    """A dispatched plan: the outputs of its steps and the time of the first dispatch."""

    plan: Plan
    results: list[Result]
    started: float = field(default_factory=time.monotonic)


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
        self.places = self.padding = 0
        """Total number of token places in the steps so far, and how many of them were padding."""
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
        self.edits: Edits | None = None
        if self.shapes.switched:
            self._make_edits()

    @property
    def compile_seconds(self) -> dict[Key, float]:
        """Seconds that tracing and compiling each program took."""
        return self.programs.seconds

    def prepare(self, sampling: Collection[str]) -> Programs:
        """Return the programs, after allocating arrays that requests with these sampling features need."""
        buckets = (key for key in self.programs.keys(sampling) if isinstance(key, Bucket))
        if self.edits is None and any(bucket.level >= Level.EDITED for bucket in buckets):
            self._make_edits()
        return self.programs

    def run(self, plan: Plan, tables: Tables) -> Flight:
        """Dispatch a plan: block copies, encoders, prefill, decode steps. Returns before they have run."""
        started = time.monotonic()
        self._copy_blocks(*plan.copies)
        self._send_tables(tables.take_unsent())
        if plan.encodes:
            self._encode(plan)
        if plan.reads:
            self._encode_cross(plan.reads)
        results = [self._prefill(plan)] if plan.chunks else []
        if plan.decodes:
            results += [self._decode(plan, tables, ahead) for ahead in range(plan.steps)]
        return Flight(plan, results, started)

    def _copy_blocks(self, sources: np.ndarray, targets: np.ndarray) -> None:
        widths = copy_widths(self.shapes)
        for start in range(0, len(sources), widths[-1]):
            some = slice(start, start + widths[-1])
            count = len(sources[some])
            width = least(widths, count)
            ids = np.zeros(width, np.int32), np.full(width, self.shapes.num_blocks, np.int32)
            ids[0][:count], ids[1][:count] = sources[some], targets[some]
            self._launch(Copies(width), *ids)

    def _send_tables(self, entries: np.ndarray) -> None:
        """Send block table updates `[4, n]` (`Tables.take_unsent`)."""
        while count := entries.shape[1]:
            width = least(TABLE_WIDTHS, min(count, TABLE_WIDTHS[-1]))
            padded = np.full((4, width), self.shapes.rows, np.int32)
            padded[:, :count] = entries[:, :width]
            self._launch(InstallTables(width), padded)
            entries = entries[:, width:]

    def _encode(self, plan: Plan) -> None:
        """Encode all inputs of a plan together, whichever prompts they belong to."""
        values = np.concatenate([one.values for one, _ in plan.encodes])
        slots = np.concatenate([np.asarray(slots, np.int32) for _, slots in plan.encodes])
        start = 0
        for size in encode_pieces(self.shapes, len(slots)):
            some = slice(start, start + size)
            inputs, targets = values[some], slots[some]
            padding = size - len(targets)
            inputs = np.pad(inputs, [(0, padding), *[(0, 0)] * (inputs.ndim - 1)])
            targets = np.pad(targets, (0, padding), constant_values=self.shapes.feature_slots)
            try:
                self._launch(Encode(size), inputs, targets)
            except Exception as error:
                raise EngineError(f"the encoder step of {size} failed: {type(error).__name__}: {error}") from error
            start += size

    def _encode_cross(self, jobs: Sequence[EncodeJob]) -> None:
        """Encode the cross-attention inputs of a plan's prompts into the cache."""
        program, shapes = self.program, self.shapes
        for step in encode_steps(jobs, encode_shape(program, shapes, shapes.cross_buckets[-1])):
            key = EncodeCross(**vars(encode_shape(program, shapes, sum(job.input.count for job in step))))
            batch = encode_batch(program.cross, step, shapes.block_size, shapes.num_blocks, key)
            packed = batches.pack(key, {name: getattr(batch, name) for name in key.shapes})
            try:
                self._launch(key, batch.inputs, batch.numbers, packed)
            except Exception as error:
                raise EngineError(f"the encoder step of {key.units} failed: {type(error).__name__}: {error}") from error

    def _prefill(self, plan: Plan) -> Result:
        samples, tokens = [s for _, s in plan.samples], sum(chunk.count for chunk in plan.chunks)
        positions = np.array([s.prefilled for s in samples], np.int32)
        self.row_params.write(samples)
        self.row_params.update_levels(samples, positions)
        prompt_logprobs = any(batches.wants_prompt_logprobs(chunk) for chunk in plan.chunks)
        needs = self.row_params.needs(np.array([s.row for s in samples], np.int32))._replace(
            prompt_logprobs=prompt_logprobs
        )
        if needs.level >= Level.EDITED:
            self._install_edits(samples, positions.tolist())
        bucket = prefill_bucket(self.program, self.shapes, tokens, needs)
        self.padding += bucket.tokens - tokens
        sampled = self._dispatch(bucket, needs, batches.prefill_parts(plan, bucket, self.row_params.packed))
        return Result(samples, np.arange(len(samples)), sampled, first=True)

    def _decode(self, plan: Plan, tables: Tables, ahead: int) -> Result:
        if not ahead and self.row_params.varying[plan.rows].any():  # a plan ends before a bias changes
            self.row_params.update_levels(plan.decodes, plan.positions + 1)
        needs, count = self.row_params.needs(plan.rows), len(plan.rows)
        if needs.level >= Level.EDITED and not ahead:
            self._install_edits(plan.decodes, (plan.positions + 1).tolist())
        reads = read_size(self.shapes, plan.positions + ahead, tables.seen[plan.rows])
        bucket = decode_bucket(self.program, self.shapes, count, reads, needs)
        self.padding += bucket.tokens - count
        parts = batches.decode_parts(plan, bucket, tables, self.row_params.packed, ahead)
        indices = batches.batch_indices(plan.rows, bucket.rows, tables.rows)
        return Result(plan.decodes, indices, self._dispatch(bucket, needs, parts), first=False)

    def _dispatch(self, bucket: Bucket, needs: Needs, parts: Mapping[str, np.ndarray]) -> Sampled:
        try:
            sampled = self._launch(bucket, batches.pack(bucket, parts))
        except Exception as error:
            raise EngineError(f"the step {bucket} failed: {type(error).__name__}: {error}") from error
        self.places += bucket.tokens
        return Sampled(
            sampled.tokens,
            sampled.logprobs if needs.logprobs >= 0 else None,
            sampled.prompt_logprobs if needs.prompt_logprobs else None,
            sampled.candidates,
        )

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

    def _install_edits(self, samples: Sequence[Sample], positions: Sequence[int]) -> None:
        """Update history and bias of EDITED rows on the device, if they have changed, for tokens at `positions`."""
        if self.edits is None:
            self._make_edits()
        for sequence, position in zip(samples, positions, strict=True):
            if self.row_params.levels[sequence.row] < Level.EDITED:
                continue
            version, bias = bias_row(sequence, position, self.edits.bias.shape[1])
            if version != sequence.bias_version:
                history = np.zeros(self.edits.history.shape[1], np.int32)
                history[: sequence.length] = sequence.tokens[: sequence.length]
                known = np.array(sequence.length, np.int32)
                self._launch(Install(), np.array(sequence.row, np.int32), history, known, bias)
                sequence.bias_version = version
