"""Choosing the next token, on the device, inside the step.

A greedy step draws no random numbers, and no step sorts the vocabulary (`engine.drawing`). Either a step is
compiled for a `Level` and does what that level may need, or one program has all of it and leaves out at run
time what no row asks for (`switched`). A row's token never depends on what its neighbours ask for: every
level computes the same function of a row's own logits and settings.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.engine.sampling.drawing import BAD_TOKEN, choose, either, largest
from jaxinfer.engine.sampling.sampling_rows import Level, SamplingRows
from jaxinfer.sampling_params import MAX_NGRAM
from jaxinfer.sharding.collectives import ALL_GATHER, SAMPLE, Collective

Rule: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""Of a model: (logits, history, position, prompt_length, rule) -> logits, -inf for tokens that may not come."""
TOP = 16
"""The most values of a row that XLA finds on a GPU without sorting it."""


class Edits(NamedTuple):
    """What edited rows carry from step to step; made when the first request needs it."""

    history: jax.Array
    """`[R, L]` int32: the tokens of each row's sequence, prompt first."""
    bias: jax.Array
    """`[R, V']` float32 added to the logits; -inf forbids."""


def install(edits: Edits, row: jax.Array, history: jax.Array, known: jax.Array, bias: jax.Array) -> Edits:
    """Sets a row's bias `[V']` and the first `known` tokens of its history `[L]`; later ones are the device's own."""
    kept = jnp.where(jnp.arange(history.shape[0]) < known, history, edits.history[row])
    return Edits(edits.history.at[row].set(kept), edits.bias.at[row].set(bias))


class Candidates(NamedTuple):
    """The likeliest continuations of a beam; on the host of one, without the axis B."""

    ids: jax.Array | np.ndarray
    """`[B, n]` int32 tokens, the likeliest first."""
    scores: jax.Array | np.ndarray
    """`[B, n]` float32 their log-probabilities; -inf for one that is forbidden."""


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


def logprobs(logits: jax.Array, tokens: jax.Array, count: int, *, switched: bool = False) -> Logprobs:
    """Return the log-probabilities of `tokens` `[B]` under `logits` `[B, V']`, with those of the `count` most likely
    tokens.

    A token beyond V' is impossible. `switched`: whether the program is one for a CPU, as of `sample`.
    """
    normal = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    # A prompt may have tokens that are never made, such as that of an image.
    chosen = jnp.take_along_axis(normal, jnp.maximum(tokens, 0)[:, None], axis=-1, mode="fill", fill_value=-jnp.inf)
    rank = (normal > chosen).sum(axis=-1) + 1
    top, top_ids = _top(normal, count, switched)
    return Logprobs(chosen[:, 0], rank, top_ids, top)


def _top(values: jax.Array, count: int, switched: bool) -> tuple[jax.Array, jax.Array]:
    """Return the `count` largest of `values` `[B, V']` in their order, and their places; both `[B, count]`.

    XLA has a kernel for at most `TOP` of them on a GPU and sorts the whole vocabulary for more, so more are taken in
    turns.
    """
    if switched or not count:
        return tuple(jax.lax.top_k(values, count))
    if count == 1:
        return values.max(axis=-1, keepdims=True), jnp.argmax(values, axis=-1, keepdims=True).astype(jnp.int32)
    parts = []
    for start in range(0, count, TOP):
        parts.append(jax.lax.top_k(values, min(TOP, count - start)))
        taken = (jnp.arange(values.shape[1])[:, None] == parts[-1][1][:, None]).any(axis=-1)
        values = jnp.where(taken, -jnp.inf, values)
    top, places = zip(*parts, strict=True)
    return jnp.concatenate(top, axis=-1), jnp.concatenate(places, axis=-1)


def sample(
    logits: jax.Array,
    rows: SamplingRows,
    edits: Edits | None,
    level: Level,
    *,
    switched: bool = False,
    rule: Rule | None = None,
) -> tuple[jax.Array, Edits | None]:
    """Logits `[B, V']` -> token ids `[B]` int32 and the edits with the new tokens in their histories.

    A row with a logit that is not a number, or with every token masked, gives `BAD_TOKEN`.
    The order of the settings is vLLM's: bias and masks, penalties, n-grams that may not come again, the model's rule,
    temperature, min-p, top-k, top-p; a token that is forced comes whatever they say. The random numbers of a row follow
    from its seed, sample index and position alone.

    Args:
        logits: of the rows.
        rows: what each asks for; none may need more than `level`.
        edits: None below `Level.EDITED`.
        level: static; what the program can do.
        switched: static; what no row asks for is skipped at run time. A program for all levels, where a branch
            costs little: on a CPU, not on a GPU, whose host would have to wait for each condition.
        rule: static; of the model (`models.base.TokenRule`). Rows for which it holds are edited.
    """
    if level == Level.GREEDY:
        return _force(largest(logits, switched), rows), edits
    # A branch gives tokens alone: what leaves or enters one is copied, and logits are large.
    plain = ~((rows.temperature > 0).any() | (rows.edited > 0).any())
    tokens = either(
        switched,
        plain,
        lambda: largest(logits, switched),
        lambda: (
            _choose_edited(logits, rows, edits, switched, rule)
            if level >= Level.EDITED
            else choose(logits, rows, level, switched)
        ),
    )
    tokens = _force(tokens, rows)
    if level >= Level.EDITED:
        history = edits.history.at[rows.row, rows.position].set(tokens, mode="drop")
        edits = edits._replace(history=history)
    return tokens, edits


def _force(tokens: jax.Array, rows: SamplingRows) -> jax.Array:
    """Tokens `[B]`, but those that are forced at their places."""
    forced = _forced(rows)
    return jnp.where((forced >= 0) & (tokens != BAD_TOKEN), forced, tokens)


def _forced(rows: SamplingRows) -> jax.Array:
    """`[B]` the token that must come; -1: any may."""
    first = (rows.forced_first > 0) & (rows.position == rows.prompt_length)
    last = (rows.forced_last > 0) & (rows.position == rows.last_position)
    return jnp.where(last, rows.forced_last, jnp.where(first, rows.forced_first, 0)) - 1


def candidates(
    logits: jax.Array,
    rows: SamplingRows,
    edits: Edits | None,
    count: int,
    usable: int,
    *,
    switched: bool = False,
    rule: Rule | None = None,
) -> Candidates:
    """The `count` likeliest continuations of each row, for a beam search.

    Masks and penalties change log-probabilities, which are not normalised again, as in transformers; a forced token's
    is 0.

    Args:
        logits: `[B, V']`.
        rows: what each asks for.
        edits: None where no row is edited.
        count: static; at most `usable`.
        usable: token ids from here on are never offered.
        switched, rule: static; as of `sample`.
    """
    scores = jax.nn.log_softmax(logits, axis=-1)
    if edits is not None:
        plain = scores
        scores = either(
            switched, ~(rows.edited > 0).any(), lambda: plain, lambda: _edited(plain, rows, edits, switched, rule)
        )
    forced, tokens = _forced(rows)[:, None], jnp.arange(logits.shape[-1])
    scores = jnp.where(forced < 0, scores, jnp.where(tokens == forced, 0.0, -jnp.inf))
    scores, ids = _top(jnp.where(tokens < usable, scores, -jnp.inf), count, switched)
    return Candidates(ids, scores)


def collectives(shards: int) -> list[Collective]:
    """What a greedy step exchanges where the logits are divided over `shards`: each shard's largest logit and its
    token.

    Where a row asks for more, XLA adds all-reduces: of the largest logit, and of the sums by which thresholds are
    found.
    """
    if shards <= 1:
        return []
    return [Collective(ALL_GATHER, "largest logits and their tokens", shards, arrays=2, rows=SAMPLE, itemsize=4)]


def _choose_edited(logits: jax.Array, rows: SamplingRows, edits: Edits, switched: bool, rule: Rule | None) -> jax.Array:
    """`[B]` the tokens, where some row may be edited."""

    def edit() -> jax.Array:
        tokens = choose(_edited(logits, rows, edits, switched, rule), rows, Level.TRUNCATED, switched)
        # A mask may hide what is not a number, but such a row is ill.
        return jnp.where(largest(logits, switched) != BAD_TOKEN, tokens, BAD_TOKEN)

    return either(switched, ~(rows.edited > 0).any(), lambda: choose(logits, rows, Level.TRUNCATED, switched), edit)


def _edited(logits: jax.Array, rows: SamplingRows, edits: Edits, switched: bool, rule: Rule | None) -> jax.Array:
    """Logits `[B, V']` with what edited rows ask for."""
    changed = jnp.where((rows.edited > 0)[:, None], _edit(logits, rows, edits), logits)
    changed = either(
        switched, ~(rows.ngram > 0).any(), lambda: changed, lambda: _forbid_repeats(changed, rows, edits.history)
    )
    if rule is not None:
        own = edits.history[jnp.clip(rows.row, 0, edits.history.shape[0] - 1)]
        changed = rule(changed, own, rows.position, rows.prompt_length, rows.rule)
    return changed


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


def _forbid_repeats(logits: jax.Array, rows: SamplingRows, history: jax.Array) -> jax.Array:
    """Logits `[B, V']`, -inf for each token that would make the last n tokens of a row ones that it has already
    (arXiv:1705.04304, section 2.5); prompt included, as in transformers.
    """
    own = history[jnp.clip(rows.row, 0, history.shape[0] - 1)]
    at, length = jnp.arange(own.shape[1]), rows.position[:, None]
    repeats = (at < length) & (at >= rows.ngram[:, None] - 1) & (rows.ngram[:, None] > 0)
    for back in range(1, MAX_NGRAM):
        # Where a token stands, those before it are compared with those before the new one.
        before = jnp.pad(own, ((0, 0), (back, 0)))[:, : own.shape[1]]
        tail = jnp.take_along_axis(own, jnp.maximum(length - back, 0), axis=1)
        repeats &= (before == tail) | (back >= rows.ngram[:, None])
    rank = jnp.arange(len(own))[:, None]
    forbidden = jnp.zeros(logits.shape, jnp.int32).at[rank, own].max(repeats.astype(jnp.int32), mode="drop")
    return jnp.where(forbidden > 0, -jnp.inf, logits)
