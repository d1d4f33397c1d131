"""Choosing the next token, on the device, inside the step.

A step is compiled for the least `Level` that serves all its rows, so that a greedy step draws no random
numbers, and nothing is sorted unless a request truncates. A row's token never depends on the level that
its neighbours ask for: every level computes the same function of a row's own logits and settings.
"""

from enum import IntEnum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BAD_TOKEN = -1
"""What a row whose logits are not numbers samples."""


class Level(IntEnum):
    """How much of the sampler a step needs; each level includes those below."""

    GREEDY = 0
    """The largest logit."""
    RANDOM = 1
    """Temperature and min-p."""
    TRUNCATED = 2
    """Top-k and top-p: sorts the vocabulary."""
    EDITED = 3
    """Penalties, biases and masks: reads `Edits`."""


class Edits(NamedTuple):
    """What edited rows carry from step to step; made when the first request needs it."""

    history: jax.Array
    """`[R, L]` int32: the tokens of each row's sequence, prompt first."""
    bias: jax.Array
    """`[R, V']` float32 added to the logits; -inf forbids."""


class SamplingRows(NamedTuple):
    """One entry a sampled sequence, `[B]` each unless said."""

    row: jax.Array
    """Its place in the sampler's state; R or more for padding."""
    position: jax.Array
    """The position that the new token will have: how many tokens precede it."""
    key: jax.Array
    """`[B, 2]` the 64 bits that the sample's seed and index were hashed to."""
    temperature: jax.Array
    """0 for greedy."""
    top_k: jax.Array
    """0 for no limit."""
    top_p: jax.Array
    min_p: jax.Array
    presence: jax.Array
    frequency: jax.Array
    repetition: jax.Array
    edited: jax.Array
    """1 where the row's `Edits` hold."""
    prompt_length: jax.Array
    """Tokens of the prompt, at the head of the history."""


INTEGERS = ("row", "position", "key", "top_k", "edited", "prompt_length")
WIDTH = len(SamplingRows._fields) + 1
"""Columns of the packed form: one a field, two for the key."""
ROW, POSITION = 0, 1
"""Of them, those that change from step to step."""


def pack_rows(rows: SamplingRows) -> np.ndarray:
    """NumPy rows -> `[B, WIDTH]` int32, floats by their bits: one array is one transfer."""
    columns = []
    for name, value in zip(SamplingRows._fields, rows, strict=True):
        kind = np.uint32 if name == "key" else np.int32 if name in INTEGERS else np.float32
        bits = np.ascontiguousarray(value, kind).view(np.int32)
        columns.append(bits if bits.ndim == 2 else bits[:, None])
    return np.concatenate(columns, axis=1)


def unpack_rows(packed: jax.Array) -> SamplingRows:
    """The reverse of `pack_rows`, under jit."""
    fields, column = {}, 0
    for name in SamplingRows._fields:
        width = 2 if name == "key" else 1
        bits = packed[:, column : column + width]
        column += width
        if name == "key":
            fields[name] = jax.lax.bitcast_convert_type(bits, jnp.uint32)
        else:
            kind = jnp.int32 if name in INTEGERS else jnp.float32
            fields[name] = jax.lax.bitcast_convert_type(bits[:, 0], kind)
    return SamplingRows(**fields)


class Logprobs(NamedTuple):
    """Log-probabilities of the model's own distribution, before any setting changes it."""

    chosen: jax.Array
    """`[B]` of the token asked about."""
    rank: jax.Array
    """`[B]` its rank, 1 for the most likely."""
    top_ids: jax.Array
    """`[B, n]` the most likely tokens, most likely first."""
    top: jax.Array
    """`[B, n]` theirs."""


def logprobs(logits: jax.Array, tokens: jax.Array, count: int) -> Logprobs:
    """Of `tokens` `[B]` under `logits` `[B, V']`, with the `count` most likely beside them."""
    normal = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(normal, jnp.maximum(tokens, 0)[:, None], axis=-1)
    rank = (normal > chosen).sum(axis=-1) + 1
    top, top_ids = jax.lax.top_k(normal, count)
    return Logprobs(chosen[:, 0], rank, top_ids, top)


def sample(
    logits: jax.Array, rows: SamplingRows, edits: Edits | None, level: Level
) -> tuple[jax.Array, Edits | None]:
    """Logits `[B, V']` -> token ids `[B]` int32 and the edits with the new tokens in their histories.

    A row with a logit that is not a number, or with every token masked, gives `BAD_TOKEN`.
    The order of the settings is vLLM's: bias and masks, penalties, temperature, min-p, top-k, top-p. A
    random token is the argmax of logits plus Gumbel noise, keyed by seed, sample and position alone.
    """
    sane = jnp.isfinite(logits.max(axis=-1))
    if level >= Level.EDITED:
        logits = jnp.where((rows.edited > 0)[:, None], _edit(logits, rows, edits), logits)
        sane &= jnp.isfinite(logits.max(axis=-1))
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if level >= Level.RANDOM:
        tokens = jnp.where(rows.temperature > 0, _draw(logits, rows, level), tokens)
    tokens = jnp.where(sane, tokens, BAD_TOKEN)
    if level >= Level.EDITED:
        history = edits.history.at[rows.row, rows.position].set(tokens, mode="drop")
        edits = edits._replace(history=history)
    return tokens, edits


def _draw(logits: jax.Array, rows: SamplingRows, level: Level) -> jax.Array:
    """One token a row from its tempered and truncated distribution."""
    scaled = logits / jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
    floor = scaled.max(axis=-1) + jnp.log(rows.min_p)  # log 0 = -inf: no floor
    if level >= Level.TRUNCATED:
        floor = jnp.maximum(floor, _truncation(scaled, floor, rows))
    kept = jnp.where(scaled >= floor[:, None], scaled, -jnp.inf)

    def noise(key: jax.Array, position: jax.Array) -> jax.Array:
        folded = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position)
        return jax.random.gumbel(folded, logits.shape[-1:])

    return jnp.argmax(kept + jax.vmap(noise)(rows.key, rows.position), axis=-1).astype(jnp.int32)


def _truncation(scaled: jax.Array, floor: jax.Array, rows: SamplingRows) -> jax.Array:
    """`[B]` the least logit that top-k and top-p keep; tokens that tie with it are all kept."""
    vocab = scaled.shape[-1]
    ordered = jnp.sort(scaled, axis=-1, descending=True)
    count = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, vocab), vocab)
    kth = jnp.take_along_axis(ordered, (count - 1)[:, None], axis=-1)[:, 0]
    floor = jnp.maximum(floor, kth)
    weights = jnp.where(ordered >= floor[:, None], jnp.exp(ordered - ordered[:, :1]), 0)
    before = jnp.cumsum(weights, axis=-1) - weights
    # A token stays while what lies before it is less than top_p of the whole; the first always stays.
    stays = (before < rows.top_p[:, None] * weights.sum(axis=-1, keepdims=True)) & (weights > 0)
    last = jnp.maximum(stays.sum(axis=-1) - 1, 0)
    nucleus = jnp.take_along_axis(ordered, last[:, None], axis=-1)[:, 0]
    return jnp.where(rows.top_p < 1, jnp.maximum(floor, nucleus), floor)


def _edit(logits: jax.Array, rows: SamplingRows, edits: Edits) -> jax.Array:
    """Bias and masks, then repetition (arXiv:1909.05858), frequency and presence penalties."""
    batch, vocab = logits.shape
    state = jnp.clip(rows.row, 0, edits.bias.shape[0] - 1)
    history = edits.history[state]
    at = jnp.arange(history.shape[1])
    known = at < rows.position[:, None]
    made = (known & (at >= rows.prompt_length[:, None])).astype(jnp.int32)
    rank = jnp.arange(batch)[:, None]
    counts = jnp.zeros((batch, vocab), jnp.int32).at[rank, history].add(made, mode="drop")
    seen = jnp.zeros((batch, vocab), jnp.int32).at[rank, history].max(known.astype(jnp.int32), mode="drop") > 0
    logits = logits + edits.bias[state]
    repetition = rows.repetition[:, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / repetition, logits * repetition), logits)
    return logits - rows.frequency[:, None] * counts - rows.presence[:, None] * (counts > 0)
