"""Whisper's token rule: masks for language, task and timestamp tokens (arXiv:2212.04356).

The rule runs on the device as part of the sampler: it reads sampled tokens from the device's history, so that a request
with timestamps decodes like any other. It combines transformers' logits processors (`SuppressTokensAtBegin`,
`SuppressTokens`, `WhisperTimeStampLogitsProcessor`) and its language detection.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntFlag
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.checkpoint.plain_json import shorten, show
from jaxinfer.errors import ConfigError


class RuleFlags(IntFlag):
    """Bits of a request's rule parameter: which kinds of tokens its output has."""

    TEXT = 1
    """Set for all requests: mask suppressed tokens."""
    TIMESTAMPS = 2
    """Timestamps in pairs around each segment; without it the prompt ends with `<|notimestamps|>`."""
    DETECT = 4
    """Force the first token to the most likely language, the next to the task and, without TIMESTAMPS, the one after
    to `<|notimestamps|>`.
    """
    TRANSLATE = 8
    """The task is to translate, not to transcribe."""


@dataclass(frozen=True)
class WhisperTokens:
    """Special tokens of a checkpoint, from generation_config.json. Hashable, as compiled steps close over it."""

    eos: int
    start: int
    """Id of `<|startoftranscript|>`."""
    languages: tuple[tuple[str, int], ...] = ()
    """`("<|en|>", id)`, ...; empty for English-only models."""
    tasks: tuple[tuple[str, int], ...] = ()
    """`("transcribe", id)`, `("translate", id)`; empty for English-only models."""
    no_timestamps: int | None = None
    """Id of `<|notimestamps|>`; timestamp 0.00 is the next id. None if the model has no timestamps."""
    suppress: tuple[int, ...] = ()
    """Token ids that are never sampled."""
    begin_suppress: tuple[int, ...] = ()
    """Token ids that are not sampled first."""
    max_initial: int | None = None
    """Maximum of the first timestamp, in steps."""

    @classmethod
    def of(cls, generation_config: Mapping[str, Any], config: Mapping[str, Any]) -> "WhisperTokens":
        """Read the tokens from generation_config.json, falling back to config.json.

        Raises:
            ConfigError: a token id is invalid, or neither file has a start token.
        """

        def one(name: str) -> int | None:
            value = generation_config.get(name, config.get(name))
            value = value[0] if isinstance(value, list) and value else value
            return None if value is None else _id(name, value)

        def several(name: str) -> tuple[int, ...]:
            found = (generation_config or config).get(name) or []
            if not isinstance(found, list):
                raise ConfigError(f"generation_config.json: {name} must be a list of token ids, got {show(found)}")
            return tuple(_id(name, value) for value in found if value != -1)

        def named(name: str) -> tuple[tuple[str, int], ...]:
            found = generation_config.get(name) or {}
            if not isinstance(found, Mapping):
                raise ConfigError(f"generation_config.json: {name} must map names to token ids, got {show(found)}")
            return tuple((key, _id(f"{name}[{shorten(repr(key))}]", value)) for key, value in found.items())

        start, eos = one("decoder_start_token_id"), one("eos_token_id")
        if start is None or eos is None:
            raise ConfigError(
                "neither generation_config.json nor config.json has decoder_start_token_id and eos_token_id; add "
                "them to generation_config.json"
            )
        english = generation_config.get("is_multilingual") is False
        return cls(
            eos,
            start,
            () if english else named("lang_to_id"),
            () if english else named("task_to_id"),
            one("no_timestamps_token_id"),
            several("suppress_tokens"),
            several("begin_suppress_tokens"),
            one("max_initial_timestamp_index"),
        )

    @property
    def first_timestamp(self) -> int | None:
        """Token id of timestamp 0.00."""
        return None if self.no_timestamps is None else self.no_timestamps + 1

    def forced(self, flags: int) -> int:
        """Return the number of forced tokens before the text when the language is detected."""
        if not flags & RuleFlags.DETECT:
            return 0
        return 1 + bool(self.tasks) + (not flags & RuleFlags.TIMESTAMPS and self.no_timestamps is not None)

    def language(self, token: int) -> str | None:
        """Return the code ("en") of a language token, or None."""
        return next((name.strip("<|>") for name, known in self.languages if known == token), None)

    def __call__(
        self, logits: jax.Array, history: jax.Array, position: jax.Array, begin: jax.Array, flags: jax.Array
    ) -> jax.Array:
        """Mask logits `[B, V']`: return them with -inf for forbidden tokens.

        Args:
            logits: `[B, V']`.
            history: tokens of each row, prompt first, `[B, L]`.
            position: position of the token to sample, `[B]`.
            begin: number of prompt tokens, `[B]`.
            flags: `RuleFlags` of each row, `[B]`; rows with 0 are returned unchanged.
        """
        at = position - begin
        detect, timed = (flags & RuleFlags.DETECT) > 0, (flags & RuleFlags.TIMESTAMPS) > 0
        plain = self.no_timestamps is not None
        forced = jnp.where(detect, 1 + bool(self.tasks) + jnp.where(timed, 0, int(plain)), 0)
        ids = jnp.arange(logits.shape[-1])
        out = jnp.where(self._mask(self.suppress, logits), -jnp.inf, logits)
        first = (at == forced)[:, None]
        out = jnp.where(first & self._mask(self.begin_suppress, logits), -jnp.inf, out)
        if plain:
            out = jnp.where(timed[:, None], self._timestamps(out, history, position, begin + forced), out)
        if self.languages:
            out = jnp.where((at < forced)[:, None], self._prefix(logits, ids, at, flags), out)
        return jnp.where((flags > 0)[:, None], out, logits)

    def _mask(self, tokens: tuple[int, ...], logits: jax.Array) -> np.ndarray:
        """Return a mask `[V']` that is True at these tokens."""
        made = np.zeros(logits.shape[-1], bool)
        made[[token for token in tokens if token < len(made)]] = True
        return made

    def _prefix(self, logits: jax.Array, ids: jax.Array, at: jax.Array, flags: jax.Array) -> jax.Array:
        """Mask all but each row's forced token, `[B, V']`: most likely language, task, or no timestamps."""
        known = self._mask(tuple(token for _, token in self.languages), logits)
        wanted = jnp.argmax(jnp.where(known, logits, -jnp.inf), axis=-1)
        if self.tasks:
            tasks = dict(self.tasks)
            task = jnp.where((flags & RuleFlags.TRANSLATE) > 0, tasks.get("translate", 0), tasks.get("transcribe", 0))
            wanted = jnp.where(at == 1, task, wanted)
        wanted = jnp.where(at == 1 + bool(self.tasks), self.no_timestamps or 0, wanted)
        # Keep NaN and infinite values, so that the sampler detects them.
        kept = jnp.where(jnp.isfinite(logits), 0.0, logits)
        return jnp.where(ids == wanted[:, None], kept, -jnp.inf)

    def _timestamps(self, logits: jax.Array, history: jax.Array, position: jax.Array, begin: jax.Array) -> jax.Array:
        """Mask timestamps `[B, V']` to be in pairs and non-decreasing, and text where timestamps are more likely."""
        zero, ids = self.first_timestamp, jnp.arange(logits.shape[-1])
        stamps = ids >= zero
        row = jnp.arange(history.shape[0])
        last, before = (history[row, jnp.clip(position - back, 0, history.shape[1] - 1)] for back in (1, 2))
        made = position - begin
        after_stamp = (made >= 1) & (last >= zero)
        after_two = (made < 2) | (before >= zero)
        place = jnp.arange(history.shape[1])
        timestamps = (place >= begin[:, None]) & (place < position[:, None]) & (history >= zero)
        # The last timestamp is the largest one, as they never decrease.
        latest = jnp.max(jnp.where(timestamps, history, -1), axis=-1)
        least = jnp.where(latest < 0, zero, jnp.where(after_stamp & ~after_two, latest, latest + 1))
        forbidden = (ids == self.no_timestamps) | (stamps & (ids < least[:, None]))
        forbidden |= (after_stamp & after_two)[:, None] & stamps
        forbidden |= (after_stamp & ~after_two)[:, None] & (ids < self.eos)
        start = (made == 0)[:, None]
        forbidden |= start & ~stamps
        if self.max_initial is not None:
            forbidden |= start & (ids > zero + self.max_initial)
        out = jnp.where(forbidden, -jnp.inf, logits)
        # The timestamps' total probability exceeds that of the most likely text token.
        together = jax.nn.logsumexp(jnp.where(stamps, out, -jnp.inf), axis=-1)
        text = jnp.max(jnp.where(stamps, -jnp.inf, out), axis=-1)
        return jnp.where((together > text)[:, None] & ~stamps, -jnp.inf, out)


def _id(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise ConfigError(f"generation_config.json: {name} is {show(value)}; it must be a token id")
    return value
