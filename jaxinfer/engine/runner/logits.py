"""Steps in two programs: one computes logits, another one samples from them.

On a GPU all steps are such pairs, so that the layers are compiled once for each size of a step and not for each of the
sampler's variants. On a CPU, where one program has the whole sampler, only steps with structured outputs are: their
masks are computed between the two.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfer.config import RAW_LOGPROBS
from jaxinfer.engine.multihost import divergence
from jaxinfer.engine.runner.batch import NO_SLOT, VERIFY, Bucket
from jaxinfer.engine.runner.device_state import RowState, abstract_edits, abstract_rows, by_device, replicated
from jaxinfer.engine.runner.shapes import Shapes
from jaxinfer.engine.runner.step_sampling import Sampled, sample_tokens, store_verified
from jaxinfer.engine.sampling.sampler import Edits, mask_width
from jaxinfer.engine.sampling.sampling_rows import ROW, WIDTH, Level, unpack_rows
from jaxinfer.functional import Program
from jaxinfer.sharding import axes
from jaxinfer.sharding import mesh as meshes

SIZES = 8, 64
"""Smallest numbers of rows that samplers of a GPU are compiled for; the largest is that of the largest step. A sampler
reads the logits some fifty times where it searches for thresholds, so it is not always compiled for the largest."""


class Logits(NamedTuple):
    """Output of a pending step, from which tokens are sampled."""

    values: jax.Array
    """Logits `[S, V']` float32."""
    sampling: jax.Array
    """Packed sampling parameters of the rows, `[S, WIDTH]` int32 (`sampling_rows.pack_rows`)."""
    summary: jax.Array | None = None
    """Summary of the step's hidden states (`Sampled.summary`)."""
    drafted: jax.Array | None = None
    """Tokens of a step that verifies drafts, `[S]` int32; None for other steps."""


@dataclass(frozen=True)
class SampleLogits:
    """Key of the program that samples from the logits of a pending step."""

    rows: int
    """S: number of rows of logits."""
    level: Level
    logprobs: int
    candidates: int = 0
    switched: bool = False
    logprobs_mode: str = RAW_LOGPROBS
    """As in `Bucket`, like the fields above."""
    verify: bool = False
    """Whether the step verifies drafts."""
    masked: bool = False
    """Whether each row comes with a mask of the tokens that its grammar allows."""

    def __str__(self) -> str:
        level = "" if self.switched else f" {self.level.name.lower()}"
        parts = [f" logprobs={self.logprobs}"] if self.logprobs >= 0 and not self.switched else []
        parts += [" of drafts"] if self.verify else []
        return f"sampler rows={self.rows}{level}{''.join(parts)}{' with masks' if self.masked else ''}"

    @property
    def takes(self) -> tuple[str | None, ...]:
        """Runner state passed to the program (see `keys.Key`)."""
        return (*self.gives, "logits")

    @property
    def gives(self) -> tuple[str | None, ...]:
        """Runner state returned by the program before `Sampled` (see `keys.Key`)."""
        return ("rows", "edits" if self.level >= Level.EDITED else None)


def logit_rows(shapes: Shapes, bucket: Bucket) -> int:
    """Return S, the number of rows of logits that a pending step of this bucket returns: one of a few."""
    if shapes.switched:
        return bucket.sampled
    rows, most = bucket.sampled, max(shapes.rows, shapes.prefill_rows)
    return next((size for size in (*(size for size in SIZES if size < most), most) if size >= rows), rows)


def divided(shapes: Shapes, bucket: Bucket, *, masked: bool = False) -> tuple[Bucket, SampleLogits]:
    """Divide a step in two: the bucket of the step up to its logits, and the program that samples from these."""
    names = ("level", "logprobs", "candidates", "switched", "logprobs_mode")
    fields = {name: getattr(bucket, name) for name in names}
    rows, level = logit_rows(shapes, bucket), Level.GREEDY
    pending = replace(bucket, pending=True, level=level, logprobs=-1, logit_rows=rows)
    return pending, SampleLogits(rows, **fields, verify=bucket.kind == VERIFY, masked=masked)


def joined(pending: Bucket, sampler: SampleLogits) -> Bucket:
    """Return the step that was divided into these two."""
    return replace(pending, pending=False, level=sampler.level, logprobs=sampler.logprobs, logit_rows=0)


def programs(shapes: Shapes, bucket: Bucket, *, masked: bool = False) -> tuple[Bucket | SampleLogits, ...]:
    """Return the keys of the programs of a step, in their order; `masked`: whether some row has a grammar."""
    return (bucket,) if shapes.switched and not masked else divided(shapes, bucket, masked=masked)


def pending_logits(
    bucket: Bucket, values: jax.Array, packed: jax.Array, summary: jax.Array | None, tokens: jax.Array
) -> Logits:
    """Return a pending step's logits, padded to the rows of the sampler.

    Args:
        bucket: the step.
        values: logits, `[B, V']`.
        packed: packed sampling parameters of these rows, `[B, WIDTH]`.
        summary: summary of the hidden states.
        tokens: tokens of the step.
    """
    padding = (0, bucket.logit_rows - len(values)), (0, 0)
    drafted = jnp.pad(tokens, padding[0]) if bucket.kind == VERIFY else None
    if padding[0][1]:
        outside = jnp.arange(bucket.logit_rows) >= len(values)
        values, packed = jnp.pad(values, padding), jnp.pad(packed, padding)
        packed = packed.at[:, ROW].set(jnp.where(outside, NO_SLOT, packed[:, ROW]))
    return Logits(values, packed, summary, drafted)


def sample_logits(
    program: Program,
    key: SampleLogits,
    sampled_vocab: int,
    rows: RowState,
    edits: Edits | None,
    logits: Logits,
    *masks: jax.Array,
) -> tuple[RowState, Edits | None, Sampled]:
    """Sample a token for each row of a pending step from its logits.

    `masks` `[S, W]` int32: tokens that each row may sample (`sampler.allow`), if the program is `masked`.
    """
    sampling = unpack_rows(logits.sampling)
    edits, sampled = sample_tokens(program, key, sampled_vocab, logits.values, sampling, edits, *masks)
    if key.verify:
        tokens = store_verified(rows.tokens, sampling.row, sampled.tokens, logits.drafted)
    else:
        tokens = rows.tokens.at[sampling.row].set(sampled.tokens, mode="drop")
    return rows._replace(tokens=tokens), edits, sampled._replace(summary=logits.summary)


def make_sample_logits(
    program: Program, shapes: Shapes, key: SampleLogits, compiler_options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Return the jitted `sample_logits`: (rows, edits, logits, masks if masked) -> (rows, edits, Sampled)."""
    everywhere = replicated(program)
    return jax.jit(
        partial(sample_logits, program, key, shapes.sampled_vocab),
        donate_argnums=(0, 1),
        out_shardings=(
            everywhere,
            everywhere,
            Sampled(everywhere, everywhere, everywhere, everywhere, by_device(program), everywhere),
        ),
        compiler_options=None if compiler_options is None else dict(compiler_options),
    )


def logits_shardings(program: Program) -> Logits:
    """Return the shardings of a pending step's output: logits are divided over the vocabulary as the head is."""
    everywhere, columns = replicated(program), PartitionSpec(None, axes.MODEL if program.divided_logits else None)
    return Logits(NamedSharding(program.mesh, columns), everywhere, by_device(program), everywhere)


def abstract_sample_arguments(program: Program, shapes: Shapes, key: SampleLogits) -> tuple[Any, ...]:
    """Return shapes and shardings of the arguments of `make_sample_logits`."""
    where = logits_shardings(program)
    edits = abstract_edits(program, shapes) if key.level >= Level.EDITED else None
    summary = drafted = None
    if meshes.processes(program.mesh) > 1:
        shape = program.mesh.size, divergence.GROUPS + 1
        summary = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where.summary)
    if key.verify:
        drafted = jax.ShapeDtypeStruct((key.rows,), jnp.int32, sharding=where.drafted)
    logits = Logits(
        jax.ShapeDtypeStruct((key.rows, program.vocab), jnp.float32, sharding=where.values),
        jax.ShapeDtypeStruct((key.rows, WIDTH), jnp.int32, sharding=where.sampling),
        summary,
        drafted,
    )
    shape = key.rows, mask_width(program.vocab)
    masks = [jax.ShapeDtypeStruct(shape, jnp.int32, sharding=replicated(program))] if key.masked else []
    return abstract_rows(program, shapes), edits, logits, *masks


def logits_bytes(program: Program, key: SampleLogits) -> int:
    """Return the bytes of the logits that a device keeps while it samples from them."""
    shards = meshes.size(program.mesh) if program.divided_logits else 1
    return key.rows * program.vocab // shards * np.dtype(np.float32).itemsize
