"""Device side of the step of a deterministic engine (`mixed`)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer import functional
from jaxinfer.engine.runner import batch as batches
from jaxinfer.engine.runner.mixed import Mixed
from jaxinfer.engine.runner.steps import RowState, Sampled, hidden_summary, mask_padding, reserved
from jaxinfer.engine.sampling.sampler import Edits, Logprobs, logprobs, sample
from jaxinfer.engine.sampling.sampling_rows import unpack_rows
from jaxinfer.functional import PrefillBatch, Program
from jaxinfer.kernels.attention.paged import Cache
from jaxinfer.kernels.state.slots import StepSegments
from jaxinfer.models.base import FeatureRows


class _Made(NamedTuple):
    """What the turns have computed so far."""

    last: jax.Array
    """Last token of each row, `[R]`."""
    history: jax.Array
    """`Edits.history`."""
    tokens: jax.Array
    """Sampled tokens by place."""
    beside: Logprobs
    """Log-probabilities by place."""


def mixed_step(
    program: Program,
    bucket: Mixed,
    sampled_vocab: int,
    params: list[jax.Array],
    cache: Cache,
    rows: RowState,
    edits: Edits,
    *pool_and_packed: jax.Array,
) -> tuple[Cache, RowState, Edits, Sampled]:
    """Compute the tokens of chunks and decodes, and sample a token for each sequence that is due one.

    `pool_and_packed` is the feature pool, if the bucket has `features`, and the packed inputs.
    """
    *pool, packed = pool_and_packed
    parts = batches.unpack(bucket, packed)
    features = FeatureRows(pool[0], parts["features"]) if bucket.features else None
    owners, tables = parts["owners"], rows.tables
    last = rows.tokens[owners][parts["rows"]]
    if bucket.contiguous:
        own = reserved(program, bucket, cache, rows, owners)
    else:
        # Of the table entries that decodes read, only the block being written may have changed since the last step.
        row, column = parts["written"]
        tables = tables.at[jnp.arange(bucket.groups)[:, None], row, column].set(parts["blocks"], mode="drop")
        own = tables[:, owners]
    batch = PrefillBatch(
        tokens=jnp.where(parts["tokens"] < 0, last, parts["tokens"]),
        tables=own,
        last=parts["at"],
        states=StepSegments(*parts["states"]) if bucket.states else None,
        seen=parts.get("seen"),
        tile=bucket.tile,
        **{name: parts[name] for name in ("positions", "rows", "rope_lengths", "tiles", "count")},
    )
    hidden, cache = functional.prefill_hidden(program, params, cache, batch, features)
    made = _read(program, bucket, sampled_vocab, params, hidden, parts, rows, edits)
    samples, ends = slice(bucket.rows), (bucket.sample_places, bucket.sample_places + bucket.tokens)
    sampled = Sampled(
        made.tokens[samples],
        Logprobs(*(column[samples] for column in made.beside)),
        Logprobs(*(column[slice(*ends)] for column in made.beside)),
        summary=hidden_summary(program, hidden[parts["at"][samples]]),
    )
    return cache, RowState(made.last, tables), edits._replace(history=made.history), sampled


def _read(
    program: Program,
    bucket: Mixed,
    sampled_vocab: int,
    params: list[jax.Array],
    hidden: jax.Array,
    parts: dict[str, jax.Array],
    rows: RowState,
    edits: Edits,
) -> _Made:
    """Sample from hidden states `[T, M]` and find log-probabilities, `head_rows` places a turn."""
    module, size, count = program.module(params), bucket.sampled_rows, bucket.logprobs
    how = {"switched": bucket.switched, "rule": None if program.cross is None else program.cross.rule}

    def turn(number: jax.Array, made: _Made) -> _Made:
        block = parts["turns"][number]
        first = block * bucket.head_rows
        at = jax.lax.dynamic_slice_in_dim(parts["at"], first, bucket.head_rows)
        logits = module.logits(hidden.at[at].get(mode="fill", fill_value=0))
        parts_of_turn = -(-parts["ends"][block] // size)
        return jax.lax.fori_loop(0, parts_of_turn, lambda i, made: some(first + i * size, logits, i, made), made)

    def some(first: jax.Array, of_turn: jax.Array, index: jax.Array, made: _Made) -> _Made:
        def own(name: str) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(parts[name], first, size)

        sampling, targets = unpack_rows(own("sampling")), own("targets")
        logits = jax.lax.dynamic_slice_in_dim(of_turn, index * size, size)
        held = Edits(made.history, edits.bias)
        tokens, held = sample(mask_padding(logits, sampled_vocab), sampling, held, bucket.level, **how)
        asked = jnp.where(targets >= 0, targets, tokens)

        def compute() -> Logprobs:
            return logprobs(logits, asked, count, switched=bucket.switched)

        if bucket.switched:
            wanted = (sampling.logprobs > 0).any() | (targets >= 0).any()
            nothing = jax.tree.map(lambda a: jnp.zeros((size, *a.shape[1:]), a.dtype), made.beside)
            beside = jax.lax.cond(wanted, compute, lambda: nothing)
        else:
            beside = compute()
        return _Made(
            made.last.at[sampling.row].set(tokens, mode="drop"),
            held.history,
            *jax.tree.map(
                lambda all_places, new: jax.lax.dynamic_update_slice_in_dim(all_places, new, first, 0),
                (made.tokens, made.beside),
                (tokens, beside),
            ),
        )

    places = bucket.places
    none = Logprobs(
        jnp.zeros(places),
        jnp.zeros(places, jnp.int32),
        jnp.zeros((places, count), jnp.int32),
        jnp.zeros((places, count)),
    )
    begin = _Made(rows.tokens, edits.history, jnp.zeros(places, jnp.int32), none)
    return jax.lax.fori_loop(0, parts["turn_count"], turn, begin)
