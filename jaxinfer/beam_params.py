"""Beam search parameters, with transformers' names and meanings, strictly validated."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from jaxinfer._utils.checks import as_float, as_int, describe, show_int
from jaxinfer.sampling_params import SamplingParams

MAX_WIDTH = 256
"""Maximum number of beams of a prompt: each has its own row and blocks."""
MAX_LENGTH_PENALTY = 5.0
"""Maximum absolute `length_penalty`: lengths of millions raised to it are finite in float32."""

_UNUSED = {
    "n": 1,
    "temperature": (0.0, 1.0),
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "stop": (),
    "logprobs": None,
    "prompt_logprobs": None,
    "structured_outputs": None,
}
"""Fields of `SamplingParams` that do not apply to beam search, with their neutral values."""


@dataclass(frozen=True, kw_only=True)
class BeamParams:
    """Parameters of a beam search as run by `transformers.GenerationMixin.generate(num_beams=...)`.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of range. Both name the field, the value and the limit.
    """

    width: int
    """Number of beams that continue at each step (`num_beams`), 1 to `MAX_WIDTH`."""
    length_penalty: float = 1.0
    """A finished beam's score is the sum of its tokens' log-probabilities divided by their number to the power of
    this.
    """
    early_stopping: bool | str = False
    """When to stop, once there are `width` finished beams. True: at once. False: when the best running beam, at its
    current length, scores no better than the worst finished one. "never": when it cannot score better at any length.
    """
    num_return_sequences: int | None = None
    """Number of best beams to return; None for all `width`."""

    def __post_init__(self) -> None:
        self._integer("width", MAX_WIDTH, "")
        if self.num_return_sequences is None:
            object.__setattr__(self, "num_return_sequences", self.width)
        self._integer("num_return_sequences", self.width, ", the width")
        penalty = as_float("length_penalty", self.length_penalty)
        if abs(penalty) > MAX_LENGTH_PENALTY:
            most = f"{MAX_LENGTH_PENALTY:g}"
            raise ValueError(f"length_penalty must be in [-{most}, {most}], got {penalty}.")
        object.__setattr__(self, "length_penalty", penalty)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(f"early_stopping must be True, False or 'never', got {describe(self.early_stopping)}.")

    def _integer(self, name: str, most: int, what: str) -> None:
        value = as_int(name, getattr(self, name))
        if not 1 <= value <= most:
            raise ValueError(f"{name} must be between 1 and {most}{what}, got {show_int(value)}.")
        object.__setattr__(self, name, value)


def beam_sampling(params: Any, default: SamplingParams, max_tokens: int | None) -> SamplingParams:
    """Return the sampling parameters of a beam search: masks, penalties, stop tokens and text settings of `params`.

    Args:
        params: the caller's parameters; None for those of the model's defaults that apply without sampling.
        default: the model's defaults.
        max_tokens: maximum number of new tokens, replacing that of `params`.

    Raises:
        TypeError: `params` is not a `SamplingParams`.
        ValueError: `params` sets a field that does not apply to beam search.
    """
    if params is not None and not isinstance(params, SamplingParams):
        raise TypeError(f"sampling_params of a beam search must be a SamplingParams, got {describe(params)}.")
    for name, neutral in _UNUSED.items():
        value = getattr(params, name, neutral)
        if value != neutral and (not isinstance(neutral, tuple) or value not in neutral):
            raise ValueError(f"{name} does not apply to beam search, got {name}={value!r}; remove it.")
    plain = {"n": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    if params is not None:
        return dataclasses.replace(params, **plain, max_tokens=max_tokens)
    least = default.min_tokens  # may exceed the caller's max_tokens
    least = least if max_tokens is None else min(least, as_int("max_tokens", max_tokens))
    return dataclasses.replace(default, **plain, max_tokens=max_tokens, min_tokens=least)
