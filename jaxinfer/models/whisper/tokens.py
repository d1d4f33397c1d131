"""What Whisper may say next: its language, task and timestamp tokens (arXiv:2212.04356), as a rule over the logits.

The rule runs on the device, as the sampler's part of a step: it reads the tokens made so far where they lie, so that a
request with timestamps decodes like any other. It is what transformers' processors do together
(`SuppressTokensAtBegin`, `SuppressTokens`, `WhisperTimeStampLogitsProcessor`), and its detection of the language.
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


class Says(IntFlag):
    """What a request's tokens are to be: the bits of its rule."""

    TEXT = 1
    """Set for all: no suppressed tokens."""
    TIMESTAMPS = 2
    """Timestamps in pairs around what is said; without it none follow the prompt."""
    DETECT = 4
    """The first token is the likeliest language, the next one the task, and where timestamps are off, then the token
    that says so."""
    TRANSLATE = 8
    """That task is to translate, not to transcribe."""


@dataclass(frozen=True)
class WhisperTokens:
    """The special tokens of a checkpoint, of its generation_config.json; hashable, as a compiled step closes over
    it."""

    eos: int
    start: int
    """`<|startoftranscript|>`."""
    languages: tuple[tuple[str, int], ...] = ()
    """`("<|en|>", id)`, ...; none where the model knows English only."""
    tasks: tuple[tuple[str, int], ...] = ()
    """`("transcribe", id)`, `("translate", id)`; likewise."""
    no_timestamps: int | None = None
    """`<|notimestamps|>`; timestamp 0.00 is the next id. None: the model has no timestamps."""
    suppress: tuple[int, ...] = ()
    """Never made."""
    begin_suppress: tuple[int, ...] = ()
    """Not made first."""
    max_initial: int | None = None
    """The largest first timestamp, in steps."""

    @classmethod
    def of(cls, generation_config: Mapping[str, Any], config: Mapping[str, Any]) -> "WhisperTokens":
        """Read the tokens of generation_config.json, and of config.json where there is none.

        Raises:
            ConfigError: an id that is none, or a start token that neither names.
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
                "neither generation_config.json nor config.json has decoder_start_token_id and eos_token_id"
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
        """The token of 0.00 s."""
        return None if self.no_timestamps is None else self.no_timestamps + 1

    def forced(self, says: int) -> int:
        """How many tokens come before what is said, where the language is detected."""
        if not says & Says.DETECT:
            return 0
        return 1 + bool(self.tasks) + (not says & Says.TIMESTAMPS and self.no_timestamps is not None)

    def language(self, token: int) -> str | None:
        """The code ("en") of a language's token."""
        return next((name.strip("<|>") for name, known in self.languages if known == token), None)

    def __call__(
        self, logits: jax.Array, history: jax.Array, position: jax.Array, begin: jax.Array, says: jax.Array
    ) -> jax.Array:
        """The logits with -inf where a token may not be.

        Args:
            logits: `[B, V']`.
            history: `[B, L]` the tokens of each row, prompt first.
            position: `[B]` of the token to be made.
            begin: `[B]` tokens of the prompt.
            says: `[B]` `Says`; rows of 0 are left as they are.

        Returns:
            `[B, V']`.
        """
        at = position - begin
        detect, timed = (says & Says.DETECT) > 0, (says & Says.TIMESTAMPS) > 0
        plain = self.no_timestamps is not None
        forced = jnp.where(detect, 1 + bool(self.tasks) + jnp.where(timed, 0, int(plain)), 0)
        ids = jnp.arange(logits.shape[-1])
        out = jnp.where(self._mask(self.suppress, logits), -jnp.inf, logits)
        first = (at == forced)[:, None]
        out = jnp.where(first & self._mask(self.begin_suppress, logits), -jnp.inf, out)
        if plain:
            out = jnp.where(timed[:, None], self._timestamps(out, history, position, begin + forced), out)
        if self.languages:
            out = jnp.where((at < forced)[:, None], self._prefix(logits, ids, at, says), out)
        return jnp.where((says > 0)[:, None], out, logits)

    def _mask(self, tokens: tuple[int, ...], logits: jax.Array) -> np.ndarray:
        """`[V']` where one of these is."""
        made = np.zeros(logits.shape[-1], bool)
        made[[token for token in tokens if token < len(made)]] = True
        return made

    def _prefix(self, logits: jax.Array, ids: jax.Array, at: jax.Array, says: jax.Array) -> jax.Array:
        """`[B, V']` only the one token that comes before what is said: the likeliest language, the task, no
        timestamps."""
        known = self._mask(tuple(token for _, token in self.languages), logits)
        wanted = jnp.argmax(jnp.where(known, logits, -jnp.inf), axis=-1)
        if self.tasks:
            tasks = dict(self.tasks)
            task = jnp.where((says & Says.TRANSLATE) > 0, tasks.get("translate", 0), tasks.get("transcribe", 0))
            wanted = jnp.where(at == 1, task, wanted)
        wanted = jnp.where(at == 1 + bool(self.tasks), self.no_timestamps or 0, wanted)
        # What is not a number stays what it is, for the sampler to see.
        kept = jnp.where(jnp.isfinite(logits), 0.0, logits)
        return jnp.where(ids == wanted[:, None], kept, -jnp.inf)

    def _timestamps(self, logits: jax.Array, history: jax.Array, position: jax.Array, begin: jax.Array) -> jax.Array:
        """`[B, V']`: timestamps in pairs, never going back, and where they are likelier than any text no text."""
        zero, ids = self.first_timestamp, jnp.arange(logits.shape[-1])
        stamps = ids >= zero
        row = jnp.arange(history.shape[0])
        last, before = (history[row, jnp.clip(position - back, 0, history.shape[1] - 1)] for back in (1, 2))
        made = position - begin
        after_stamp = (made >= 1) & (last >= zero)
        after_two = (made < 2) | (before >= zero)
        place = jnp.arange(history.shape[1])
        said = (place >= begin[:, None]) & (place < position[:, None]) & (history >= zero)
        # The last stamp that was made is the largest one, as they never go back.
        latest = jnp.max(jnp.where(said, history, -1), axis=-1)
        least = jnp.where(latest < 0, zero, jnp.where(after_stamp & ~after_two, latest, latest + 1))
        forbidden = (ids == self.no_timestamps) | (stamps & (ids < least[:, None]))
        forbidden |= (after_stamp & after_two)[:, None] & stamps
        forbidden |= (after_stamp & ~after_two)[:, None] & (ids < self.eos)
        start = (made == 0)[:, None]
        forbidden |= start & ~stamps
        if self.max_initial is not None:
            forbidden |= start & (ids > zero + self.max_initial)
        out = jnp.where(forbidden, -jnp.inf, logits)
        # Together they are likelier than the likeliest text.
        together = jax.nn.logsumexp(jnp.where(stamps, out, -jnp.inf), axis=-1)
        text = jnp.max(jnp.where(stamps, -jnp.inf, out), axis=-1)
        return jnp.where((together > text)[:, None] & ~stamps, -jnp.inf, out)


def _id(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise ConfigError(f"generation_config.json: {name} is {show(value)}; it must be a token id")
    return value
