"""Choosing the next token, on the device, inside the step.

A greedy step draws no random numbers, and nothing is sorted unless a request truncates. Either a step is
compiled for a `Level` and does what that level may need, or one program has all of it and leaves out at run
time what no row asks for (`switched`). A row's token never depends on what its neighbours ask for: every
level computes the same function of a row's own logits and settings.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.engine.sampling_rows import Level, SamplingRows
from jaxinfer.sampling_params import MAX_NGRAM
from jaxinfer.sharding.collectives import ALL_GATHER, SAMPLE, Collective

Rule: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""Of a model: (logits, history, position, prompt_length, rule) -> logits, -inf for tokens that may not come."""
BLOCK = 128
"""Neighbouring tokens of the vocabulary that are summed up first."""

BAD_TOKEN = -1
"""What a row whose logits are not numbers samples."""


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


def logprobs(logits: jax.Array, tokens: jax.Array, count: int) -> Logprobs:
    """Of `tokens` `[B]` under `logits` `[B, V']`, with the `count` most likely beside them; beyond V' they are impossible."""
    normal = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    # A prompt may have tokens that are never made, such as that of an image.
    chosen = jnp.take_along_axis(normal, jnp.maximum(tokens, 0)[:, None], axis=-1, mode="fill", fill_value=-jnp.inf)
    rank = (normal > chosen).sum(axis=-1) + 1
    top, top_ids = jax.lax.top_k(normal, count)
    return Logprobs(chosen[:, 0], rank, top_ids, top)


def sample(
    logits: jax.Array, rows: SamplingRows, edits: Edits | None, level: Level, *, switched: bool = False,
    rule: Rule | None = None,
) -> tuple[jax.Array, Edits | None]:  # fmt: skip
    """Logits `[B, V']` -> token ids `[B]` int32 and the edits with the new tokens in their histories.

    A row with a logit that is not a number, or with every token masked, gives `BAD_TOKEN`.
    The order of the settings is vLLM's: bias and masks, penalties, n-grams that may not come again, the model's rule,
    temperature, min-p, top-k, top-p; a token that is forced comes whatever they say. A
    random token follows from one random number, keyed by seed, sample and position alone.

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
        return _force(_largest(logits, switched), rows), edits
    # A branch gives tokens alone: what leaves or enters one is copied, and logits are large.
    plain = ~((rows.temperature > 0).any() | (rows.edited > 0).any())
    tokens = _either(
        switched, plain, lambda: _largest(logits, switched),
        lambda: _choose_edited(logits, rows, edits, switched, rule) if level >= Level.EDITED
        else _choose(logits, rows, level, switched),
    )  # fmt: skip
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
    logits: jax.Array, rows: SamplingRows, edits: Edits | None, count: int, usable: int, *, switched: bool = False,
    rule: Rule | None = None,
) -> Candidates:  # fmt: skip
    """The `count` likeliest continuations of each row, for a beam search.

    Masks and penalties change log-probabilities, which are not normalised again, as in transformers; a forced token's is 0.

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
        scores = _either(
            switched, ~(rows.edited > 0).any(), lambda: plain, lambda: _edited(plain, rows, edits, switched, rule)
        )
    forced, tokens = _forced(rows)[:, None], jnp.arange(logits.shape[-1])
    scores = jnp.where(forced < 0, scores, jnp.where(tokens == forced, 0.0, -jnp.inf))
    scores, ids = jax.lax.top_k(jnp.where(tokens < usable, scores, -jnp.inf), count)
    return Candidates(ids, scores)


def collectives(shards: int) -> list[Collective]:
    """What a greedy step exchanges where the logits are divided over `shards`: each shard's largest logit and its token.

    Where a row asks for more, XLA decides how the divided logits are summed and sorted.
    """
    if shards <= 1:
        return []
    return [Collective(ALL_GATHER, "largest logits and their tokens", shards, arrays=2, rows=SAMPLE, itemsize=4)]


def _either(switched: bool, skip: jax.Array, least: Callable[[], Any], whole: Callable[[], Any]) -> Any:
    """`whole()`; `least()` where at run time the scalar `skip` says that it gives the same."""
    return jax.lax.cond(skip, least, whole) if switched else whole()


def _blocks(values: jax.Array, fill: float) -> jax.Array:
    """`[B, V']` -> `[B, n, BLOCK]`, filled up at the end."""
    padding = -values.shape[1] % BLOCK
    if padding:
        values = jnp.pad(values, ((0, 0), (0, padding)), constant_values=fill)
    return values.reshape(values.shape[0], -1, BLOCK)


def _pick(blocks: jax.Array, which: jax.Array) -> jax.Array:
    """`[B, n, BLOCK]` and `[B]` -> one block a row, `[B, BLOCK]`."""
    return jnp.take_along_axis(blocks, which[:, None, None], axis=1)[:, 0]


def _largest(logits: jax.Array, by_blocks: bool) -> jax.Array:
    """`[B]` the token of the largest logit, the first of several; `BAD_TOKEN` where there is none.

    XLA's argmax on a CPU looks at one number at a time: there it is taken of the blocks' maxima and within one
    block. Not on a GPU, where it is fused, and where blocks would not lie whole in a shard of the vocabulary.
    """
    if by_blocks:
        blocks = _blocks(logits, -jnp.inf)
        tops = blocks.max(axis=-1)
        best, top = jnp.argmax(tops, axis=-1), tops.max(axis=-1)
        token = best * BLOCK + jnp.argmax(_pick(blocks, best), axis=-1)
        # A maximum of maxima may lose a NaN there, a sum does not; -inf, where tokens are masked, does not make one.
        top = jnp.where(jnp.isnan(logits.sum(axis=-1)), jnp.nan, top)
    else:
        token, top = jnp.argmax(logits, axis=-1), logits.max(axis=-1)
    return jnp.where(jnp.isfinite(top), token.astype(jnp.int32), BAD_TOKEN)


def _choose_edited(
    logits: jax.Array, rows: SamplingRows, edits: Edits, switched: bool, rule: Rule | None
) -> jax.Array:
    """`[B]` the tokens, where some row may be edited."""

    def edit() -> jax.Array:
        tokens = _choose(_edited(logits, rows, edits, switched, rule), rows, Level.TRUNCATED, switched)
        # A mask may hide what is not a number, but such a row is ill.
        return jnp.where(_largest(logits, switched) != BAD_TOKEN, tokens, BAD_TOKEN)

    return _either(
        switched, ~(rows.edited > 0).any(), lambda: _choose(logits, rows, Level.TRUNCATED, switched), edit
    )


def _edited(
    logits: jax.Array, rows: SamplingRows, edits: Edits, switched: bool, rule: Rule | None
) -> jax.Array:
    """Logits `[B, V']` with what edited rows ask for."""
    changed = jnp.where((rows.edited > 0)[:, None], _edit(logits, rows, edits), logits)
    changed = _either(
        switched, ~(rows.ngram > 0).any(), lambda: changed, lambda: _forbid_repeats(changed, rows, edits.history)
    )
    if rule is not None:
        own = edits.history[jnp.clip(rows.row, 0, edits.history.shape[0] - 1)]
        changed = rule(changed, own, rows.position, rows.prompt_length, rows.rule)
    return changed


def _choose(logits: jax.Array, rows: SamplingRows, level: Level, switched: bool) -> jax.Array:
    """`[B]` the tokens, where some row may ask for more than the largest logit."""
    largest = _largest(logits, switched)
    random = (rows.temperature > 0) & (largest != BAD_TOKEN)
    return jnp.where(random, _draw(logits, rows, level, switched), largest)


def _draw(logits: jax.Array, rows: SamplingRows, level: Level, switched: bool) -> jax.Array:
    """One token a row from its tempered and truncated distribution."""
    scaled = logits / jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
    floor = scaled.max(axis=-1) + jnp.log(rows.min_p)  # log 0 = -inf: no floor
    if level >= Level.TRUNCATED:
        least, truncated = floor, (rows.temperature > 0) & ((rows.top_k > 0) | (rows.top_p < 1))
        floor = _either(
            switched, ~truncated.any(), lambda: least, lambda: jnp.maximum(least, _truncation(scaled, least, rows))
        )
    weights = jnp.where(scaled >= floor[:, None], jnp.exp(scaled - scaled.max(axis=-1, keepdims=True)), 0)

    def uniform(key: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position))

    return _invert(weights, jax.vmap(uniform)(rows.key, rows.position))


def _invert(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """`[B]` the tokens at which the running sums of `weights` `[B, V']` pass `uniform` `[B]` of their whole.

    Inverse transform sampling, by blocks: a running sum over the vocabulary is taken in one block only, and a row
    draws one random number, not one a token.
    """
    blocks = _blocks(weights, 0)
    sums = blocks.sum(axis=-1)
    ends = jnp.cumsum(sums, axis=-1)
    target = (uniform * ends[:, -1])[:, None]
    # Rounding may leave the target at the very end: the last that weighs anything is the answer there.
    which = jnp.minimum((ends <= target).sum(axis=-1), _last(sums > 0))
    before = jnp.take_along_axis(ends - sums, which[:, None], axis=-1)
    inner = _pick(blocks, which)
    passed = (before + jnp.cumsum(inner, axis=-1) <= target) | (inner == 0)
    found = jnp.where(passed.all(axis=-1), _last(inner > 0), jnp.argmin(passed, axis=-1))
    return (which * BLOCK + found).astype(jnp.int32)


def _last(marks: jax.Array) -> jax.Array:
    """`[B, n]` -> `[B]` the last place of a mark."""
    return marks.shape[-1] - 1 - jnp.argmax(marks[:, ::-1], axis=-1)


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
