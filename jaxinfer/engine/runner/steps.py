"""Compiled steps of the decoder: prefill and decode, and how they are jitted."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import functional
from jaxinfer.engine.runner import batch as batches
from jaxinfer.engine.runner import steered
from jaxinfer.engine.runner.batch import VERIFY, Bucket
from jaxinfer.engine.runner.device_state import (
    RowState,
    abstract_cache,
    abstract_edits,
    abstract_features,
    abstract_rows,
    by_device,
    replicated,
    shardings,
)
from jaxinfer.engine.runner.joint_step import take_decodes
from jaxinfer.engine.runner.logits import logits_shardings, pending_logits
from jaxinfer.engine.runner.mixed import Mixed
from jaxinfer.engine.runner.shapes import Shapes
from jaxinfer.engine.runner.step_sampling import (
    Sampled,
    compute_prompt_logprobs,
    hidden_summary,
    sample_tokens,
    store_verified,
)
from jaxinfer.engine.sampling.sampler import Edits
from jaxinfer.engine.sampling.sampling_rows import Level, unpack_rows
from jaxinfer.functional import DecodeBatch, PrefillBatch, Program
from jaxinfer.functional.taps import Taps
from jaxinfer.kernels.attention.paged import Cache
from jaxinfer.kernels.state.slots import DecodeSlots, Segments
from jaxinfer.kv.contiguous import Regions
from jaxinfer.models.base import FeatureRows


def make_step(
    program: Program,
    shapes: Shapes,
    bucket: Bucket | Mixed,
    compiler_options: Mapping[str, Any] | None = None,
    body: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Return the jitted step of a bucket: (params, cache, rows, edits, packed) -> (cache, rows, edits, Sampled).

    The prefill of a model with an encoder also takes the feature pool, before `packed`, which is not donated.
    `compiler_options` are XLA options for this compilation alone. A pending bucket's step returns `Logits`, the
    prompt's log-probabilities and captured outputs in place of `Sampled`. `body` is the step of a `Mixed` bucket.
    """
    if body is None:
        body = decode_step if bucket.kind == "decode" else prefill_step
    everywhere, own = replicated(program), by_device(program)
    result = Sampled(everywhere, everywhere, everywhere, everywhere, own, everywhere)
    last = (logits_shardings(program), everywhere, everywhere) if bucket.pending else (result,)
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
        cache, rows, edits, `Sampled`; for a pending bucket cache, rows, edits, `Logits`, None, captured outputs.
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
    beside = {name: parts.get(name) for name in ("seen", "adapters", "rope_positions")}
    batch = DecodeBatch(last, positions, own, bucket.items, states=states, **beside)
    taps = Taps(bucket.capture, steered.added(bucket, parts))
    hidden, cache = functional.decode_hidden(program, params, cache, batch, taps=taps)
    logits = program.module(params).logits(hidden)
    if bucket.pending:
        made = pending_logits(bucket, logits, parts["sampling"], hidden_summary(program, hidden), last)
        return cache, RowState(rows.tokens, tables), edits, made, None, taps.captured(hidden)
    edits, sampled = sample_tokens(program, bucket, sampled_vocab, logits, sampling, edits)
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

    A joint step decodes a token for other sequences as well (`runner.joint`).
    A step that verifies drafts computes the last token of each sequence and those of its draft, and samples a token
    after each of them.

    `pool_and_packed` is the feature pool, if the bucket has `features`, and the packed inputs.

    Returns:
        As `decode_step`, with the prompt's log-probabilities in place of None for a pending bucket.
    """
    *pool, packed = pool_and_packed
    parts = batches.unpack(bucket, packed)
    features = FeatureRows(pool[0], parts.pop("features")) if bucket.features else None
    packed, targets, owners = parts.pop("sampling"), parts.pop("targets"), parts.pop("owners")
    if bucket.states:
        parts["states"] = Segments(*parts["states"])
    if bucket.decodes:
        rows, owners = take_decodes(bucket, parts, rows, owners, cache[0].keys.shape[2])
    tables = reserved(program, bucket, cache, rows, owners) if bucket.contiguous else rows.tables[:, owners]
    taps = Taps(bucket.capture, steered.added(bucket, parts))
    batch = PrefillBatch(**parts, tables=tables, tile=bucket.tile)
    hidden, cache = functional.prefill_hidden(program, params, cache, batch, features, taps=taps)
    module = program.module(params)
    last = hidden[parts["last"]]
    logits = module.logits(last)
    prompt = compute_prompt_logprobs(module, bucket, hidden, targets)
    if bucket.pending:
        made = pending_logits(bucket, logits, packed, hidden_summary(program, last), parts["tokens"])
        return cache, rows, edits, made, prompt, taps.captured(hidden)
    sampling = unpack_rows(packed)
    edits, sampled = sample_tokens(program, bucket, sampled_vocab, logits, sampling, edits)
    if bucket.kind == VERIFY:
        rows = rows._replace(tokens=store_verified(rows.tokens, sampling.row, sampled.tokens, parts["tokens"]))
    else:
        rows = rows._replace(tokens=rows.tokens.at[sampling.row].set(sampled.tokens, mode="drop"))
    sampled = sampled._replace(
        prompt_logprobs=prompt, summary=hidden_summary(program, last), captured=taps.captured(hidden)
    )
    return cache, rows, edits, sampled
