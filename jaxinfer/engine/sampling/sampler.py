"""Sampler: chooses the next token on the device, inside the step.

A greedy step generates no random numbers, and no step sorts the vocabulary (`sampling.drawing`). Either a step is
compiled for a `Level` and does what that level may need, or one program has everything and skips at run time what no
row needs (`switched`). A row's token never depends on its neighbours' parameters: every level computes the same
function of a row's own logits and parameters.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.config import LOGITS_MODES, PROCESSED_MODES, RAW_LOGPROBS
from jaxinfer.engine.sampling.drawing import BAD_TOKEN, choose, distribution, largest, skip_if
from jaxinfer.engine.sampling.sampling_rows import Level, SamplingRows
from jaxinfer.functional.deterministic import chosen, log_probabilities
from jaxinfer.sampling_params import MAX_NGRAM
from jaxinfer.sharding.collectives import ALL_GATHER, SAMPLE, Collective

Rule: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""A model's token rule: (logits, history, position, prompt_length, rule) -> logits, -inf for forbidden tokens."""
TOP = 16
"""Maximum k for which XLA finds the top k on a GPU without sorting."""


class Edits(NamedTuple):
    """Per-row state of EDITED rows; allocated when the first request needs it."""

    history: jax.Array
    """Token ids of each row's sequence, prompt first, `[R, L]` int32."""
    bias: jax.Array
    """Bias added to the logits, `[R, V']` float32; -inf forbids a token."""


def install(edits: Edits, row: jax.Array, history: jax.Array, known: jax.Array, bias: jax.Array) -> Edits:
    """Set a row's bias `[V']` and the first `known` tokens of its history `[L]`; keep later tokens."""
    kept = jnp.where(jnp.arange(history.shape[0]) < known, history, edits.history[row])
    return Edits(edits.history.at[row].set(kept), edits.bias.at[row].set(bias))


def mask_width(vocab: int) -> int:
    """Return W, the number of 32-bit words of a mask of `vocab` tokens."""
    return -(-vocab // 32)


def allow(logits: jax.Array, masks: jax.Array) -> jax.Array:
    """Set logits `[B, V']` whose bit of masks `[B, W]` int32 is 0 to -inf; bit v % 32 of word v // 32 is that of v."""
    bits = (masks[:, :, None] >> jnp.arange(32)) & 1
    # Added instead of selected, so that a NaN row stays NaN.
    return logits + jnp.where(bits.reshape(len(masks), -1)[:, : logits.shape[1]] > 0, 0.0, -jnp.inf)


class Candidates(NamedTuple):
    """Most likely continuations of each beam; on the host, of one beam, without the axis B."""

    ids: jax.Array | np.ndarray
    """Token ids, `[B, n]` int32, most likely first."""
    scores: jax.Array | np.ndarray
    """Their log-probabilities, `[B, n]` float32; -inf if forbidden."""


class Logprobs(NamedTuple):
    """Log-probabilities of tokens, or their logits, as `EngineConfig.logprobs_mode` says."""

    chosen: jax.Array
    """Log-probability of the given token, `[B]`."""
    rank: jax.Array
    """Rank of the given token, `[B]`, 1 for the most likely."""
    top_ids: jax.Array
    """Most likely token ids, `[B, n]`, most likely first."""
    top: jax.Array
    """Log-probabilities of the most likely tokens, `[B, n]`."""


def logprobs(
    logits: jax.Array, tokens: jax.Array, count: int, *, switched: bool = False, mode: str = RAW_LOGPROBS
) -> Logprobs:
    """Return log-probabilities of `tokens` `[B]` under `logits` `[B, V']`, and those of the `count` most likely tokens.

    Token ids of V' or more have probability 0. `switched` as in `sample`. With a `mode` of logits
    (`EngineConfig.logprobs_mode`), these take the place of log-probabilities.
    """
    normal = logits if mode in LOGITS_MODES else log_probabilities(logits)
    # A prompt may contain token ids that are never sampled, such as image placeholders.
    own = chosen(normal, tokens)
    rank = (normal > own[:, None]).sum(axis=-1) + 1
    top, top_ids = _top(normal, count, switched)
    return Logprobs(own, rank, top_ids, top)


def _top(values: jax.Array, count: int, switched: bool) -> tuple[jax.Array, jax.Array]:
    """Return the `count` largest of `values` `[B, V']` in descending order and their indices, each `[B, count]`.

    On a GPU XLA has a kernel for at most `TOP` of them and sorts the whole vocabulary for more, so they are taken `TOP`
    at a time.
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
    """Sample token ids `[B]` int32 from logits `[B, V']`; also return `edits` with the tokens in their histories.

    A row with a non-finite logit, or with every token masked, gives `BAD_TOKEN`. Parameters are applied in vLLM's
    order: bias and masks, penalties, no-repeat n-grams, the model's token rule, temperature, min-p, top-k, top-p; a
    forced token overrides them all. The random numbers of a row depend on its seed, sample index and position alone.

    Args:
        logits: logits of the rows.
        rows: parameters of the rows; none may need more than `level`.
        edits: None below `Level.EDITED`.
        level: static; what the program supports.
        switched: static; skip at run time what no row needs. For programs that support all levels where branches are
            cheap: on a CPU, not on a GPU, whose host would have to wait for each condition.
        rule: static; the model's token rule (`models.base.TokenRule`). Rows it applies to are EDITED.
    """
    if level == Level.GREEDY:
        return _force(largest(logits, switched), rows), edits
    # Branches return tokens alone: arrays that enter or leave a branch are copied, and logits are large.
    plain = ~((rows.temperature > 0).any() | (rows.edited > 0).any())
    tokens = skip_if(
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


def reported(
    logits: jax.Array,
    allowed: jax.Array,
    rows: SamplingRows,
    edits: Edits | None,
    level: Level,
    mode: str,
    *,
    switched: bool = False,
    rule: Rule | None = None,
) -> jax.Array:
    """Return the logits `[B, V']` from which tokens' log-probabilities are computed (`EngineConfig.logprobs_mode`).

    Args:
        logits: the model's own.
        allowed: those passed to `sample`, with -inf for tokens that no row may sample.
        rows, edits, level, switched, rule: as in `sample`; `edits` before or after it.
        mode: static; for a processed mode, all parameters of a row are applied, and a forced token is the only one.
    """
    if mode not in PROCESSED_MODES:
        return logits
    if level >= Level.EDITED:
        plain = allowed
        allowed = skip_if(
            switched, ~(rows.edited > 0).any(), lambda: plain, lambda: _edited(plain, rows, edits, switched, rule)
        )
    return _forced_only(distribution(allowed, rows, level, switched), rows)


def _forced_only(scores: jax.Array, rows: SamplingRows) -> jax.Array:
    """Replace scores `[B, V']` of rows whose token is forced by 0 for that token and -inf for all others."""
    forced, tokens = _forced(rows)[:, None], jnp.arange(scores.shape[-1])
    return jnp.where(forced < 0, scores, jnp.where(tokens == forced, 0.0, -jnp.inf))


def _force(tokens: jax.Array, rows: SamplingRows) -> jax.Array:
    """Replace tokens `[B]` by forced tokens at their positions."""
    forced = _forced(rows)
    return jnp.where((forced >= 0) & (tokens != BAD_TOKEN), forced, tokens)


def _forced(rows: SamplingRows) -> jax.Array:
    """Return the forced token of each row, `[B]`; -1 if none."""
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
    """Return the `count` most likely continuations of each row, for a beam search.

    Masks and penalties are applied to log-probabilities, which are not normalised again, as in transformers; a forced
    token has log-probability 0.

    Args:
        logits: `[B, V']`.
        rows: parameters of the rows.
        edits: None if no row is EDITED.
        count: static; at most `usable`.
        usable: static; token ids from here on are never candidates.
        switched, rule: static; as in `sample`.
    """
    scores = jax.nn.log_softmax(logits, axis=-1)
    if edits is not None:
        plain = scores
        scores = skip_if(
            switched, ~(rows.edited > 0).any(), lambda: plain, lambda: _edited(plain, rows, edits, switched, rule)
        )
    scores = jnp.where(jnp.arange(logits.shape[-1]) < usable, _forced_only(scores, rows), -jnp.inf)
    scores, ids = _top(scores, count, switched)
    return Candidates(ids, scores)


def collectives(shards: int) -> list[Collective]:
    """List the collectives of a greedy step whose logits are divided over `shards`: each shard's maximum and its token.

    Other sampling parameters make XLA add all-reduces: of the maximum, and of the sums used to find thresholds.
    """
    if shards <= 1:
        return []
    return [Collective(ALL_GATHER, "largest logits and their tokens", shards, arrays=2, rows=SAMPLE, itemsize=4)]


def _choose_edited(logits: jax.Array, rows: SamplingRows, edits: Edits, switched: bool, rule: Rule | None) -> jax.Array:
    """Return the tokens, `[B]`, of a step in which some rows may be EDITED."""

    def edit() -> jax.Array:
        tokens = choose(_edited(logits, rows, edits, switched, rule), rows, Level.TRUNCATED, switched)
        # Check for NaN before masking: masks could hide it.
        return jnp.where(largest(logits, switched) != BAD_TOKEN, tokens, BAD_TOKEN)

    return skip_if(switched, ~(rows.edited > 0).any(), lambda: choose(logits, rows, Level.TRUNCATED, switched), edit)


def _edited(logits: jax.Array, rows: SamplingRows, edits: Edits, switched: bool, rule: Rule | None) -> jax.Array:
    """Apply penalties, biases, masks and token rules of EDITED rows to logits `[B, V']`."""
    changed = jnp.where((rows.edited > 0)[:, None], _edit(logits, rows, edits), logits)
    changed = skip_if(
        switched, ~(rows.ngram > 0).any(), lambda: changed, lambda: _forbid_repeats(changed, rows, edits.history)
    )
    if rule is not None:
        own = edits.history[jnp.clip(rows.row, 0, edits.history.shape[0] - 1)]
        changed = rule(changed, own, rows.position, rows.prompt_length, rows.rule)
    return changed


def _edit(logits: jax.Array, rows: SamplingRows, edits: Edits) -> jax.Array:
    """Apply bias and masks, then repetition (arXiv:1909.05858), frequency and presence penalties."""
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
    """Forbid tokens of logits `[B, V']` that would repeat an n-gram (arXiv:1705.04304, section 2.5).

    The prompt counts, as in transformers.
    """
    own = history[jnp.clip(rows.row, 0, history.shape[0] - 1)]
    at, length = jnp.arange(own.shape[1]), rows.position[:, None]
    repeats = (at < length) & (at >= rows.ngram[:, None] - 1) & (rows.ngram[:, None] > 0)
    for back in range(1, MAX_NGRAM):
        # At each position, compare the preceding tokens with those before the new token.
        before = jnp.pad(own, ((0, 0), (back, 0)))[:, : own.shape[1]]
        tail = jnp.take_along_axis(own, jnp.maximum(length - back, 0), axis=1)
        repeats &= (before == tail) | (back >= rows.ngram[:, None])
    rank = jnp.arange(len(own))[:, None]
    forbidden = jnp.zeros(logits.shape, jnp.int32).at[rank, own].max(repeats.astype(jnp.int32), mode="drop")
    return jnp.where(forbidden > 0, -jnp.inf, logits)
