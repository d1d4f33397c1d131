"""The compiled steps: what fixes their shapes, the functions themselves, and how they are jitted."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfer import functional
from jaxinfer.engine import batch as batches
from jaxinfer.engine.batch import Bucket
from jaxinfer.engine.sampler import Edits, Level, Logprobs, logprobs, sample, unpack_rows
from jaxinfer.functional import DecodeBatch, PrefillBatch, Program
from jaxinfer.kernels.xla_attention import decode_items
from jaxinfer.kv import cache as kv_cache


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

    def items_bucket(self, rows: int, items: int) -> int:
        """The work items a decode step of `rows` rows is compiled for: their number and its doublings."""
        size = rows
        while size < items:
            size *= 2
        return min(size, decode_items(rows, self.width * self.block_size, self.block_size))


class Sampled(NamedTuple):
    """What a step leaves for the host."""

    tokens: jax.Array
    """`[B]`, `BAD_TOKEN` where the logits were not numbers."""
    logprobs: Logprobs | None
    prompt_logprobs: Logprobs | None = None
    """`[T, ...]` of every token's successor in the prompt."""


def replicated(program: Program) -> NamedSharding:
    """Whole on every device: of all a step takes and gives but parameters and cache."""
    return NamedSharding(program.mesh, PartitionSpec())


def abstract_cache(program: Program, shapes: Shapes) -> list[kv_cache.Lane]:
    """Shapes and shardings of the cache; nothing is allocated."""
    return kv_cache.abstract(program.specs, shapes.num_blocks, shapes.block_size, program.dtype, program.mesh)


def make_step(program: Program, shapes: Shapes, bucket: Bucket) -> Callable[..., Any]:
    """The jitted step of a bucket: (params, cache, tokens, edits, packed) -> (cache, tokens, edits, Sampled)."""
    body = prefill_step if bucket.kind == "prefill" else decode_step
    whole = replicated(program)
    return jax.jit(
        partial(body, program, bucket, shapes.sampled_vocab), donate_argnums=(1, 2, 3),
        out_shardings=(shardings(abstract_cache(program, shapes)), whole, whole, whole),
    )  # fmt: skip


def abstract_arguments(program: Program, shapes: Shapes, bucket: Bucket) -> tuple[Any, ...]:
    """Shapes and shardings of what follows the parameters in a step's call, to compile it where no such device is."""
    whole = partial(jax.ShapeDtypeStruct, sharding=replicated(program))
    size = sum(int(np.prod(shape)) for shape in bucket.shapes.values())
    edits = None
    if bucket.level >= Level.EDITED:
        history, bias = edit_shapes(program, shapes)
        edits = Edits(whole(history, jnp.int32), whole(bias, jnp.float32))
    tokens = whole((shapes.rows,), jnp.int32)
    return abstract_cache(program, shapes), tokens, edits, whole((size,), jnp.int32)


def shardings(lanes: list[kv_cache.Lane]) -> list[kv_cache.Lane]:
    return jax.tree.map(lambda array: array.sharding, lanes)


def edit_shapes(program: Program, shapes: Shapes) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of history `[R, L]` and bias `[R, V']`."""
    return (shapes.rows, shapes.width * shapes.block_size), (shapes.rows, program.vocab)


def _mask_padding(logits: jax.Array, vocab: int) -> jax.Array:
    """`[B, V']` with the columns that no tokenizer knows at -inf."""
    if vocab >= logits.shape[-1]:
        return logits
    # Added, not selected, so that a row of NaN stays one.
    return logits + jnp.where(jnp.arange(logits.shape[-1]) < vocab, 0.0, -jnp.inf)


def decode_step(
    program: Program, bucket: Bucket, sampled_vocab: int, params: list[jax.Array], cache: list[kv_cache.Lane],
    tokens: jax.Array, edits: Edits | None, packed: jax.Array,
) -> tuple[list[kv_cache.Lane], jax.Array, Edits | None, Sampled]:  # fmt: skip
    """One token for every row: `tokens` `[R]` holds the last one of each, and is where the new ones go."""
    parts = batches.unpack(bucket, packed)
    rows = unpack_rows(parts["sampling"])
    last = tokens.at[rows.row].get(mode="clip")
    logits, cache = functional.decode(
        program, params, cache, DecodeBatch(last, parts["positions"], parts["tables"], bucket.items)
    )
    new, edits = sample(_mask_padding(logits, sampled_vocab), rows, edits, bucket.level)
    beside = logprobs(logits, new, bucket.logprobs) if bucket.logprobs >= 0 else None
    return cache, tokens.at[rows.row].set(new, mode="drop"), edits, Sampled(new, beside)


def prefill_step(
    program: Program, bucket: Bucket, sampled_vocab: int, params: list[jax.Array], cache: list[kv_cache.Lane],
    tokens: jax.Array, edits: Edits | None, packed: jax.Array,
) -> tuple[list[kv_cache.Lane], jax.Array, Edits | None, Sampled]:  # fmt: skip
    """Chunks of prompts, and a token for each sequence whose prompt ends here."""
    parts = batches.unpack(bucket, packed)
    rows, targets = unpack_rows(parts.pop("sampling")), parts.pop("targets")
    hidden, cache = functional.prefill_hidden(program, params, cache, PrefillBatch(**parts, tile=bucket.tile))
    module = program.module(params)
    logits = module.logits(hidden[parts["last"]])
    new, edits = sample(_mask_padding(logits, sampled_vocab), rows, edits, bucket.level)
    beside = logprobs(logits, new, bucket.logprobs) if bucket.logprobs >= 0 else None
    prompt = None
    if bucket.prompt_logprobs >= 0:
        # A few rows at a time: all logits of a chunk would be `[T, V]`.
        prompt = jax.lax.map(
            lambda one: jax.tree.map(
                lambda a: a[0], logprobs(module.logits(one[0][None]), one[1][None], bucket.prompt_logprobs)
            ),
            (hidden, targets), batch_size=min(64, bucket.tokens),
        )  # fmt: skip
    return cache, tokens.at[rows.row].set(new, mode="drop"), edits, Sampled(new, beside, prompt)
