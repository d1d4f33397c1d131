"""Compiled steps: their shapes, the step functions, and how they are jitted."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfer import functional
from jaxinfer.config import RAW_LOGPROBS
from jaxinfer.engine.multihost import divergence
from jaxinfer.engine.runner import batch as batches
from jaxinfer.engine.runner import steered
from jaxinfer.engine.runner.batch import Bucket
from jaxinfer.engine.runner.mixed import Mixed
from jaxinfer.engine.sampling.sampler import (
    Candidates,
    Edits,
    Logprobs,
    allow,
    candidates,
    logprobs,
    mask_width,
    reported,
    sample,
)
from jaxinfer.engine.sampling.sampling_rows import WIDTH, Level, SamplingRows, unpack_rows
from jaxinfer.functional import DecodeBatch, PrefillBatch, Program
from jaxinfer.functional.encoder_batch import EncodeBatch, EncodeShape
from jaxinfer.functional.taps import Captured, Taps
from jaxinfer.kernels.attention.paged import Cache
from jaxinfer.kernels.attention.xla_attention import decode_items
from jaxinfer.kernels.state.slots import DecodeSlots, Segments
from jaxinfer.kv.contiguous import Regions
from jaxinfer.models.base import FeatureRows, LanguageModel
from jaxinfer.sharding import mesh as meshes

PROMPT_ROWS = 64
"""Number of logits rows computed at a time for prompt log-probabilities."""


@dataclass(frozen=True)
class Shapes:
    """Sizes that fix the shapes of the compiled steps."""

    num_blocks: int
    """N: number of cache blocks."""
    block_size: int
    """P: positions in a block."""
    rows: int
    """R: maximum number of running sequences."""
    width: int
    """W: number of blocks of the longest sequence."""
    decode_buckets: tuple[int, ...]
    prefill_buckets: tuple[int, ...]
    prefill_rows: int
    """Maximum number of sequences in a prefill."""
    max_logprobs: int
    max_length: int
    """Maximum length of a sequence in tokens, at most W * P."""
    sampled_vocab: int
    """Number of token ids that may be sampled; the embedding may have more rows than the tokenizer has ids."""
    groups: int = 1
    """G: number of groups of layers, each with a block table."""
    switched: bool = False
    """Whether one program per bucket contains the whole sampler and skips at run time what no row needs."""
    feature_slots: int = 0
    """Number of encoder inputs whose features the feature pool holds; 0 if the model has no encoder."""
    encode_buckets: tuple[int, ...] = ()
    """Numbers of inputs that encoder steps are compiled for."""
    cross_buckets: tuple[int, ...] = ()
    """Numbers of values (such as text tokens) that encoder steps for cross-attention are compiled for."""
    state_slots: int = 0
    """Number of slots of recurrent state; 0 without recurrent layers."""
    contiguous: bool = False
    """Whether each row has W fixed blocks (`kv.contiguous`) instead of a block table."""
    logprobs_mode: str = RAW_LOGPROBS
    """What log-probabilities are of (`EngineConfig.logprobs_mode`)."""
    capture: tuple[str, ...] = ()
    """Paths of the modules whose outputs all steps return (`functional.taps`)."""

    @property
    def regions(self) -> Regions:
        """Layout of the rows' blocks in a contiguous cache."""
        return Regions(self.rows, self.width, self.groups)

    def items_bucket(self, rows: int, items: int) -> int:
        """Return the number of work items a decode step of `rows` rows is compiled for: `rows` or a doubling of it."""
        size = rows
        while size < items:
            size *= 2
        return min(size, decode_items(rows, self.width * self.block_size, self.block_size))


class RowState(NamedTuple):
    """Per-row state that stays on the device from step to step."""

    tokens: jax.Array
    """Last token of each row, `[R]` int32."""
    tables: jax.Array | None
    """Block tables of the rows for each group of layers, `[G, R, W]` int32; entries without a block are undefined.
    None if blocks follow from the row (`kv.contiguous`).
    """


class Sampled(NamedTuple):
    """Output of a step for the host."""

    tokens: jax.Array
    """Sampled tokens, `[B]`; `BAD_TOKEN` if the logits were not finite."""
    logprobs: Logprobs | None
    prompt_logprobs: Logprobs | None = None
    """Log-probabilities of each prompt token's successor, `[T, ...]`."""
    candidates: Candidates | None = None
    """Continuations of every row, if some rows are beams."""
    summary: jax.Array | None = None
    """Summary of the hidden states the tokens were sampled from (`multihost.divergence`), with several processes."""
    captured: Captured = {}
    """Outputs of the bucket's `capture`, with an entry for each token of the step."""


@dataclass(frozen=True)
class SampleMasked:
    """Key of the program that samples from the logits of a pending step, with a mask of allowed tokens per row."""

    rows: int
    """B: number of rows of the step."""
    level: Level
    logprobs: int
    candidates: int = 0
    switched: bool = False
    logprobs_mode: str = RAW_LOGPROBS
    """As in `Bucket`, like the fields above."""

    @property
    def takes(self) -> tuple[str | None, ...]:
        """Runner state passed to the program (see `programs.Key`)."""
        return (*self.gives, "logits", "summary")

    @property
    def gives(self) -> tuple[str | None, ...]:
        """Runner state returned by the program before `Sampled` (see `programs.Key`)."""
        return ("rows", "edits" if self.level >= Level.EDITED else None)


def replicated(program: Program) -> NamedSharding:
    """Return the sharding of all inputs and outputs of a step other than parameters and cache: replicated."""
    return NamedSharding(program.mesh, PartitionSpec())


def abstract_cache(program: Program, shapes: Shapes) -> Cache:
    """Return shapes and shardings of the cache without allocating it."""
    return functional.abstract_cache(program, shapes.num_blocks, shapes.block_size, shapes.state_slots)


def make_step(
    program: Program,
    shapes: Shapes,
    bucket: Bucket | Mixed,
    compiler_options: Mapping[str, Any] | None = None,
    body: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Return the jitted step of a bucket: (params, cache, rows, edits, packed) -> (cache, rows, edits, Sampled).

    The prefill of a model with an encoder also takes the feature pool, before `packed`, which is not donated.
    `compiler_options` are XLA options for this compilation alone. A pending bucket's step returns logits, summary and
    the prompt's log-probabilities in place of `Sampled`. `body` is the step function of a `Mixed` bucket.
    """
    if body is None:
        body = prefill_step if bucket.kind == "prefill" else decode_step
    everywhere, own = replicated(program), _by_device(program)
    result = Sampled(everywhere, everywhere, everywhere, everywhere, own, everywhere)
    last = (everywhere, own, everywhere, everywhere) if bucket.pending else (result,)
    return jax.jit(
        partial(body, program, bucket, shapes.sampled_vocab),
        donate_argnums=(1, 2, 3),
        out_shardings=(shardings(abstract_cache(program, shapes)), everywhere, everywhere, *last),
        compiler_options=None if compiler_options is None else dict(compiler_options),
    )


def abstract_arguments(program: Program, shapes: Shapes, bucket: Bucket | Mixed) -> tuple[Any, ...]:
    """Return shapes and shardings of a step's arguments after the parameters, to compile it without such a device."""
    array = partial(jax.ShapeDtypeStruct, sharding=replicated(program))
    size = sum(int(np.prod(shape)) for shape in bucket.shapes.values())
    edits = None
    if bucket.level >= Level.EDITED:
        edits = abstract_edits(program, shapes)
    pool = (abstract_features(program, shapes),) if bucket.features else ()
    return abstract_cache(program, shapes), abstract_rows(program, shapes), edits, *pool, array((size,), jnp.int32)


def _by_device(program: Program) -> NamedSharding:
    return NamedSharding(program.mesh, PartitionSpec(program.mesh.axis_names))


def shardings(cache: Cache) -> Cache:
    return jax.tree.map(lambda array: array.sharding, cache)


def abstract_rows(program: Program, shapes: Shapes) -> RowState:
    """Return shapes and shardings of the row state."""
    array = partial(jax.ShapeDtypeStruct, sharding=replicated(program))
    tables = None if shapes.contiguous else array((shapes.groups, shapes.rows, shapes.width), jnp.int32)
    return RowState(array((shapes.rows,), jnp.int32), tables)


def abstract_edits(program: Program, shapes: Shapes) -> Edits:
    """Return shapes and shardings of history `[R, L]` and bias `[R, V']`."""
    array, length = partial(jax.ShapeDtypeStruct, sharding=replicated(program)), shapes.width * shapes.block_size
    return Edits(array((shapes.rows, length), jnp.int32), array((shapes.rows, program.vocab), jnp.float32))


def abstract_features(program: Program, shapes: Shapes) -> jax.ShapeDtypeStruct:
    """Return shape and sharding of the feature pool `[F, M]`; each slot has `rows` rows."""
    rows = 0 if program.features is None else program.features.rows
    shape = (shapes.feature_slots * rows, program.feature_width)
    return jax.ShapeDtypeStruct(shape, program.dtype, sharding=replicated(program))


def encode_step(
    program: Program, params: list[jax.Array], pool: jax.Array, inputs: jax.Array, slots: jax.Array
) -> jax.Array:
    """Encode inputs `[n, *shape]` and write the result to slots `[n]` of the feature pool `[F, M]`.

    Slots out of range belong to padding and are dropped.
    """
    made = functional.encode(program, params, inputs)
    return pool.reshape(-1, *made.shape[1:]).at[slots].set(made.astype(pool.dtype), mode="drop").reshape(pool.shape)


def encode_cross_step(
    program: Program,
    shape: EncodeShape,
    params: list[jax.Array],
    cache: Cache,
    inputs: jax.Array,
    numbers: jax.Array,
    packed: jax.Array,
) -> Cache:
    """Encode inputs `[U, *shape]` with numbers `[U, A]` into the cache's cross-attention keys and values."""
    batch = EncodeBatch(inputs, numbers, **batches.unpack(shape, packed), tile=shape.tile)
    return functional.encode_cross(program, params, cache, batch)


def make_encode_step(
    program: Program, shapes: Shapes, shape: EncodeShape, compiler_options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Return the jitted step that encodes for cross-attention: (params, cache, inputs, numbers, packed) -> cache."""
    return jax.jit(
        partial(encode_cross_step, program, shape),
        donate_argnums=1,
        out_shardings=shardings(abstract_cache(program, shapes)),
        compiler_options=None if compiler_options is None else dict(compiler_options),
    )


def abstract_encode_arguments(program: Program, shapes: Shapes, shape: EncodeShape) -> tuple[Any, ...]:
    """Return shapes and shardings of the arguments of `make_encode_step` after the parameters."""
    source, array = program.cross, partial(jax.ShapeDtypeStruct, sharding=replicated(program))
    inputs = array((shape.units, *source.shape), jnp.float32 if source.shape else jnp.int32)
    packed = array((sum(map(math.prod, shape.shapes.values())),), jnp.int32)
    return abstract_cache(program, shapes), inputs, array((shape.units, source.numbers), jnp.int32), packed


def install_tables(rows: RowState, entries: jax.Array) -> RowState:
    """Write `entries` `[4, n]` (group, row, column, block id) to the block tables; drop rows out of range."""
    group, row, column, block = entries
    return rows._replace(tables=rows.tables.at[group, row, column].set(block, mode="drop"))


def mask_padding(logits: jax.Array, vocab: int) -> jax.Array:
    """Set the columns of logits `[B, V']` that no tokenizer id refers to to -inf."""
    if vocab >= logits.shape[-1]:
        return logits
    # Added instead of selected, so that a NaN row stays NaN.
    return logits + jnp.where(jnp.arange(logits.shape[-1]) < vocab, 0.0, -jnp.inf)


def _sample(
    program: Program,
    bucket: Bucket | SampleMasked,
    sampled_vocab: int,
    logits: jax.Array,
    rows: SamplingRows,
    edits: Edits | None,
    masks: jax.Array | None = None,
) -> tuple[Edits | None, Sampled]:
    """Sample tokens from logits `[B, V']`, with the bucket's log-probabilities and beam candidates.

    `masks` `[B, W]`: tokens that each row may sample (`sampler.allow`); None for all.
    """
    how, offered = {"switched": bucket.switched, "rule": None if program.cross is None else program.cross.rule}, None
    if bucket.candidates:
        offered = candidates(logits, rows, edits, bucket.candidates, sampled_vocab, **how)
    allowed = mask_padding(logits, sampled_vocab)
    if masks is not None:
        allowed = allow(allowed, masks)
    new, edits = sample(allowed, rows, edits, bucket.level, **how)
    if bucket.logprobs < 0:
        return edits, Sampled(new, None, candidates=offered)

    def compute() -> Logprobs:
        of = reported(logits, allowed, rows, edits, bucket.level, bucket.logprobs_mode, **how)
        return logprobs(of, new, bucket.logprobs, switched=bucket.switched, mode=bucket.logprobs_mode)

    beside = _if_requested(bucket, (rows.logprobs > 0).any(), bucket.rows, bucket.logprobs, compute)
    return edits, Sampled(new, beside, candidates=offered)


def _if_requested(
    bucket: Bucket | SampleMasked, requested: jax.Array, rows: int, count: int, compute: Callable[[], Logprobs]
) -> Logprobs:
    """Compute log-probabilities; in a switched program, return zeros if no row requests them."""
    if not bucket.switched:
        return compute()
    one, few = jax.ShapeDtypeStruct((rows,), jnp.float32), jax.ShapeDtypeStruct((rows, count), jnp.float32)
    none = Logprobs(one, one.update(dtype=jnp.int32), few.update(dtype=jnp.int32), few)
    return jax.lax.cond(requested, compute, lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), none))


def _prompt_logprobs(module: LanguageModel, hidden: jax.Array, targets: jax.Array, bucket: Bucket) -> Logprobs:
    """Compute log-probabilities of the targets `[T]`, each from its preceding hidden state `[T, M]`.

    They are computed a few rows at a time, as the logits of all tokens would be `[T, V]`.
    """
    tokens = len(targets)
    size = min(PROMPT_ROWS, tokens)
    padding = -tokens % size
    parts = (
        jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, size, hidden.shape[1]),
        jnp.pad(targets, (0, padding)).reshape(-1, size),
    )
    find = partial(logprobs, count=bucket.prompt_logprobs, switched=bucket.switched, mode=bucket.logprobs_mode)
    found = jax.lax.map(lambda part: find(module.logits(part[0]), part[1]), parts)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:tokens], found)


def reserved(
    program: Program, bucket: Bucket | Mixed, cache: Cache, rows: RowState, owners: jax.Array | None
) -> jax.Array:
    """Return block tables `[G, B, W]` of a contiguous cache for rows `owners` `[B]`; None for all rows."""
    groups, size = program.layout.groups, len(rows.tokens)
    regions = Regions(size, cache[0].keys.shape[0] // (groups * size), groups)
    return regions.tables(jnp.arange(size) if owners is None else owners, bucket.width)


def decode_step(
    program: Program,
    bucket: Bucket,
    sampled_vocab: int,
    params: list[jax.Array],
    cache: Cache,
    rows: RowState,
    edits: Edits | None,
    packed: jax.Array,
) -> tuple[Any, ...]:
    """Decode one token for every sequence. `rows` holds each row's last token and receives the new one.

    Returns:
        cache, rows, edits, `Sampled`; for a pending bucket cache, rows, edits, logits, summary, None, captured outputs.
    """
    parts = batches.unpack(bucket, packed)
    sampling, positions = unpack_rows(parts["sampling"]), parts["positions"]
    last, tables, owners = rows.tokens, rows.tables, None
    if bucket.rows < len(last):  # else each sequence is at its row's index (`batch.batch_indices`)
        last, owners = last.at[sampling.row].get(mode="clip"), sampling.row
    if bucket.candidates:
        last = jnp.where(parts["tokens"] < 0, last, parts["tokens"])
    if bucket.contiguous:
        own = reserved(program, bucket, cache, rows, owners)
    else:
        # Of the table entries that are read, only the block being written may have changed since the previous step.
        number = jnp.maximum(positions, 0) // cache[0].keys.shape[2]
        group = jnp.arange(bucket.groups)[:, None]
        tables = tables.at[group, sampling.row, number].set(parts["blocks"], mode="drop")
        own = tables if owners is None else tables.at[:, owners].get(mode="clip")
    states = DecodeSlots(*parts["states"]) if bucket.states else None
    batch = DecodeBatch(last, positions, own, bucket.items, parts.get("seen"), states)
    taps = Taps(bucket.capture, steered.added(bucket, parts))
    hidden, cache = functional.decode_hidden(program, params, cache, batch, taps=taps)
    logits = program.module(params).logits(hidden)
    if bucket.pending:
        rest = hidden_summary(program, hidden), None, taps.captured(hidden)
        return cache, RowState(rows.tokens, tables), edits, logits, *rest
    edits, sampled = _sample(program, bucket, sampled_vocab, logits, sampling, edits)
    rows = RowState(rows.tokens.at[sampling.row].set(sampled.tokens, mode="drop"), tables)
    sampled = sampled._replace(summary=hidden_summary(program, hidden), captured=taps.captured(hidden))
    return cache, rows, edits, sampled


def prefill_step(
    program: Program,
    bucket: Bucket,
    sampled_vocab: int,
    params: list[jax.Array],
    cache: Cache,
    rows: RowState,
    edits: Edits | None,
    *pool_and_packed: jax.Array,
) -> tuple[Any, ...]:
    """Prefill chunks, and sample a token for each sequence whose prompt is complete.

    `pool_and_packed` is the feature pool, if the bucket has `features`, and the packed inputs.

    Returns:
        As `decode_step`, with the prompt's log-probabilities in place of None for a pending bucket.
    """
    *pool, packed = pool_and_packed
    parts = batches.unpack(bucket, packed)
    features = FeatureRows(pool[0], parts.pop("features")) if bucket.features else None
    sampling, targets = unpack_rows(parts.pop("sampling")), parts.pop("targets")
    owners = parts.pop("owners")
    if bucket.states:
        parts["states"] = Segments(*parts["states"])
    tables = reserved(program, bucket, cache, rows, owners) if bucket.contiguous else rows.tables[:, owners]
    taps = Taps(bucket.capture, steered.added(bucket, parts))
    batch = PrefillBatch(**parts, tables=tables, tile=bucket.tile)
    hidden, cache = functional.prefill_hidden(program, params, cache, batch, features, taps=taps)
    module = program.module(params)
    last = hidden[parts["last"]]
    logits = module.logits(last)
    prompt = None
    if bucket.prompt_logprobs >= 0:
        prompt = _if_requested(
            bucket,
            (targets >= 0).any(),
            bucket.tokens,
            bucket.prompt_logprobs,
            lambda: _prompt_logprobs(module, hidden, targets, bucket),
        )
    if bucket.pending:
        return cache, rows, edits, logits, hidden_summary(program, last), prompt, taps.captured(hidden)
    edits, sampled = _sample(program, bucket, sampled_vocab, logits, sampling, edits)
    rows = rows._replace(tokens=rows.tokens.at[sampling.row].set(sampled.tokens, mode="drop"))
    sampled = sampled._replace(
        prompt_logprobs=prompt, summary=hidden_summary(program, last), captured=taps.captured(hidden)
    )
    return cache, rows, edits, sampled


def sample_masked(
    program: Program,
    key: SampleMasked,
    sampled_vocab: int,
    rows: RowState,
    edits: Edits | None,
    logits: jax.Array,
    summary: jax.Array | None,
    packed: jax.Array,
    masks: jax.Array,
) -> tuple[RowState, Edits | None, Sampled]:
    """Sample a token for each row of a pending step from its logits `[B, V']`.

    `packed` `[B, WIDTH]`: sampling parameters; `masks` `[B, W]` int32: tokens that each row may sample.
    """
    sampling = unpack_rows(packed)
    edits, sampled = _sample(program, key, sampled_vocab, logits, sampling, edits, masks)
    rows = rows._replace(tokens=rows.tokens.at[sampling.row].set(sampled.tokens, mode="drop"))
    return rows, edits, sampled._replace(summary=summary)


def make_sample_masked(
    program: Program, shapes: Shapes, key: SampleMasked, compiler_options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Return the jitted `sample_masked`: (rows, edits, logits, summary, packed, masks) -> (rows, edits, Sampled)."""
    everywhere = replicated(program)
    return jax.jit(
        partial(sample_masked, program, key, shapes.sampled_vocab),
        donate_argnums=(0, 1),
        out_shardings=(
            everywhere,
            everywhere,
            Sampled(everywhere, everywhere, everywhere, everywhere, _by_device(program), everywhere),
        ),
        compiler_options=None if compiler_options is None else dict(compiler_options),
    )


def abstract_sample_arguments(program: Program, shapes: Shapes, key: SampleMasked) -> tuple[Any, ...]:
    """Return shapes and shardings of the arguments of `make_sample_masked`."""
    array = partial(jax.ShapeDtypeStruct, sharding=replicated(program))
    edits = abstract_edits(program, shapes) if key.level >= Level.EDITED else None
    summary = None
    if meshes.processes(program.mesh) > 1:
        shape = program.mesh.size, divergence.GROUPS + 1
        summary = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=_by_device(program))
    return (
        abstract_rows(program, shapes),
        edits,
        array((key.rows, program.vocab), jnp.float32),
        summary,
        array((key.rows, WIDTH), jnp.int32),
        array((key.rows, mask_width(program.vocab)), jnp.int32),
    )


def hidden_summary(program: Program, hidden: jax.Array) -> jax.Array | None:
    """Summarise hidden states `[B, M]` for comparison between processes; None with a single one."""
    return divergence.summary(program.mesh, hidden) if meshes.processes(program.mesh) > 1 else None
