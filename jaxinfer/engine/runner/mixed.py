"""The step of a deterministic engine: prefill chunks and decodes as the tokens of one compiled program.

A compiler may add up the same numbers in another order for another shape or in another program. So all tokens of a
deterministic engine are computed by one program of one shape, whatever they are: a decoding sequence is a chunk of one
token. Its kernels compute a token in the same way whatever its neighbours are, and the logits of `head_rows` tokens at
a time are computed by one loop body, whether a token is sampled from them or a prompt's log-probability is needed.
"""

from dataclasses import dataclass

import numpy as np

from jaxinfer import functional
from jaxinfer.config import RAW_LOGPROBS
from jaxinfer.engine.plan import Plan
from jaxinfer.engine.runner import adapted
from jaxinfer.engine.runner.batch import (
    NO_SLOT,
    PARTS,
    chunk_segments,
    rope_positions,
    sampling_rows,
    scored_tokens,
    spans,
    wants_prompt_logprobs,
)
from jaxinfer.engine.sampling.sampling_rows import WIDTH, Level
from jaxinfer.kernels.state.slots import Segments
from jaxinfer.kv.tables import Tables


@dataclass(frozen=True)
class Mixed:
    """Static shape of the step of a deterministic engine (a `keys.Key`)."""

    tokens: int
    """T: number of tokens, prefill and decode together."""
    rows: int
    """R: maximum number of sequences, and of samples, in the step."""
    chunks: int
    """Maximum number of parts of prefill chunks."""
    width: int
    """W: number of blocks in a block table."""
    logprobs: int
    """Number of log-probabilities per sampled or prompt token beside its own."""
    head_rows: int
    """Number of tokens whose logits are computed at a time."""
    sampled_rows: int
    """Number of tokens that are sampled at a time; it divides `head_rows`."""
    tile: int
    """Number of queries in an attention tile."""
    groups: int
    """Number of groups of layers with a block table that grows with the sequence."""
    switched: bool
    """Whether parts of the sampler that no row needs are skipped at run time."""
    features: bool
    """Whether tokens may take rows of the feature pool."""
    cross: bool
    """Whether tokens attend to encoder positions."""
    states: bool
    """Whether the model has recurrent layers."""
    contiguous: bool
    """Whether block tables follow from the rows (`kv.contiguous`)."""
    rope_axes: int = 0
    """Number of positions that rope rotates a token by (`Features.rope_axes`); 0 for its position alone."""
    adapters: bool = False
    """Whether projections have LoRA adapters (`functional.Program.adapters`)."""
    logprobs_mode: str = RAW_LOGPROBS
    """Logits from which log-probabilities are computed (`EngineConfig.logprobs_mode`)."""
    capture: tuple[str, ...] = ()
    """Paths of the modules whose outputs the step returns (`functional.taps`)."""

    def __str__(self) -> str:
        return f"deterministic T={self.tokens} rows={self.rows}"

    @property
    def pending(self) -> bool:
        """Whether tokens are sampled by another program: never."""
        return False

    @property
    def level(self) -> Level:
        """Sampler features of the step: all."""
        return Level.EDITED

    @property
    def takes(self) -> tuple[str, ...]:
        """Runner state passed to the step (see `keys.Key`)."""
        return ("params", *self.gives, *(["features"] if self.features else []))

    @property
    def gives(self) -> tuple[str, ...]:
        """Runner state returned by the step before `Sampled` (see `keys.Key`)."""
        return ("cache", "rows", "edits")

    @property
    def sample_places(self) -> int:
        """Number of places for sampled tokens: `rows`, rounded up to whole turns of `head_rows`."""
        return _whole(self.rows, self.head_rows)

    @property
    def places(self) -> int:
        """Number of places whose logits a step may compute: those of samples, then one for each token."""
        return self.sample_places + _whole(self.tokens, self.head_rows)

    @property
    def segments(self) -> int:
        """Maximum number of parts of sequences after which recurrent layers store a state."""
        return self.rows + (PARTS - 1) * self.chunks

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parts of the packed vector, in order."""
        names = ("tokens", "positions", "rows", "rope_lengths", *(["features"] if self.features else []))
        shapes = dict.fromkeys(names, (self.tokens,)) | {
            "owners": (self.rows,),
            "tiles": (functional.tile_count(self.tokens, self.rows + self.chunks, self.tile), 4),
            "count": (),
            "at": (self.places,),
            "targets": (self.places,),
            "sampling": (self.places, WIDTH),
            "turns": (self.places // self.head_rows,),
            "turn_count": (),
            "ends": (self.places // self.head_rows,),
        }
        if not self.contiguous:
            shapes |= {"written": (2, self.rows), "blocks": (self.groups, self.rows)}
        if self.cross:
            shapes["seen"] = (self.tokens, 2)
        if self.states:
            shapes["states"] = (len(Segments._fields), self.segments)
        if self.rope_axes:
            shapes["rope_positions"] = (self.tokens, self.rope_axes)
        return shapes | adapted.shapes(self)


def _whole(count: int, size: int) -> int:
    return -(-count // size) * size


def mixed_parts(plan: Plan, bucket: Mixed, tables: Tables, params: np.ndarray, ahead: int) -> dict[str, np.ndarray]:
    """Build the inputs of a plan's step number `ahead`: tokens of the chunks, then one token for each decode.

    The tokens of decodes are -1: the device takes the row's last token.
    """
    rows, now = plan.rows, plan.positions + ahead
    parts = {name: np.zeros(shape, np.int32) for name, shape in bucket.shapes.items()}
    first = _chunk_tokens(plan, bucket, parts)
    here, sequences = slice(first, first + len(rows)), len(plan.chunks)
    parts["tokens"][here], parts["positions"][here], parts["rope_lengths"][here] = -1, now, now + 1
    parts["rows"][here] = sequences + np.arange(len(rows))
    parts["owners"][sequences : sequences + len(rows)] = rows
    tiles = int(parts["count"])
    columns = parts["rows"][here], np.arange(here.start, here.stop), now, np.ones(len(rows), np.int32)
    parts["tiles"][tiles : tiles + len(rows)] = np.stack(columns, axis=1)
    parts["count"] += len(rows)
    if not bucket.contiguous:
        number = now // tables.block_size
        parts["written"][0] = len(params)  # out of range: dropped
        parts["written"][:, : len(rows)] = rows, number
        parts["blocks"][:, : len(rows)] = tables.at(rows, number)
    if bucket.cross:
        parts["seen"][here] = tables.seen[rows]
    if bucket.rope_axes:
        shifts = np.array([s.request.rope_shift for s in plan.decodes], np.int32)
        parts["rope_positions"][here] = (now + shifts)[:, None]
    if bucket.states:
        _state_segments(plan, first, ahead, parts["states"])
    _places(plan, bucket, here, params, now, parts)
    own = [*(chunk.sequence for chunk in plan.chunks), *plan.decodes], [*spans(plan), *range(first, here.stop)]
    return parts | adapted.parts(bucket, *own)


def _chunk_tokens(plan: Plan, bucket: Mixed, parts: dict[str, np.ndarray]) -> int:
    """Fill in the tokens of prefill chunks; return their number."""
    parts["positions"][:], parts["rope_lengths"][:] = -1, 1
    if bucket.features:
        parts["features"][:] = -1
    if not plan.chunks:
        return 0
    chunks = [(c.sequence.tokens[c.start : c.start + c.count], c.start, c.sequence.rope_base) for c in plan.chunks]
    seen = np.concatenate([c.seen for c in plan.chunks]) if bucket.cross else None
    no_tables = np.empty((len(chunks), 0), np.int32)  # the block tables are on the device
    batch = functional.prefill_batch(chunks, no_tables, rows=len(chunks) + bucket.chunks, tile=bucket.tile, seen=seen)
    count = len(batch.tokens)
    for name in ("tokens", "positions", "rows", "rope_lengths", *(["seen"] if bucket.cross else [])):
        parts[name][:count] = getattr(batch, name)
    if bucket.rope_axes:
        parts["rope_positions"][:count] = rope_positions((c.sequence, c.start, c.count) for c in plan.chunks)
    tiles = int(batch.count)
    parts["tiles"][:tiles], parts["count"][...] = batch.tiles[:tiles], tiles
    parts["owners"][: len(chunks)] = [c.sequence.row for c in plan.chunks]
    for span, chunk in zip(spans(plan), plan.chunks, strict=True):
        if chunk.features is not None:
            parts["features"][span] = chunk.features
    return count


def _state_segments(plan: Plan, first: int, ahead: int, states: np.ndarray) -> None:
    """Fill in the state slots of chunks' parts and of decodes, the first of which is token `first`."""
    listed = chunk_segments(plan)
    states[2:4] = NO_SLOT
    if listed:
        states[:, : len(listed)] = np.array(listed, np.int32).T
    count = len(plan.rows)
    if count:
        sources, targets = plan.slots[ahead]
        own = Segments(first + np.arange(count), np.ones(count), sources, targets, np.zeros(count))
        states[:, len(listed) : len(listed) + count] = np.stack(own)


def _places(
    plan: Plan, bucket: Mixed, here: slice, params: np.ndarray, now: np.ndarray, parts: dict[str, np.ndarray]
) -> None:
    """Fill in whose logits are needed: of samples after chunks, then of decodes, then of prompts' tokens."""
    ends = np.cumsum([chunk.count for chunk in plan.chunks], dtype=np.int32)
    after = ends[np.array([chunk for chunk, _ in plan.samples], np.int32)] - 1 if plan.samples else ends[:0]
    parts["at"][:] = bucket.tokens  # out of range: rows of zeros, whose logits cost nothing
    at = np.concatenate([after, np.arange(here.start, here.stop)])
    rows = np.concatenate([np.array([s.row for _, s in plan.samples], np.int32), plan.rows])
    positions = np.concatenate([np.array([s.prefilled for _, s in plan.samples], np.int32), now + 1])
    parts["at"][: len(at)] = at
    parts["sampling"][:] = sampling_rows(params, rows, np.arange(len(rows)), positions, bucket.places)
    asked, offset = parts["targets"], bucket.sample_places
    asked[:] = -1
    for span, chunk in zip(spans(plan), plan.chunks, strict=True):
        if wants_prompt_logprobs(chunk):
            first, known = scored_tokens(chunk)
            start = offset + span.start + first
            asked[start : start + len(known)] = known
    scored = np.flatnonzero(asked >= 0)
    parts["at"][scored] = scored - offset
    needed = (parts["at"] < bucket.tokens).reshape(-1, bucket.head_rows)
    turns = np.flatnonzero(needed.any(axis=1))
    parts["turns"][: len(turns)], parts["turn_count"][...] = turns, len(turns)
    last = bucket.head_rows - needed[:, ::-1].argmax(axis=1)  # end of the places of a turn that are needed
    parts["ends"][:] = np.where(needed.any(axis=1), last, 0)
