"""A plan as arrays: padded to a bucket and packed into one int32 vector, so that a step has one transfer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import jax
import numpy as np

from jaxinfer import functional
from jaxinfer.engine.request import Sequence as Sample
from jaxinfer.engine.sampler import WIDTH, Level, SamplingRows, pack_rows
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

    def __str__(self) -> str:
        return f"{self.kind} T={self.tokens} rows={self.rows} W={self.width} {self.level.name.lower()}"

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
            "tiles": (functional.tile_count(self.tokens, self.rows), 4), "count": (), "last": (self.rows,),
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


def sampling_rows(samples: Sequence[Sample], positions: np.ndarray, size: int, no_row: int) -> SamplingRows:
    """The settings of each sampled sequence, padded to `size` rows; `positions` are those the tokens will have."""
    count = len(samples)

    def column(values: Sequence[float] | np.ndarray, fill: float, dtype: type) -> np.ndarray:
        padded = np.full(size, fill, dtype)
        padded[:count] = values
        return padded

    params = [s.request.params for s in samples]
    keys = np.zeros((size, 2), np.uint32)
    if count:
        keys[:count] = [s.key for s in samples]
    return SamplingRows(
        row=column([s.row for s in samples], no_row, np.int32),
        position=column(positions, 0, np.int32),
        key=keys,
        temperature=column([p.temperature for p in params], 0, np.float32),
        top_k=column([p.top_k for p in params], 0, np.int32),
        top_p=column([p.top_p for p in params], 1, np.float32),
        min_p=column([p.min_p for p in params], 0, np.float32),
        presence=column([p.presence_penalty for p in params], 0, np.float32),
        frequency=column([p.frequency_penalty for p in params], 0, np.float32),
        repetition=column([p.repetition_penalty for p in params], 1, np.float32),
        edited=column([s.request.level >= Level.EDITED for s in samples], 0, np.int32),
        prompt_length=column([len(s.request.prompt) for s in samples], 0, np.int32),
    )


def decode_parts(plan: Plan, bucket: Bucket, tables: Tables) -> dict[str, np.ndarray]:
    """The decode half of a plan."""
    count = len(plan.decodes)
    positions = np.full(bucket.rows, -1, np.int32)
    positions[:count] = plan.positions
    blocks = np.zeros((bucket.rows, bucket.width), np.int32)
    blocks[:count] = tables.blocks[plan.rows, : bucket.width]
    sampling = sampling_rows(plan.decodes, plan.positions + 1, bucket.rows, tables.rows)
    return {"sampling": pack_rows(sampling), "positions": positions, "tables": blocks}


def prefill_parts(plan: Plan, bucket: Bucket, tables: Tables) -> dict[str, np.ndarray]:
    """The prefill half of a plan."""
    chunks = [
        (c.sequence.tokens[c.start : c.start + c.count], c.start, c.sequence.rope_base) for c in plan.chunks
    ]
    rows = [c.sequence.row for c in plan.chunks]
    batch = functional.prefill_batch(
        chunks, tables.blocks[rows, : bucket.width], tokens=bucket.tokens, rows=bucket.rows,
        samples=np.array([chunk for chunk, _ in plan.samples], np.int32),
    )  # fmt: skip
    parts = {f.name: getattr(batch, f.name) for f in fields(PrefillBatch)}
    samples = [s for _, s in plan.samples]
    positions = np.array([s.prefilled for s in samples], np.int32)
    parts["sampling"] = pack_rows(sampling_rows(samples, positions, bucket.rows, tables.rows))
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
