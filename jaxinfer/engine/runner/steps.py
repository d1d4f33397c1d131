"""The compiled steps: what fixes their shapes, the functions themselves, and how they are jitted."""

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
from jaxinfer.engine.multihost import divergence
from jaxinfer.engine.runner import batch as batches
from jaxinfer.engine.runner.batch import Bucket
from jaxinfer.engine.sampling.sampler import Candidates, Edits, Logprobs, candidates, logprobs, sample
from jaxinfer.engine.sampling.sampling_rows import Level, SamplingRows, unpack_rows
from jaxinfer.functional import DecodeBatch, PrefillBatch, Program
from jaxinfer.functional.encoder_batch import EncodeBatch, EncodeShape
from jaxinfer.kernels.attention.paged import Cache
from jaxinfer.kernels.attention.xla_attention import decode_items
from jaxinfer.kernels.state.slots import DecodeSlots, Segments
from jaxinfer.kv.contiguous import Regions
from jaxinfer.models.base import FeatureRows, LanguageModel
from jaxinfer.sharding import mesh as meshes

PROMPT_ROWS = 64
"""Rows of logits that the log-probabilities of a prompt take at a time."""


@dataclass(frozen=True)
class Shapes:
    """What fixes the shapes of the compiled steps."""

    num_blocks: int
    """N."""
    block_size: int
    """P."""
    rows: int
    """R: sequences that run at a time."""
    width: int
    """W of the longest sequence."""
    decode_buckets: tuple[int, ...]
    prefill_buckets: tuple[int, ...]
    prefill_rows: int
    """Sequences of one prefill at most."""
    max_logprobs: int
    max_length: int
    """Tokens of the longest sequence, at most W * P."""
    sampled_vocab: int
    """Token ids from here on are never sampled: the embedding has more rows than the tokenizer has ids."""
    groups: int = 1
    """G: block tables a sequence has."""
    switched: bool = False
    """Whether one program a bucket has the whole sampler and skips at run time what no row asks for."""
    feature_slots: int = 0
    """Inputs of the encoder whose rows the feature pool holds; 0 where the model has no encoder."""
    encode_buckets: tuple[int, ...] = ()
    """Numbers of inputs that an encoder step is compiled for."""
    cross_buckets: tuple[int, ...] = ()
    """The same of an encoder whose positions tokens attend to: values, such as the tokens of a text."""
    state_slots: int = 0
    """Slots of recurrent state; 0 where no layer has one."""
    contiguous: bool = False
    """Whether each row has W blocks of its own (`kv.contiguous`), and not those of a table."""

    @property
    def regions(self) -> Regions:
        """Where they lie."""
        return Regions(self.rows, self.width, self.groups)

    def items_bucket(self, rows: int, items: int) -> int:
        """The work items a decode step of `rows` rows is compiled for: their number and its doublings."""
        size = rows
        while size < items:
            size *= 2
        return min(size, decode_items(rows, self.width * self.block_size, self.block_size))


class RowState(NamedTuple):
    """What the device keeps of each row from step to step."""

    tokens: jax.Array
    """`[R]` int32: the last token."""
    tables: jax.Array | None
    """`[G, R, W]` int32: the blocks of the sequence there in each group of layers; anything where there are none. None:
    they follow from the row (`kv.contiguous`)."""


class Sampled(NamedTuple):
    """What a step leaves for the host."""

    tokens: jax.Array
    """`[B]`, `BAD_TOKEN` where the logits were not numbers."""
    logprobs: Logprobs | None
    prompt_logprobs: Logprobs | None = None
    """`[T, ...]` of every token's successor in the prompt."""
    candidates: Candidates | None = None
    """Of every row, where some are beams of a search."""
    summary: jax.Array | None = None
    """Of the hidden states the tokens were sampled from (`engine.drift`), where several processes have them."""


def replicated(program: Program) -> NamedSharding:
    """Whole on every device: of all a step takes and gives but parameters and cache."""
    return NamedSharding(program.mesh, PartitionSpec())


def abstract_cache(program: Program, shapes: Shapes) -> Cache:
    """Shapes and shardings of the cache; nothing is allocated."""
    return functional.abstract_cache(program, shapes.num_blocks, shapes.block_size, shapes.state_slots)


def make_step(
    program: Program, shapes: Shapes, bucket: Bucket, compiler_options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The jitted step of a bucket: (params, cache, rows, edits, packed) -> (cache, rows, edits, Sampled).

    The prefill of a model with an encoder takes the feature pool as well, before `packed`, and leaves it as it is.
    `compiler_options` are XLA's, for this compilation alone.
    """
    body = prefill_step if bucket.kind == "prefill" else decode_step
    whole, each = replicated(program), NamedSharding(program.mesh, PartitionSpec(program.mesh.axis_names))
    return jax.jit(
        partial(body, program, bucket, shapes.sampled_vocab),
        donate_argnums=(1, 2, 3),
        out_shardings=(
            shardings(abstract_cache(program, shapes)),
            whole,
            whole,
            Sampled(whole, whole, whole, whole, each),
        ),
        compiler_options=None if compiler_options is None else dict(compiler_options),
    )


def abstract_arguments(program: Program, shapes: Shapes, bucket: Bucket) -> tuple[Any, ...]:
    """Shapes and shardings of what follows the parameters in a step's call, to compile it where no such device is."""
    whole = partial(jax.ShapeDtypeStruct, sharding=replicated(program))
    size = sum(int(np.prod(shape)) for shape in bucket.shapes.values())
    edits = None
    if bucket.level >= Level.EDITED:
        edits = abstract_edits(program, shapes)
    pool = (abstract_features(program, shapes),) if bucket.features else ()
    return abstract_cache(program, shapes), abstract_rows(program, shapes), edits, *pool, whole((size,), jnp.int32)


def shardings(lanes: Cache) -> Cache:
    return jax.tree.map(lambda array: array.sharding, lanes)


def abstract_rows(program: Program, shapes: Shapes) -> RowState:
    """Shapes and shardings of the rows' state."""
    whole = partial(jax.ShapeDtypeStruct, sharding=replicated(program))
    tables = None if shapes.contiguous else whole((shapes.groups, shapes.rows, shapes.width), jnp.int32)
    return RowState(whole((shapes.rows,), jnp.int32), tables)


def abstract_edits(program: Program, shapes: Shapes) -> Edits:
    """Shapes and shardings of history `[R, L]` and bias `[R, V']`."""
    whole, length = partial(jax.ShapeDtypeStruct, sharding=replicated(program)), shapes.width * shapes.block_size
    return Edits(whole((shapes.rows, length), jnp.int32), whole((shapes.rows, program.vocab), jnp.float32))


def abstract_features(program: Program, shapes: Shapes) -> jax.ShapeDtypeStruct:
    """Shape and sharding of the feature pool `[F, M]`, `rows` rows a slot."""
    rows = 0 if program.features is None else program.features.rows
    shape = (shapes.feature_slots * rows, program.feature_width)
    return jax.ShapeDtypeStruct(shape, program.dtype, sharding=replicated(program))


def encode_step(
    program: Program, params: list[jax.Array], pool: jax.Array, inputs: jax.Array, slots: jax.Array
) -> jax.Array:
    """The feature pool `[F, M]` with what the encoder makes of inputs `[n, *shape]` in slots `[n]`.

    A slot that there is not is that of padding, and dropped.
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
    """The cache with keys and values of what the encoder makes of inputs `[U, *shape]` with numbers `[U, A]`."""
    batch = EncodeBatch(inputs, numbers, **batches.unpack(shape, packed), tile=shape.tile)
    return functional.encode_cross(program, params, cache, batch)


def make_encode_step(
    program: Program, shapes: Shapes, shape: EncodeShape, compiler_options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The jitted step that encodes for cross-attention: (params, cache, inputs, numbers, packed) -> cache."""
    return jax.jit(
        partial(encode_cross_step, program, shape),
        donate_argnums=1,
        out_shardings=shardings(abstract_cache(program, shapes)),
        compiler_options=None if compiler_options is None else dict(compiler_options),
    )


def abstract_encode_arguments(program: Program, shapes: Shapes, shape: EncodeShape) -> tuple[Any, ...]:
    """Shapes and shardings of what follows the parameters in its call."""
    source, array = program.cross, partial(jax.ShapeDtypeStruct, sharding=replicated(program))
    inputs = array((shape.units, *source.shape), jnp.float32 if source.shape else jnp.int32)
    packed = array((sum(map(math.prod, shape.shapes.values())),), jnp.int32)
    return abstract_cache(program, shapes), inputs, array((shape.units, source.numbers), jnp.int32), packed


def install_tables(rows: RowState, entries: jax.Array) -> RowState:
    """Tables with `entries` `[4, n]` in: group, row, column and block id; one whose row does not exist is dropped."""
    group, row, column, block = entries
    return rows._replace(tables=rows.tables.at[group, row, column].set(block, mode="drop"))


def _mask_padding(logits: jax.Array, vocab: int) -> jax.Array:
    """`[B, V']` with the columns that no tokenizer knows at -inf."""
    if vocab >= logits.shape[-1]:
        return logits
    # Added, not selected, so that a row of NaN stays one.
    return logits + jnp.where(jnp.arange(logits.shape[-1]) < vocab, 0.0, -jnp.inf)


def _sample(
    program: Program, bucket: Bucket, sampled_vocab: int, logits: jax.Array, rows: SamplingRows, edits: Edits | None
) -> tuple[Edits | None, Sampled]:
    """The tokens of logits `[B, V']`, and what the bucket has beside them."""
    how, offered = {"switched": bucket.switched, "rule": None if program.cross is None else program.cross.rule}, None
    if bucket.candidates:
        offered = candidates(logits, rows, edits, bucket.candidates, sampled_vocab, **how)
    new, edits = sample(_mask_padding(logits, sampled_vocab), rows, edits, bucket.level, **how)
    if bucket.logprobs < 0:
        return edits, Sampled(new, None, candidates=offered)
    beside = _if_asked(
        bucket,
        (rows.logprobs > 0).any(),
        bucket.rows,
        bucket.logprobs,
        lambda: logprobs(logits, new, bucket.logprobs, switched=bucket.switched),
    )
    return edits, Sampled(new, beside, candidates=offered)


def _if_asked(bucket: Bucket, asked: jax.Array, rows: int, count: int, compute: Callable[[], Logprobs]) -> Logprobs:
    """Log-probabilities; zeros where the program is for all and nobody asked."""
    if not bucket.switched:
        return compute()
    one, few = jax.ShapeDtypeStruct((rows,), jnp.float32), jax.ShapeDtypeStruct((rows, count), jnp.float32)
    none = Logprobs(one, one.update(dtype=jnp.int32), few.update(dtype=jnp.int32), few)
    return jax.lax.cond(asked, compute, lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), none))


def _prompt_logprobs(module: LanguageModel, hidden: jax.Array, targets: jax.Array, bucket: Bucket) -> Logprobs:
    """Return those of the targets `[T]`, each after its hidden state `[T, M]`.

    They are computed a few rows at a time, as the logits of all would be `[T, V]`.
    """
    tokens = len(targets)
    size = min(PROMPT_ROWS, tokens)
    padding = -tokens % size
    parts = (
        jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, size, hidden.shape[1]),
        jnp.pad(targets, (0, padding)).reshape(-1, size),
    )
    find = partial(logprobs, count=bucket.prompt_logprobs, switched=bucket.switched)
    found = jax.lax.map(lambda part: find(module.logits(part[0]), part[1]), parts)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:tokens], found)


def _reserved(program: Program, bucket: Bucket, cache: Cache, rows: RowState, owners: jax.Array | None) -> jax.Array:
    """`[G, B, W]` the first blocks that are reserved for rows `owners` `[B]`, or for all, as many as the step reads."""
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
) -> tuple[Cache, RowState, Edits | None, Sampled]:
    """One token for every sequence: `rows` holds the last one of each, and is where the new ones go."""
    parts = batches.unpack(bucket, packed)
    asked, positions = unpack_rows(parts["sampling"]), parts["positions"]
    last, tables, owners = rows.tokens, rows.tables, None
    if bucket.rows < len(last):  # else each sequence lies in its row's place (`batch.lanes`)
        last, owners = last.at[asked.row].get(mode="clip"), asked.row
    if bucket.candidates:
        last = jnp.where(parts["tokens"] < 0, last, parts["tokens"])
    if bucket.contiguous:
        own = _reserved(program, bucket, cache, rows, owners)
    else:
        # The block written is the only entry of a table that is read and may have changed since the step before.
        number = jnp.maximum(positions, 0) // cache[0].keys.shape[2]
        group = jnp.arange(bucket.groups)[:, None]
        tables = tables.at[group, asked.row, number].set(parts["blocks"], mode="drop")
        own = tables if owners is None else tables.at[:, owners].get(mode="clip")
    states = DecodeSlots(*parts["states"]) if bucket.states else None
    batch = DecodeBatch(last, positions, own, bucket.items, parts.get("seen"), states)
    hidden, cache = functional.decode_hidden(program, params, cache, batch)
    logits = program.module(params).logits(hidden)
    edits, sampled = _sample(program, bucket, sampled_vocab, logits, asked, edits)
    rows = RowState(rows.tokens.at[asked.row].set(sampled.tokens, mode="drop"), tables)
    return cache, rows, edits, sampled._replace(summary=_summary(program, hidden))


def prefill_step(
    program: Program,
    bucket: Bucket,
    sampled_vocab: int,
    params: list[jax.Array],
    cache: Cache,
    rows: RowState,
    edits: Edits | None,
    *pool_and_packed: jax.Array,
) -> tuple[Cache, RowState, Edits | None, Sampled]:
    """Chunks of prompts, and a token for each sequence whose prompt ends here; the feature pool is there where the
    bucket has it."""
    *pool, packed = pool_and_packed
    parts = batches.unpack(bucket, packed)
    features = FeatureRows(pool[0], parts.pop("features")) if bucket.features else None
    asked, targets = unpack_rows(parts.pop("sampling")), parts.pop("targets")
    owners = parts.pop("owners")
    if bucket.states:
        parts["states"] = Segments(*parts["states"])
    tables = _reserved(program, bucket, cache, rows, owners) if bucket.contiguous else rows.tables[:, owners]
    hidden, cache = functional.prefill_hidden(
        program, params, cache, PrefillBatch(**parts, tables=tables, tile=bucket.tile), features
    )
    module = program.module(params)
    last = hidden[parts["last"]]
    logits = module.logits(last)
    edits, sampled = _sample(program, bucket, sampled_vocab, logits, asked, edits)
    prompt = None
    if bucket.prompt_logprobs >= 0:
        prompt = _if_asked(
            bucket,
            (targets >= 0).any(),
            bucket.tokens,
            bucket.prompt_logprobs,
            lambda: _prompt_logprobs(module, hidden, targets, bucket),
        )
    rows = rows._replace(tokens=rows.tokens.at[asked.row].set(sampled.tokens, mode="drop"))
    return cache, rows, edits, sampled._replace(prompt_logprobs=prompt, summary=_summary(program, last))


def _summary(program: Program, hidden: jax.Array) -> jax.Array | None:
    return divergence.summary(program.mesh, hidden) if meshes.processes(program.mesh) > 1 else None
