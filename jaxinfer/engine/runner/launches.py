"""Pack a plan into launches: the programs of a step, each with the host arrays that it is called with.

Packing reads all that a launch needs of the host's state, so the engine may change that state before the launch is
dispatched: a step waits for its programs to be compiled while requests are aborted and queued.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxinfer.engine.plan import Plan
from jaxinfer.engine.request import Sequence as Sample
from jaxinfer.engine.runner import batch as batches
from jaxinfer.engine.runner import joint, steered
from jaxinfer.engine.runner.batch import Bucket
from jaxinfer.engine.runner.buckets import (
    TABLE_WIDTHS,
    Needs,
    copy_widths,
    decode_bucket,
    encode_key,
    encode_pieces,
    encode_shape,
    encode_steps,
    joint_bucket,
    least,
    mixed_bucket,
    prefill_bucket,
    read_size,
    verify_bucket,
)
from jaxinfer.engine.runner.device_state import abstract_edits
from jaxinfer.engine.runner.keys import Copies, Encode, EncodeCross, EncodeJoint, Install, InstallTables, Key
from jaxinfer.engine.runner.logits import programs as programs_of
from jaxinfer.engine.runner.mixed import Mixed, mixed_parts
from jaxinfer.engine.runner.row_params import RowParams
from jaxinfer.engine.runner.shapes import Shapes
from jaxinfer.engine.sampling.parameters import bias_row
from jaxinfer.engine.sampling.sampling_rows import Level
from jaxinfer.functional import Program
from jaxinfer.functional.encoder_batch import EncodeJob, encode_batch
from jaxinfer.functional.taps import EXPERTS
from jaxinfer.kv.tables import Tables


@dataclass(frozen=True)
class Step:
    """Destination of the tokens that a prefill or decode program samples: sequences and places in its output."""

    samples: Sequence[Sample]
    indices: np.ndarray
    """Index of each sequence in the step's batch."""
    needs: Needs
    tokens: int
    """Number of tokens that the step computes, padding aside."""
    first: bool
    """Whether the tokens are the first ones after a prefill."""
    places: np.ndarray | None = None
    """Decode: index of each sequence's token among those of the step."""
    capture: tuple[str, ...] = ()
    """Outputs of modules that sequences of the step want."""
    drafts: Sequence[np.ndarray] | None = None
    """Drafts that the step verifies, in the order of the sequences; None if it verifies none."""


@dataclass(frozen=True)
class Launch:
    """A program and the host arrays that it is called with."""

    key: Key
    arrays: tuple[np.ndarray, ...]
    step: Step | None = None
    """For prefill and decode programs, and of a mixed or joint step for its chunks."""
    decodes: Step | None = None
    """For a mixed or joint step's decodes."""


class Packer:
    """Packer of a model's plans (`program`) into the inputs of steps of these shapes."""

    def __init__(
        self,
        program: Program,
        shapes: Shapes,
        substitute: Callable[[Bucket], Bucket],
        has: Callable[[Sequence[Key]], bool],
    ):
        """Pack for a model.

        Args:
            program, shapes: the model's program and step shapes.
            substitute: returns the decode program to run in place of one that may not be compiled yet.
            has: returns whether the programs of a joint step may be used.
        """
        self._program, self._shapes, self._substitute, self._has = program, shapes, substitute, has
        edits = abstract_edits(program, shapes)
        self._history_length, self._vocab = edits.history.shape[1], edits.bias.shape[1]

    def encodes(self, plan: Plan) -> list[Launch]:
        """Return the launches of a plan's encoders."""
        pool = self._encodes(plan) if plan.encodes else ()
        return [*pool, *(self._encodes_cross(plan.reads) if plan.reads else ())]

    def prefill(self, plan: Plan, params: RowParams) -> list[Launch]:
        """Return the launches of a plan's chunks; those of a deterministic engine belong to `decodes`.

        The rows' sampling parameters `params` are updated to those of the plan's sequences.
        """
        return self._prefill(plan, params) if plan.chunks and not self._program.deterministic else []

    def joint(self, plan: Plan, tables: Tables, params: RowParams) -> list[Launch]:
        """Return the launches of a plan's chunks and decodes as one step; none if they are two steps.

        `params` are updated as in `prefill`.
        """
        if not self._shapes.joint_buckets or not joint.serves(plan):
            return []
        samples, tokens = [s for _, s in plan.samples], sum(chunk.count for chunk in plan.chunks)
        everyone, count = [*samples, *plan.decodes], len(plan.decodes)
        rows = np.array([s.row for s in everyone], np.int32)
        positions = np.append(np.array([s.prefilled for s in samples], np.int32), plan.positions + 1)
        params.write(samples)
        params.update_levels(everyone, positions)
        needs = params.needs(rows)
        if needs.candidates or params.structured[rows].any():
            return []
        bucket = joint_bucket(self._program, self._shapes, tokens, count, len(samples), needs)
        if bucket is None:
            return []
        install = (Install(),) if needs.level >= Level.EDITED else ()
        if not self._has((*programs_of(self._shapes, bucket), *install)):
            return []
        edits = self._edits(everyone, positions.tolist(), params) if needs.level >= Level.EDITED else ()
        parts = joint.joint_parts(plan, bucket, tables, params.packed)
        own, total, experts = np.arange(count) - count, tokens + count, self._experts
        step = Step(samples, np.arange(len(samples)), needs, total, first=True, capture=experts)
        indices, places = bucket.decodes + own, bucket.tokens + own
        decodes = Step(plan.decodes, indices, needs, total, first=False, places=places, capture=experts)
        return [*edits, *self._launches(bucket, parts, step, decodes=decodes)]

    def decodes(self, plan: Plan, tables: Tables, params: RowParams) -> list[Launch]:
        """Return the launches of a plan's decode steps, or of all steps of a deterministic engine."""
        if self._program.deterministic:
            steps = range(plan.steps if plan.decodes else 1)
            return [launch for ahead in steps for launch in self._mixed(plan, tables, params, ahead)]
        if plan.drafts is not None:
            return self._verify(plan, params)
        steps = range(plan.steps if plan.decodes else 0)
        return [launch for ahead in steps for launch in self._decode(plan, tables, params, ahead)]

    def verify_keys(
        self, samples: Sequence[Sample], rows: np.ndarray, tokens: int, params: RowParams
    ) -> tuple[Key, ...]:
        """Return the programs of the step that verifies drafts of these rows, whose sequences are `samples`."""
        return programs_of(self._shapes, self._verify_bucket(samples, rows, tokens, params))

    def decode_keys(
        self, samples: Sequence[Sample], rows: np.ndarray, positions: np.ndarray, tables: Tables, params: RowParams
    ) -> tuple[Key, ...]:
        """Return the programs of a decode step of these rows, whose sequences `samples` write `positions`."""
        self._update_levels(samples, rows, positions, params)
        bucket = self._decode_bucket(samples, rows, positions, tables, params, params.needs(rows))
        return programs_of(self._shapes, bucket, masked=bool(params.structured[rows].any()))

    def copies(self, sources: np.ndarray, targets: np.ndarray) -> Iterator[Launch]:
        """Copy blocks."""
        widths = copy_widths(self._shapes)
        for start in range(0, len(sources), widths[-1]):
            some = slice(start, start + widths[-1])
            count = len(sources[some])
            width = least(widths, count)
            ids = np.zeros(width, np.int32), np.full(width, self._shapes.num_blocks, np.int32)
            ids[0][:count], ids[1][:count] = sources[some], targets[some]
            yield Launch(Copies(width), ids)

    def tables(self, entries: np.ndarray) -> Iterator[Launch]:
        """Send block table updates `[4, n]` (`Tables.take_unsent`)."""
        while count := entries.shape[1]:
            width = least(TABLE_WIDTHS, min(count, TABLE_WIDTHS[-1]))
            padded = np.full((4, width), self._shapes.rows, np.int32)
            padded[:, :count] = entries[:, :width]
            yield Launch(InstallTables(width), (padded,))
            entries = entries[:, width:]

    def _encodes(self, plan: Plan) -> Iterator[Launch]:
        """Encode all inputs of a plan together, whichever prompts they belong to."""
        if self._program.features.joint is not None:
            yield from self._encodes_joint(plan)
            return
        values = np.concatenate([one.values for one, _ in plan.encodes])
        slots = np.concatenate([np.asarray(slots, np.int32) for _, slots in plan.encodes])
        start = 0
        for size in encode_pieces(self._shapes, len(slots)):
            some = slice(start, start + size)
            inputs, targets = values[some], slots[some]
            padding = size - len(targets)
            inputs = np.pad(inputs, [(0, padding), *[(0, 0)] * (inputs.ndim - 1)])
            targets = np.pad(targets, (0, padding), constant_values=self._shapes.feature_slots)
            yield Launch(Encode(size), (inputs, targets))
            start += size

    def _encodes_joint(self, plan: Plan) -> Iterator[Launch]:
        """Encode inputs whole: as many as the largest step has room for, or each alone in a deterministic engine."""
        program, shapes = self._program, self._shapes
        jobs = [EncodeJob(one, np.empty((0, 0), np.int32), slots=slots) for one, slots in plan.encodes]
        together = encode_steps(jobs, encode_key(program, shapes, shapes.encode_buckets[-1]))
        for step in [[job] for job in jobs] if program.deterministic else together:
            key = encode_key(program, shapes, sum(job.input.count for job in step))
            batch = encode_batch(program.features, step, 1, 0, key)
            slots = np.full(key.units, shapes.feature_slots, np.int32)
            known = [slot for job in step for slot in job.slots]
            slots[: len(known)] = known
            packed = batches.pack(key, {name: getattr(batch, name) for name in key.shapes})
            yield Launch(key, (batch.inputs, batch.numbers, slots, packed))

    def _encodes_cross(self, jobs: Sequence[EncodeJob]) -> Iterator[Launch]:
        """Encode the cross-attention inputs of a plan's prompts into the cache."""
        program, shapes = self._program, self._shapes
        together = encode_steps(jobs, encode_shape(program, shapes, shapes.cross_buckets[-1]))
        for step in [[job] for job in jobs] if program.deterministic else together:
            key = EncodeCross(**vars(encode_shape(program, shapes, sum(job.input.count for job in step))))
            batch = encode_batch(program.cross, step, shapes.block_size, shapes.num_blocks, key)
            packed = batches.pack(key, {name: getattr(batch, name) for name in key.shapes})
            yield Launch(key, (batch.inputs, batch.numbers, packed))

    def _prefill(self, plan: Plan, params: RowParams) -> list[Launch]:
        samples, tokens = [s for _, s in plan.samples], sum(chunk.count for chunk in plan.chunks)
        positions = np.array([s.prefilled for s in samples], np.int32)
        params.write(samples)
        params.update_levels(samples, positions)
        prompt_logprobs = any(batches.wants_prompt_logprobs(chunk) for chunk in plan.chunks)
        rows = np.array([s.row for s in samples], np.int32)
        needs = params.needs(rows)._replace(prompt_logprobs=prompt_logprobs)
        edits = self._edits(samples, positions.tolist(), params) if needs.level >= Level.EDITED else []
        capture = self._capture(plan)
        steering = steered.fields([chunk.sequence for chunk in plan.chunks])
        bucket = prefill_bucket(self._program, self._shapes, tokens, needs, capture, **steering)
        parts = batches.prefill_parts(plan, bucket, params.packed)
        step = Step(samples, np.arange(len(samples)), needs, tokens, first=True, capture=capture)
        return [*edits, *self._launches(bucket, parts, step, masked=bool(params.structured[rows].any()))]

    def _decode(self, plan: Plan, tables: Tables, params: RowParams, ahead: int) -> list[Launch]:
        if not ahead:  # a plan ends before a bias changes
            self._update_levels(plan.decodes, plan.rows, plan.positions, params)
        needs, count = params.needs(plan.rows), len(plan.rows)
        edits: Iterable[Launch] = ()
        if needs.level >= Level.EDITED and not ahead:
            edits = self._edits(plan.decodes, (plan.positions + 1).tolist(), params)
        bucket = self._decode_bucket(plan.decodes, plan.rows, plan.positions + ahead, tables, params, needs)
        parts = batches.decode_parts(plan, bucket, tables, params.packed, ahead)
        indices = batches.batch_indices(plan.rows, bucket.rows, tables.rows)
        step = Step(plan.decodes, indices, needs, count, first=False, places=indices, capture=self._experts)
        return [*edits, *self._launches(bucket, parts, step, masked=bool(params.structured[plan.rows].any()))]

    def _verify(self, plan: Plan, params: RowParams) -> list[Launch]:
        """Pack the step that verifies a plan's drafts."""
        self._update_levels(plan.decodes, plan.rows, plan.positions, params)
        needs, edits = params.needs(plan.rows), []
        if needs.level >= Level.EDITED:
            edits = list(self._edits(plan.decodes, (plan.positions + 1).tolist(), params))
        tokens = len(plan.rows) + sum(map(len, plan.drafts))
        bucket = self._verify_bucket(plan.decodes, plan.rows, tokens, params)
        parts = batches.verify_parts(plan, bucket, params.packed)
        samples = [s for s, draft in zip(plan.decodes, plan.drafts, strict=True) for _ in range(len(draft) + 1)]
        step = Step(samples, np.arange(tokens), needs, tokens, first=False, drafts=plan.drafts)
        return [*edits, *self._launches(bucket, parts, step)]

    def _verify_bucket(self, samples: Sequence[Sample], rows: np.ndarray, tokens: int, params: RowParams) -> Bucket:
        return verify_bucket(self._program, self._shapes, tokens, params.needs(rows), **steered.fields(samples))

    def _decode_bucket(
        self,
        samples: Sequence[Sample],
        rows: np.ndarray,
        positions: np.ndarray,
        tables: Tables,
        params: RowParams,
        needs: Needs,
    ) -> Bucket:
        reads = read_size(self._shapes, positions, tables.seen[rows])
        bucket = decode_bucket(self._program, self._shapes, len(rows), reads, needs, **steered.fields(samples))
        return bucket if params.structured[rows].any() else self._substitute(bucket)

    def _launches(
        self,
        bucket: Bucket,
        parts: Mapping[str, np.ndarray],
        step: Step,
        *,
        masked: bool = False,
        decodes: Step | None = None,
    ) -> list[Launch]:
        """Return the launches of a step: the first takes its arrays, and a second one samples from its logits.

        With `masked`, the latter takes the rows' masks, which are computed when it is dispatched.
        """
        first, *rest = programs_of(self._shapes, bucket, masked=masked)
        own = Launch(first, (batches.pack(first, parts),), step, decodes)
        return [own, *(Launch(key, (), step, decodes) for key in rest)]

    def _update_levels(
        self, samples: Sequence[Sample], rows: np.ndarray, positions: np.ndarray, params: RowParams
    ) -> None:
        if params.varying[rows].any():
            params.update_levels(samples, positions + 1)

    def _mixed(self, plan: Plan, tables: Tables, params: RowParams, ahead: int) -> list[Launch]:
        """Pack step number `ahead` of a plan for the one program of a deterministic engine."""
        samples, chunked = [s for _, s in plan.samples], np.array([s.prefilled for _, s in plan.samples], np.int32)
        edits: Iterable[Launch] = ()
        if not ahead:
            params.write(samples)
            everyone, positions = [*samples, *plan.decodes], np.concatenate([chunked, plan.positions + 1])
            params.update_levels(everyone, positions)
            if params.needs(np.array([s.row for s in everyone], np.int32)).level >= Level.EDITED:
                edits = self._edits(everyone, positions.tolist(), params)
        bucket = mixed_bucket(self._program, self._shapes)
        parts = mixed_parts(plan, bucket, tables, params.packed, ahead)
        prompts = any(batches.wants_prompt_logprobs(chunk) for chunk in plan.chunks)
        needs = Needs(Level.EDITED, self._shapes.max_logprobs, prompts)
        tokens = len(plan.rows) + sum(chunk.count for chunk in plan.chunks)
        capture = self._capture(plan)
        step = Step(samples, np.arange(len(samples)), needs, tokens, first=True, capture=capture)
        own = np.arange(len(plan.decodes))
        indices, places = len(samples) + own, tokens - len(plan.rows) + own
        decodes = Step(plan.decodes, indices, needs, tokens, first=False, places=places, capture=self._experts)
        decodes = decodes if plan.decodes else None
        return [*edits, Launch(bucket, (batches.pack(bucket, parts),), step, decodes)]

    @property
    def _experts(self) -> tuple[str, ...]:
        """Module outputs that the steps of every request return."""
        return (EXPERTS,) if EXPERTS in self._shapes.capture else ()

    def _capture(self, plan: Plan) -> tuple[str, ...]:
        """Return the paths of modules whose outputs were requested for a plan's chunks."""
        return (*self._experts, *batches.wanted_modules(plan)) if plan.chunks else ()

    def _edits(self, samples: Sequence[Sample], positions: Sequence[int], params: RowParams) -> Iterator[Launch]:
        """Update history and bias of EDITED rows on the device, if they have changed, for tokens at `positions`."""
        for sequence, position in zip(samples, positions, strict=True):
            if params.levels[sequence.row] < Level.EDITED:
                continue
            version, bias = bias_row(sequence, position, self._vocab)
            if version != sequence.bias_version:
                history = np.zeros(self._history_length, np.int32)
                history[: sequence.length] = sequence.tokens[: sequence.length]
                known = np.array(sequence.length, np.int32)
                yield Launch(Install(), (np.array(sequence.row, np.int32), history, known, bias))
                sequence.bias_version = version


def describe(key: Key) -> str:
    """Return a program's name for an error message."""
    if isinstance(key, Bucket | Mixed):
        return f"the step {key}"
    if isinstance(key, Encode):
        return f"the encoder step of {key.count}"
    if isinstance(key, EncodeJoint | EncodeCross):
        return f"the encoder step of {key.units}"
    return f"the program {key}"
