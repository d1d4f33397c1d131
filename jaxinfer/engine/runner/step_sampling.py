"""Sampling of a step: logits to tokens and log-probabilities."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jaxinfer.engine.multihost import divergence
from jaxinfer.engine.runner.batch import Bucket
from jaxinfer.engine.sampling.sampler import (
    Candidates,
    Edits,
    Logprobs,
    allow,
    candidates,
    logprobs,
    reported,
    sample,
)
from jaxinfer.engine.sampling.sampling_rows import Level, SamplingRows
from jaxinfer.functional import Program
from jaxinfer.functional.taps import Captured
from jaxinfer.models.base import LanguageModel
from jaxinfer.sharding import mesh as meshes

PROMPT_ROWS = 64
"""Number of logits rows computed at a time for prompt log-probabilities."""


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


@runtime_checkable
class SamplerVariant(Protocol):
    """What a program can sample: a part of `Bucket` and `SampleLogits`."""

    @property
    def level(self) -> Level: ...
    @property
    def logprobs(self) -> int: ...
    @property
    def candidates(self) -> int: ...
    @property
    def switched(self) -> bool: ...
    @property
    def logprobs_mode(self) -> str: ...


def mask_padding(logits: jax.Array, vocab: int) -> jax.Array:
    """Set the columns of logits `[B, V']` that no tokenizer id refers to to -inf."""
    if vocab >= logits.shape[-1]:
        return logits
    # Added instead of selected, so that a NaN row stays NaN.
    return logits + jnp.where(jnp.arange(logits.shape[-1]) < vocab, 0.0, -jnp.inf)


def sample_tokens(
    program: Program,
    bucket: SamplerVariant,
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

    beside = _if_requested(bucket, (rows.logprobs > 0).any(), len(new), bucket.logprobs, compute)
    return edits, Sampled(new, beside, candidates=offered)


def store_verified(stored: jax.Array, rows: jax.Array, sampled: jax.Array, drafted: jax.Array) -> jax.Array:
    """Store the last token of each verified sequence: the first sample that differs from the draft's next token.

    Args:
        stored: last token of each row, `[R]`.
        rows: row of each token of the step, `[T]`, the tokens of a sequence side by side; R for padding.
        sampled: token sampled after each of them, `[T]`.
        drafted: the tokens of the step, `[T]`: for each sequence its last token, then its draft.
    """
    follows = jnp.append(rows[1:] == rows[:-1], False)
    wrong = ~follows | (sampled != jnp.roll(drafted, -1))
    index = jnp.arange(len(rows))
    earlier = (rows[:, None] == rows) & (index < index[:, None]) & wrong
    last = jnp.where(wrong & ~earlier.any(axis=1), rows, len(stored))
    return stored.at[last].set(sampled, mode="drop")


def _if_requested(
    bucket: SamplerVariant, requested: jax.Array, rows: int, count: int, compute: Callable[[], Logprobs]
) -> Logprobs:
    """Compute log-probabilities; in a switched program, return zeros if no row requests them."""
    if not bucket.switched:
        return compute()
    one, few = jax.ShapeDtypeStruct((rows,), jnp.float32), jax.ShapeDtypeStruct((rows, count), jnp.float32)
    none = Logprobs(one, one.update(dtype=jnp.int32), few.update(dtype=jnp.int32), few)
    return jax.lax.cond(requested, compute, lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), none))


def compute_prompt_logprobs(
    module: LanguageModel, bucket: Bucket, hidden: jax.Array, targets: jax.Array
) -> Logprobs | None:
    """Compute log-probabilities of the targets `[T]`, each from its preceding hidden state `[T, M]`, if requested.

    They are computed a few rows at a time, as the logits of all tokens would be `[T, V]`.
    """
    if bucket.prompt_logprobs < 0:
        return None
    tokens = len(targets)
    size = min(PROMPT_ROWS, tokens)
    padding = -tokens % size

    def compute() -> Logprobs:
        parts = (
            jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, size, hidden.shape[1]),
            jnp.pad(targets, (0, padding)).reshape(-1, size),
        )
        find = partial(logprobs, count=bucket.prompt_logprobs, switched=bucket.switched, mode=bucket.logprobs_mode)
        found = jax.lax.map(lambda part: find(module.logits(part[0]), part[1]), parts)
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:tokens], found)

    return _if_requested(bucket, (targets >= 0).any(), tokens, bucket.prompt_logprobs, compute)


def hidden_summary(program: Program, hidden: jax.Array) -> jax.Array | None:
    """Summarise hidden states `[B, M]` for comparison between processes; None with a single one."""
    return divergence.summary(program.mesh, hidden) if meshes.processes(program.mesh) > 1 else None
