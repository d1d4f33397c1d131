"""Step inputs: a plan as arrays, padded to a bucket and packed into one int32 vector, i.e. one transfer per step."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Protocol, runtime_checkable

import jax
import numpy as np

from jaxinfer import functional
from jaxinfer.config import RAW_LOGPROBS
from jaxinfer.engine.plan import Chunk, Plan
from jaxinfer.engine.request import Sequence
from jaxinfer.engine.runner import adapted, steered
from jaxinfer.engine.sampling.sampling_rows import POSITION, ROW, WIDTH, Level
from jaxinfer.functional import PrefillBatch
from jaxinfer.kernels.attention.xla_attention import TILE
from jaxinfer.kernels.state.slots import Segments
from jaxinfer.kv.tables import Tables
from jaxinfer.media.rope_positions import plain

PARTS = 3
"""Maximum number of parts of a chunk after each of which recurrent layers store a state: a prompt has two boundaries
(`kv.manager`).
"""
NO_SLOT = 2**30
"""Slot id of padding: out of range, so reads return zeros and writes are dropped (`kernels.state`)."""


VERIFY = "verify"
"""Kind of the steps that verify drafts: a prefill of few tokens, each of which is sampled after."""


@dataclass(frozen=True)
class Bucket:
    """Static shape of a compiled step: one program per bucket."""

    kind: str
    """"prefill", "decode" or `VERIFY`."""
    tokens: int
    """Number of tokens: T for prefill, B for decode."""
    rows: int
    """Maximum number of sequences, and of samples, in the step."""
    width: int
    """W: number of blocks in a block table."""
    level: Level
    logprobs: int
    """Number of log-probabilities per sampled token; -1 for none."""
    prompt_logprobs: int = -1
    """Number of log-probabilities per prompt token; -1 for none."""
    items: int | None = None
    """Decode: number of work items (pieces of cached keys) that attention has room for."""
    groups: int = 1
    """Decode, and joint steps: number of groups of layers with a block table that grows with the sequence."""
    tile: int = TILE
    """Prefill: number of queries in a tile."""
    switched: bool = False
    """Whether parts of the sampler that no row needs are skipped at run time; `level`, `logprobs` and
    `prompt_logprobs` are then what the program supports, not what the step needs.
    """
    features: bool = False
    """Prefill: whether tokens may take rows of the feature pool."""
    contiguous: bool = False
    """Whether block tables follow from the rows (`kv.contiguous`); `width` is then the number of blocks a step can
    read.
    """
    states: bool = False
    """Whether the model has recurrent layers."""
    candidates: int = 0
    """Number of continuations found per row for beam searches; 0 if no row is a beam. With beams their tokens come
    from the host, which has chosen them.
    """
    cross: bool = False
    """Whether tokens attend to encoder positions."""
    pending: bool = False
    """Whether the step ends with logits, from which another program samples (`runner.logits`); `level` and `logprobs`
    then have their lowest values.
    """
    logit_rows: int = 0
    """Pending: number of rows of logits that the step returns, at least `rows`."""
    logprobs_mode: str = RAW_LOGPROBS
    """Logits from which log-probabilities are computed (`EngineConfig.logprobs_mode`)."""
    capture: tuple[str, ...] = ()
    """Paths of the modules whose outputs the step returns (`functional.taps`)."""
    steer: tuple[str, ...] = ()
    """Paths of the modules to whose outputs vectors are added (`runner.steered`)."""
    steers: int = 0
    """Number of different vectors per path."""
    steer_width: int = 0
    """Length of a vector."""
    adapters: bool = False
    """Whether projections have LoRA adapters (`functional.Program.adapters`)."""
    rope_axes: int = 0
    """Number of positions that rope rotates a token by (`Features.rope_axes`); 0 for its position alone."""
    decodes: int = 0
    """Prefill: number of sequences, at most, that are sampled or decoded in a joint step (`runner.joint`), and of
    places at its end for tokens of decodes; 0 for a step without decodes.
    """

    def __str__(self) -> str:
        keys = "" if self.items is None else f" items={self.items}"
        keys += f" decodes={self.decodes}" if self.decodes else ""
        keys += f" width={self.width}" if self.contiguous else ""
        keys += f" candidates={self.candidates}" if self.candidates else ""
        level = "" if self.switched else f" {self.level.name.lower()}"
        level = " pending" if self.pending else level
        level += f" capturing {', '.join(self.capture)}" if self.capture else ""
        level += f" steering {', '.join(self.steer)} by {self.steers}" if self.steer else ""
        return f"{self.kind} T={self.tokens} rows={self.rows}{keys}{level}"

    @property
    def takes(self) -> tuple[str | None, ...]:
        """Runner state passed to the step (see `keys.Key`)."""
        return ("params", "cache", "rows", self._edits, *(["features"] if self.features else []))

    @property
    def gives(self) -> tuple[str | None, ...]:
        """Runner state returned by the step before `Sampled` (see `keys.Key`)."""
        logits = ("logits", "prompt_logprobs", "captured") if self.pending else ()
        return ("cache", "rows", self._edits, *logits)

    @property
    def _edits(self) -> str | None:
        return "edits" if self.level >= Level.EDITED else None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parts of the packed vector, in order."""
        seen = {"seen": (self.tokens, 2)} if self.cross else {}
        seen |= steered.shapes(self) | adapted.shapes(self)
        if self.states:
            seen["states"] = (2, self.rows) if self.kind == "decode" else (len(Segments._fields), self.segments)
        if self.rope_axes:
            seen["rope_positions"] = (self.rows,) if self.kind == "decode" else (self.tokens, self.rope_axes)
        if self.kind == "decode":
            return {
                "sampling": (self.rows, WIDTH),
                "positions": (self.rows,),
                **({} if self.contiguous else {"blocks": (self.groups, self.rows)}),
                **seen,
                **({"tokens": (self.rows,)} if self.candidates else {}),
            }
        names = ("tokens", "positions", "rows", "rope_lengths", *(["features"] if self.features else []))
        tokens = dict.fromkeys(names, (self.tokens,))
        return {
            "sampling": (self.sampled, WIDTH),
            **tokens,
            "owners": (self.rows,),
            "tiles": (functional.tile_count(self.tokens, self.rows, self.tile), 4),
            "count": (),
            "last": (self.sampled,),
            "targets": (self.tokens if self.prompt_logprobs >= 0 else 0,),
            **seen,
            **self._joint,
        }

    @property
    def _joint(self) -> dict[str, tuple[int, ...]]:
        if not self.decodes:
            return {}
        blocks = {} if self.contiguous else {"blocks": (self.groups, self.decodes)}
        return {"decoding": (self.decodes,), **blocks}

    @property
    def sampled(self) -> int:
        """Number of rows of logits."""
        return self.decodes or self.rows

    @property
    def segments(self) -> int:
        """Prefill: maximum number of parts of chunks after which recurrent layers store a state (`kv.recurrent`)."""
        return PARTS * self.rows


@runtime_checkable
class StepShapes(Protocol):
    """Static shape of a compiled step."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parts of the packed vector, in order."""
        ...


def pack(bucket: StepShapes, parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Pack the parts of a bucket into one int32 vector, which is reversed (see `unpack`)."""
    packed = np.concatenate([np.asarray(parts[name], np.int32).ravel() for name in bucket.shapes])
    return np.ascontiguousarray(packed[::-1])


def unpack(bucket: StepShapes, packed: jax.Array) -> dict[str, jax.Array]:
    """Unpack a vector into its parts; the inverse of `pack`.

    A GPU receives the vector at another address in each step, and every kernel of a CUDA graph that reads it must be
    updated before the launch. The reversal is a kernel that XLA cannot leave out, so it is the only one.
    """
    packed = jax.lax.optimization_barrier(packed[::-1])
    parts, start = {}, 0
    for name, shape in bucket.shapes.items():
        size = math.prod(shape)
        parts[name] = packed[start : start + size].reshape(shape)
        start += size
    return parts


def batch_indices(rows: np.ndarray, size: int, all_rows: int) -> np.ndarray:
    """Return the index of each of `rows` in the batch of a step for `size` sequences.

    If the step has room for all rows, each row keeps its own index, so the step reads tables and tokens without a
    gather.
    """
    return rows if size == all_rows else np.arange(len(rows))


def sampling_rows(
    params: np.ndarray, rows: np.ndarray, indices: np.ndarray, positions: np.ndarray, size: int
) -> np.ndarray:
    """Return sampling parameters `[size, WIDTH]` for the batch of a step.

    Args:
        params: parameters of all rows, `[R, WIDTH]`.
        rows: rows of the step.
        indices: index of each row in the batch.
        positions: positions of the tokens to be sampled.
        size: batch size of the step.
    """
    packed = np.zeros((size, WIDTH), np.int32)
    packed[:, ROW] = len(params)
    packed[indices] = params[rows]
    packed[indices, POSITION] = positions
    return packed


def decode_parts(plan: Plan, bucket: Bucket, tables: Tables, params: np.ndarray, ahead: int) -> dict[str, np.ndarray]:
    """Build the inputs of decode step number `ahead` of a plan."""
    rows, now = plan.rows, plan.positions + ahead
    at = batch_indices(rows, bucket.rows, tables.rows)
    positions, blocks = np.full(bucket.rows, -1, np.int32), np.zeros((bucket.groups, bucket.rows), np.int32)
    positions[at] = now
    if not bucket.contiguous:
        blocks[:, at] = tables.at(rows, now // tables.block_size)
    sampling = sampling_rows(params, rows, at, now + 1, bucket.rows)
    seen = np.zeros((bucket.rows, 2), np.int32)
    seen[at] = tables.seen[rows]
    parts = {"sampling": sampling, "positions": positions, "blocks": blocks, "seen": seen}
    if bucket.states:
        parts["states"] = np.full((2, bucket.rows), NO_SLOT, np.int32)
        parts["states"][:, at] = plan.slots[ahead]
    if bucket.candidates:
        parts["tokens"] = np.full(bucket.rows, -1, np.int32)
        parts["tokens"][at] = [-1 if s.request.beams is None else s.tokens[s.length - 1] for s in plan.decodes]
    if bucket.rope_axes:
        parts["rope_positions"] = np.zeros(bucket.rows, np.int32)
        parts["rope_positions"][at] = now + np.array([s.request.rope_shift for s in plan.decodes], np.int32)
    places = at.tolist()
    return parts | steered.parts(bucket, plan.decodes, places) | adapted.parts(bucket, plan.decodes, places)


def prefill_parts(plan: Plan, bucket: Bucket, params: np.ndarray) -> dict[str, np.ndarray]:
    """Build the prefill inputs of a plan."""
    chunks = [(c.sequence.tokens[c.start : c.start + c.count], c.start, c.sequence.rope_base) for c in plan.chunks]
    seen = np.concatenate([c.seen for c in plan.chunks]) if bucket.cross else None
    batch = functional.prefill_batch(
        chunks,
        np.empty((len(chunks), 0), np.int32),  # the block tables are on the device
        tokens=bucket.tokens,
        rows=bucket.rows,
        samples=np.array([chunk for chunk, _ in plan.samples], np.int32),
        tile=bucket.tile,
        seen=seen,
        rope_positions=rope_positions((c.sequence, c.start, c.count) for c in plan.chunks)
        if bucket.rope_axes
        else None,
    )
    parts = {f.name: getattr(batch, f.name) for f in fields(PrefillBatch) if f.name not in ("tile", "tables")}
    parts["owners"] = np.zeros(bucket.rows, np.int32)
    parts["owners"][: len(chunks)] = [c.sequence.row for c in plan.chunks]
    rows = np.array([s.row for _, s in plan.samples], np.int32)
    positions = np.array([s.prefilled for _, s in plan.samples], np.int32)
    parts["sampling"] = sampling_rows(params, rows, np.arange(len(rows)), positions, bucket.sampled)
    targets = np.full(bucket.shapes["targets"], -1, np.int32)
    for span, chunk in zip(spans(plan), plan.chunks, strict=True):
        if wants_prompt_logprobs(chunk):
            first, known = scored_tokens(chunk)
            targets[span][first : first + len(known)] = known
    if bucket.features:
        parts["features"] = np.full(bucket.tokens, -1, np.int32)
        for span, chunk in zip(spans(plan), plan.chunks, strict=True):
            if chunk.features is not None:
                parts["features"][span] = chunk.features
    if bucket.states:
        parts["states"] = segments(plan, bucket)
    own = [chunk.sequence for chunk in plan.chunks], spans(plan)
    return parts | {"targets": targets} | steered.parts(bucket, *own) | adapted.parts(bucket, *own)


def verify_parts(plan: Plan, bucket: Bucket, params: np.ndarray) -> dict[str, np.ndarray]:
    """Build the inputs of the step that verifies a plan's drafts: of each sequence its last token and its draft."""
    chunks, owners, positions = [], [], []
    for sequence, row, start, draft in zip(plan.decodes, plan.rows, plan.positions.tolist(), plan.drafts, strict=True):
        chunks.append((np.append(sequence.tokens[start], draft), start, sequence.rope_base))
        owners += [row] * (len(draft) + 1)
        positions.append(np.arange(start, start + len(draft) + 1))
    drafted = zip(plan.decodes, plan.positions.tolist(), (len(draft) + 1 for draft in plan.drafts), strict=True)
    batch = functional.prefill_batch(
        chunks,
        np.empty((len(chunks), 0), np.int32),
        tokens=bucket.tokens,
        rows=bucket.rows,
        tile=bucket.tile,
        rope_positions=rope_positions(drafted) if bucket.rope_axes else None,
    )
    parts = {f.name: getattr(batch, f.name) for f in fields(PrefillBatch) if f.name not in ("tile", "tables")}
    parts["owners"] = np.zeros(bucket.rows, np.int32)
    parts["owners"][: len(chunks)] = plan.rows
    parts["last"] = np.arange(bucket.tokens)
    after = np.concatenate(positions) + 1
    parts["sampling"] = sampling_rows(params, np.array(owners), np.arange(len(owners)), after, bucket.rows)
    own = plan.decodes, draft_spans(plan)
    parts["targets"] = np.empty(0, np.int32)
    return parts | steered.parts(bucket, *own) | adapted.parts(bucket, *own)


def rope_positions(parts: Iterable[tuple[Sequence, int, int]]) -> np.ndarray:
    """Return the positions that rope rotates tokens by, `[T, 3]`: of each sequence `count` from position `start` on."""
    made = []
    for sequence, start, count in parts:
        rope = sequence.request.rope
        made.append(plain(start, count) if rope is None else rope.at(start, count))
    return np.concatenate(made)


def draft_spans(plan: Plan) -> list[slice]:
    """Return the slice of each sequence's tokens in the step that verifies a plan's drafts."""
    ends = np.cumsum([len(draft) + 1 for draft in plan.drafts]).tolist()
    return [slice(end - len(draft) - 1, end) for end, draft in zip(ends, plan.drafts, strict=True)]


def chunk_segments(plan: Plan) -> list[Segments]:
    """Return the parts of all chunks in order; the first begins at token 0."""
    listed, start = [], 0
    for chunk in plan.chunks:
        for part in chunk.segments:
            source = NO_SLOT if part.source < 0 else part.source
            listed.append(Segments(start, part.count, source, part.target, part.continues))
            start += part.count
    return listed


def segments(plan: Plan, bucket: Bucket) -> np.ndarray:
    """Return the parts of all chunks in order as `[fields, segments]` of `kernels.state.Segments`."""
    listed = chunk_segments(plan)
    packed = np.zeros((len(Segments._fields), bucket.segments), np.int32)
    packed[2:4] = NO_SLOT
    packed[:, : len(listed)] = np.array(listed, np.int32).T
    return packed


def wants_prompt_logprobs(chunk: Chunk) -> bool:
    """Return whether log-probabilities of a chunk's prompt tokens are requested."""
    return chunk.sequence.request.params.prompt_logprobs is not None and not chunk.sequence.made


def scored_tokens(chunk: Chunk) -> tuple[int, np.ndarray]:
    """Return the prompt tokens whose log-probabilities a chunk gives, and the index in the chunk of the first's
    predecessor."""
    first = max(0, chunk.sequence.request.first_scored - chunk.start)
    tokens = chunk.sequence.tokens[: chunk.sequence.length]
    return first, tokens[chunk.start + first + 1 : chunk.start + chunk.count + 1]


def wanted_modules(plan: Plan) -> tuple[str, ...]:
    """Return the paths of the modules whose outputs requests of a plan's prefill want."""
    wanted = ((chunk, chunk.sequence.request.wanted) for chunk in plan.chunks)
    found = {m for c, own in wanted if own is not None and c.start + c.count > own.first for m in own.modules}
    return tuple(sorted(found))


def spans(plan: Plan) -> list[slice]:
    """Return the slice of each chunk's tokens in the step."""
    ends = np.cumsum([chunk.count for chunk in plan.chunks])
    return [slice(int(end) - chunk.count, int(end)) for end, chunk in zip(ends, plan.chunks, strict=True)]
