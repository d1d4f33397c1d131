"""Device side of the step of a deterministic engine (`mixed`)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer import functional
from jaxinfer.engine.runner import batch as batches
from jaxinfer.engine.runner.device_state import RowState
from jaxinfer.engine.runner.mixed import Mixed
from jaxinfer.engine.runner.step_sampling import Sampled, hidden_summary, mask_padding
from jaxinfer.engine.runner.steps import reserved
from jaxinfer.engine.sampling.sampler import Edits, Logprobs, logprobs, reported, sample
from jaxinfer.engine.sampling.sampling_rows import unpack_rows
from jaxinfer.functional import PrefillBatch, Program
from jaxinfer.functional.taps import Taps
from jaxinfer.kernels.attention.paged import Cache
from jaxinfer.kernels.state.slots import StepSegments
from jaxinfer.models.base import FeatureRows


class _Outputs(NamedTuple):
    """Outputs of the iterations so far; a place is a token whose logits are computed (`Mixed.places`)."""

    last: jax.Array
    """Last token of each row, `[R]`."""
    history: jax.Array
    """`Edits.history`."""
    tokens: jax.Array
    """Sampled tokens by place."""
    logprobs: Logprobs
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
        adapters=parts.get("adapters"),
        rope_positions=parts.get("rope_positions"),
        tile=bucket.tile,
        **{name: parts[name] for name in ("positions", "rows", "rope_lengths", "tiles", "count")},
    )
    taps = Taps(bucket.capture)
    hidden, cache = functional.prefill_hidden(program, params, cache, batch, features, taps=taps)
    outputs = _sample(program, bucket, sampled_vocab, params, hidden, parts, rows, edits)
    samples, ends = slice(bucket.rows), (bucket.sample_places, bucket.sample_places + bucket.tokens)
    sampled = Sampled(
        outputs.tokens[samples],
        Logprobs(*(column[samples] for column in outputs.logprobs)),
        Logprobs(*(column[slice(*ends)] for column in outputs.logprobs)),
        summary=hidden_summary(program, hidden[parts["at"][samples]]),
        captured=taps.captured(hidden),
    )
    return cache, RowState(outputs.last, tables), edits._replace(history=outputs.history), sampled


def _sample(
    program: Program,
    bucket: Mixed,
    sampled_vocab: int,
    params: list[jax.Array],
    hidden: jax.Array,
    parts: dict[str, jax.Array],
    rows: RowState,
    edits: Edits,
) -> _Outputs:
    """Sample from hidden states `[T, M]` and compute log-probabilities.

    An iteration computes the logits of `head_rows` places; `sampled_rows` of them at a time are sampled.
    """
    module, size = program.module(params), bucket.sampled_rows
    how = {"switched": bucket.switched, "rule": None if program.cross is None else program.cross.rule}

    def iterate(number: jax.Array, outputs: _Outputs) -> _Outputs:
        block = parts["turns"][number]
        first = block * bucket.head_rows
        at = jax.lax.dynamic_slice_in_dim(parts["at"], first, bucket.head_rows)
        logits = module.logits(hidden.at[at].get(mode="fill", fill_value=0))
        count = -(-parts["ends"][block] // size)
        return jax.lax.fori_loop(0, count, lambda i, outputs: sample_places(first, logits, i, outputs), outputs)

    def sample_places(first: jax.Array, logits: jax.Array, index: jax.Array, outputs: _Outputs) -> _Outputs:
        place = first + index * size
        sampling, targets = (jax.lax.dynamic_slice_in_dim(parts[name], place, size) for name in ("sampling", "targets"))
        sampling = unpack_rows(sampling)
        logits = jax.lax.dynamic_slice_in_dim(logits, index * size, size)
        state = Edits(outputs.history, edits.bias)
        allowed = mask_padding(logits, sampled_vocab)
        tokens, state = sample(allowed, sampling, state, bucket.level, **how)
        targets_or_tokens = jnp.where(targets >= 0, targets, tokens)
        requested = (sampling.logprobs > 0).any() | (targets >= 0).any()

        def of() -> jax.Array:
            drawn_by = reported(logits, allowed, sampling, state, bucket.level, bucket.logprobs_mode, **how)
            return jnp.where((targets >= 0)[:, None], logits, drawn_by)  # sampling parameters do not apply to a prompt

        found = _logprobs(bucket, of, targets_or_tokens, requested, outputs.logprobs)
        return _Outputs(
            outputs.last.at[sampling.row].set(tokens, mode="drop"),
            state.history,
            *jax.tree.map(
                lambda all_places, new: jax.lax.dynamic_update_slice_in_dim(all_places, new, place, 0),
                (outputs.tokens, outputs.logprobs),
                (tokens, found),
            ),
        )

    begin = _Outputs(rows.tokens, edits.history, jnp.zeros(bucket.places, jnp.int32), _no_logprobs(bucket))
    return jax.lax.fori_loop(0, parts["turn_count"], iterate, begin)


def _logprobs(
    bucket: Mixed, logits: Callable[[], jax.Array], tokens: jax.Array, requested: jax.Array, template: Logprobs
) -> Logprobs:
    """Compute log-probabilities of tokens; in a switched program, return zeros if no row requests them.

    `logits` computes the logits of these tokens; it is called only if a row requests log-probabilities.
    """

    def compute() -> Logprobs:
        return logprobs(logits(), tokens, bucket.logprobs, switched=bucket.switched, mode=bucket.logprobs_mode)

    if not bucket.switched:
        return compute()
    zeros = jax.tree.map(lambda a: jnp.zeros((len(tokens), *a.shape[1:]), a.dtype), template)
    return jax.lax.cond(requested, compute, lambda: zeros)


def _no_logprobs(bucket: Mixed) -> Logprobs:
    """Return zeros in the shapes of all places' log-probabilities."""
    places, count = bucket.places, bucket.logprobs
    return Logprobs(
        jnp.zeros(places),
        jnp.zeros(places, jnp.int32),
        jnp.zeros((places, count), jnp.int32),
        jnp.zeros((places, count)),
    )
