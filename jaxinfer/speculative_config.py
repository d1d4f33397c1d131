"""Settings of speculative decoding."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jaxinfer.errors import ConfigError

METHODS = NGRAM, DRAFT_MODEL = "ngram", "draft_model"
MOST_TOKENS = 32


@dataclass(frozen=True)
class SpeculativeConfig:
    """How tokens are drafted, with the names of vLLM's `speculative_config`.

    Each draft is verified by the model in one step, which samples a token after each of its tokens. Those that equal
    the samples are kept, so the output is that of decoding one token at a time, greedy and seeded (up to rounding: the
    step that verifies is a prefill step).
    """

    method: str = NGRAM
    """"ngram": the tokens that followed the last ones where they occurred before (prompt lookup). "draft_model": those
    that a smaller model with the same tokens samples.
    """
    model: str | None = None
    """Draft model: a directory, GGUF file or Hub id. Its layers must all have full attention. It has the engine's
    setting `dtype`, its devices and `kv_cache_dtype`, and cache arrays of its own in the same blocks. It keeps its
    weights when the engine sleeps or gets others.
    """
    num_speculative_tokens: int = 7
    """Maximum number of tokens of a draft."""
    prompt_lookup_max: int = 4
    """Most tokens at the end of a sequence that are looked up."""
    prompt_lookup_min: int = 2
    """Fewest tokens at the end of a sequence that must have occurred before."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"speculative_config: method must be {' or '.join(METHODS)}, got {self.method!r}")
        self._check_model()
        limits = {"num_speculative_tokens": MOST_TOKENS, "prompt_lookup_max": 64, "prompt_lookup_min": 64}
        for name, most in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ConfigError(f"speculative_config: {name} must be an integer in [1, {most}], got {value!r}")
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ConfigError(
                f"speculative_config: prompt_lookup_min is {self.prompt_lookup_min}, more than prompt_lookup_max = "
                f"{self.prompt_lookup_max}; lower it"
            )

    def _check_model(self) -> None:
        """Check the draft model's name, and that no field of another method is set.

        Raises:
            ConfigError: it is missing, empty or not a text, or the method has no use for a field.
        """
        if isinstance(self.model, Path):
            object.__setattr__(self, "model", str(self.model))
        if self.method != DRAFT_MODEL:
            if self.model is not None:
                raise ConfigError(
                    f"speculative_config: model is {self.model!r}, and method {self.method!r} has none; pass "
                    f"'method': '{DRAFT_MODEL}', or leave model out"
                )
            return
        if not isinstance(self.model, str) or not self.model:
            raise ConfigError(
                f"speculative_config: method '{DRAFT_MODEL}' needs a model, a directory, GGUF file or Hub id; got "
                f"{self.model!r}"
            )
        for field in fields(self):
            if field.name.startswith("prompt_lookup") and getattr(self, field.name) != field.default:
                raise ConfigError(f"speculative_config: {field.name} is for method '{NGRAM}'; leave it out")

    @classmethod
    def of(cls, value: Any) -> "SpeculativeConfig":
        """Make a config of a mapping, as a user passes it, or return one that is made.

        Raises:
            ConfigError: it is neither, or a name or value is wrong.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f"speculative_config must be a dictionary such as {{'method': 'ngram'}}, got {value!r}")
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in value if name not in known]:
            raise ConfigError(f"speculative_config has no {unknown[0]!r}; known: {', '.join(known)}")
        return cls(**value)
