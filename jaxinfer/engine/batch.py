"""A plan as arrays: padded to a bucket and packed into one int32 vector, so that a step has one transfer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import jax
import numpy as np

from jaxinfer import functional
from jaxinfer.engine.request import Sequence as Sample
from jaxinfer.engine.sampler import POSITION, ROW, WIDTH, Level, SamplingRows, pack_rows
from jaxinfer.engine.scheduler import Plan
from jaxinfer.functional import PrefillBatch
from jaxinfer.kv.tables import Tables


@dataclass(frozen=True)
class Bucket:
    """The static shape of a compiled step; one program a bucket."""

    kind: str
    """"prefill" or "decode"."""
    tokens: int
    """T for prefill; B for decode."""
    rows: int
    """Sequences, and samples, of the step."""
    width: int
    """W: blocks in a table."""
    level: Level
    logprobs: int
    """How many log-probabilities a sampled token comes with; -1 for none."""
    prompt_logprobs: int = -1
    """The same for the tokens of the prompt."""
    items: int | None = None
    """Decode: pieces of cached keys there is room for."""
    tile: int = functional.TILE
    """Prefill: queries of one tile."""

    def __str__(self) -> str:
        keys = "" if self.items is None else f" items={self.items}"
        return f"{self.kind} T={self.tokens} rows={self.rows}{keys} {self.level.name.lower()}"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The parts of the packed vector, in order."""
        if self.kind == "decode":
            return {
                "sampling": (self.rows, WIDTH),
                "positions": (self.rows,),
                "tables": (self.rows, self.width),
            }
        tokens = {name: (self.tokens,) for name in ("tokens", "positions", "rows", "rope_lengths")}
        return {
            "sampling": (self.rows, WIDTH), **tokens, "tables": (self.rows, self.width),
            "tiles": (functional.tile_count(self.tokens, self.rows, self.tile), 4), "count": (), "last": (self.rows,),
            "targets": (self.tokens if self.prompt_logprobs >= 0 else 0,),
        }  # fmt: skip


def pack(bucket: Bucket, parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """The parts of a bucket, one after another."""
    return np.concatenate([np.asarray(parts[name], np.int32).ravel() for name in bucket.shapes])


def unpack(bucket: Bucket, packed: jax.Array) -> dict[str, jax.Array]:
    """The reverse of `pack`; under jit its slices cost nothing."""
    parts, start = {}, 0
    for name, shape in bucket.shapes.items():
        size = math.prod(shape)
        parts[name] = packed[start : start + size].reshape(shape)
        start += size
    return parts


def sampling_rows(samples: Sequence[Sample], positions: np.ndarray, size: int, no_row: int) -> np.ndarray:
    """`[size, WIDTH]` packed settings of each sampled sequence; `positions` are those the tokens will have.

    What of a sequence does not change is packed once; its row and position are written over it.
    """
    packed = np.zeros((size, WIDTH), np.int32)
    packed[:, ROW] = no_row
    for i, sequence in enumerate(samples):
        if sequence.packed is None:
            sequence.packed = _settings(sequence)
        packed[i] = sequence.packed
        packed[i, ROW] = sequence.row
    packed[: len(samples), POSITION] = positions
    return packed


def _settings(sequence: Sample) -> np.ndarray:
    """`[WIDTH]` what a sequence asks of the sampler."""
    request, p = sequence.request, sequence.request.params
    values = SamplingRows(
        row=0, position=0, key=sequence.key[None], temperature=p.temperature, top_k=p.top_k, top_p=p.top_p,
        min_p=p.min_p, presence=p.presence_penalty, frequency=p.frequency_penalty, repetition=p.repetition_penalty,
        edited=request.level >= Level.EDITED, prompt_length=len(request.prompt),
    )  # fmt: skip
    return pack_rows(SamplingRows(*map(np.atleast_1d, values)))[0]


def decode_parts(plan: Plan, bucket: Bucket, tables: Tables) -> dict[str, np.ndarray]:
    """The decode half of a plan."""
    count = len(plan.decodes)
    positions = np.full(bucket.rows, -1, np.int32)
    positions[:count] = plan.positions
    blocks = np.zeros((bucket.rows, bucket.width), np.int32)
    blocks[:count] = tables.blocks[plan.rows, : bucket.width]
    sampling = sampling_rows(plan.decodes, plan.positions + 1, bucket.rows, tables.rows)
    return {"sampling": sampling, "positions": positions, "tables": blocks}


def prefill_parts(plan: Plan, bucket: Bucket, tables: Tables) -> dict[str, np.ndarray]:
    """The prefill half of a plan."""
    chunks = [
        (c.sequence.tokens[c.start : c.start + c.count], c.start, c.sequence.rope_base) for c in plan.chunks
    ]
    rows = [c.sequence.row for c in plan.chunks]
    batch = functional.prefill_batch(
        chunks, tables.blocks[rows, : bucket.width], tokens=bucket.tokens, rows=bucket.rows,
        samples=np.array([chunk for chunk, _ in plan.samples], np.int32), tile=bucket.tile,
    )  # fmt: skip
    parts = {f.name: getattr(batch, f.name) for f in fields(PrefillBatch) if f.name != "tile"}
    samples = [s for _, s in plan.samples]
    positions = np.array([s.prefilled for s in samples], np.int32)
    parts["sampling"] = sampling_rows(samples, positions, bucket.rows, tables.rows)
    targets = np.zeros(bucket.shapes["targets"], np.int32)
    if len(targets):
        for span, chunk in zip(spans(plan), plan.chunks, strict=True):
            tokens = chunk.sequence.tokens[: chunk.sequence.length]
            known = tokens[chunk.start + 1 : chunk.start + chunk.count + 1]
            targets[span][: len(known)] = known
    return parts | {"targets": targets}


def spans(plan: Plan) -> list[slice]:
    """Where each chunk's tokens lie in the step."""
    ends = np.cumsum([chunk.count for chunk in plan.chunks])
    return [slice(int(end) - chunk.count, int(end)) for end, chunk in zip(ends, plan.chunks, strict=True)]
