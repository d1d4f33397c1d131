"""What a config.json says about rotary position embeddings, in the style of transformers 5 or before it.

`RopeConfig.from_hf` is strict: a kind, a key or a value that would change the numbers in a way not known
here is a ConfigError. The mathematics is in `rope.py`.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from jaxinfer.errors import ConfigError

logger = logging.getLogger(__name__)

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")

ROPE_FIELDS = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
    "max_position_embeddings",
    "original_max_position_embeddings",
)
"""The top-level fields of config.json that `RopeConfig.from_hf` reads."""

MAX_NUMBER = 1e30
"""Largest theta or factor: what is computed of them stays finite."""
MAX_LENGTH = 2**27
"""Most tokens of a sequence that a config.json may state; far above any real model."""

_ORIGINAL = "original_max_position_embeddings"
_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
_OPTIONAL = {
    "default": (),
    "linear": (),
    "dynamic": (),
    "llama3": (_ORIGINAL,),
    "yarn": (_ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": (_ORIGINAL, "attention_factor", "factor"),
}
_EVERY_KIND = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}
# What one kind uses and another does not: transformers ignores it there, and so must the same numbers.
_OF_SOME_KIND = {name for table in (_REQUIRED, _OPTIONAL) for names in table.values() for name in names}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """One model's rotary embedding. Lengths and positions are in tokens; None means "not stated"."""

    kind: str
    """One of `ROPE_KINDS`."""
    theta: float
    """Base of the geometric series of wavelengths."""
    head_dim: int
    """D, the whole width of a head."""
    rotary_dim: int
    """The leading dims of a head that the frequencies are computed for (partial_rotary_factor x D)."""
    max_position: int
    """max_position_embeddings: the longest sequence the checkpoint claims to serve."""
    factor: float | None = None
    """Stretch of the context; yarn and longrope fall back to max_position / original_max_position."""
    original_max_position: int | None = None
    """Length the model was trained at before it was stretched (llama3, yarn, longrope)."""
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    """Multiplier of cos and sin (yarn, longrope); derived from the factors when not stated."""
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    """yarn: round the ends of the blended range to whole dims."""
    short_factor: tuple[float, ...] | None = None
    """longrope: divisor of each frequency, [R/2], up to original_max_position."""
    long_factor: tuple[float, ...] | None = None
    """longrope: divisor of each frequency, [R/2], beyond it."""

    @classmethod
    def from_hf(cls, config: dict[str, Any], head_dim: int, default_theta: float = 10_000.0) -> RopeConfig:
        """Read `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` of a config.json.

        `default_theta`: the family's `rope_theta` where the file states none.

        Raises ConfigError for a kind, a key or a value that cannot be served with the right numbers.
        """
        parameters = _standardise(config, default_theta)
        kind = _kind(parameters)
        _check_keys(kind, parameters)
        partial = _positive(parameters, "partial_rotary_factor") or 1.0
        if partial > 1:
            raise ConfigError(f"rope: partial_rotary_factor={partial} must be in (0, 1].")
        fields: dict[str, Any] = {
            "kind": kind,
            "head_dim": head_dim,
            "rotary_dim": int(head_dim * partial),
            "theta": _positive(parameters, "rope_theta"),
            "max_position": _length(config, "max_position_embeddings"),
        }
        for name in _REQUIRED[kind] + _OPTIONAL[kind]:
            fields["original_max_position" if name == _ORIGINAL else name] = _read(parameters, name)
        if kind in ("llama3", "yarn", "longrope"):
            fields["original_max_position"] = _original_length(config, parameters)
        rope = cls(**fields)
        _check(rope)
        return rope

    @property
    def stretched_length(self) -> int:
        """Return the longest sequence that the frequencies are made for, in tokens.

        `max_position_embeddings` of published files is either this length or, as in the model cards of Qwen2.5 and
        Qwen3, still the trained one. linear and dynamic stretch that; yarn stretches the original length.
        """
        if self.kind == "yarn" and self.factor is not None:
            return int(self.original_max_position * self.factor)
        return int(self.max_position * self.factor) if self.kind in ("linear", "dynamic") else self.max_position

    @property
    def depends_on_length(self) -> bool:
        """Whether a token's rotation depends on the length of its sequence, not on its position alone."""
        return self.kind in ("dynamic", "longrope")

    def length_key(self, prompt_len: int) -> bytes:
        """Salt for the prefix cache: prompts with equal keys (and equal tokens) have equal rotated keys."""
        if self.kind == "dynamic" and prompt_len > self.max_position:
            return b"dynamic:%d" % prompt_len
        if self.kind == "longrope" and prompt_len > self.original_max_position:
            return b"long"
        return b""


def _standardise(config: dict[str, Any], default_theta: float) -> dict[str, Any]:
    """The rope's own dict in the style of transformers 5: rope_theta and partial_rotary_factor inside."""
    # An empty rope_scaling counts as absent; a filled one wins, as in transformers.
    source = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    parameters = config.get(source) or {}
    if not isinstance(parameters, dict):
        raise ConfigError(f"{source} must be an object, found {_show(parameters)}.")
    parameters = dict(parameters)
    for name, default in (("rope_theta", default_theta), ("partial_rotary_factor", None)):
        outer, inner = config.get(name), parameters.get(name)
        if outer is not None and inner is not None and outer != inner:
            raise ConfigError(
                f"{name}={_show(outer)} contradicts {source}.{name}={_show(inner)}; state one of them, "
                f"for instance with hf_overrides={{{name!r}: None}}."
            )
        parameters[name] = next((value for value in (inner, outer) if value is not None), default)
    return parameters


def _show(value: Any) -> str:
    """Show a value in a message, cut short; Python refuses to write integers of thousands of digits."""
    if isinstance(value, int) and abs(value) >= 2**100:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _kind(parameters: dict[str, Any]) -> str:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    # Phi-3's first configs said "su", or "yarn" for what has been longrope ever since.
    if kind == "su" or (kind == "yarn" and "short_factor" in parameters and "long_factor" in parameters):
        kind = "longrope"
    if kind not in ROPE_KINDS:
        raise ConfigError(f"rope type {_show(kind)} is not supported; supported: {', '.join(ROPE_KINDS)}.")
    return kind


def _check_keys(kind: str, parameters: dict[str, Any]) -> None:
    """Raises ConfigError for missing keys and for keys whose effect on the numbers is not known."""
    missing = [name for name in _REQUIRED[kind] if name not in parameters]
    if missing:
        raise ConfigError(f"rope type {kind!r} needs {', '.join(missing)}; found {sorted(parameters)}.")
    used = _EVERY_KIND.union(_REQUIRED[kind], _OPTIONAL[kind])
    extra = [name for name, value in parameters.items() if name not in used and value is not None]
    unknown = [name for name in extra if name not in _OF_SOME_KIND]
    if unknown:
        found = ", ".join(f"{name}={_show(parameters[name])}" for name in unknown)
        raise ConfigError(
            f"rope type {kind!r}: unknown {found}, which may change the numbers; supported "
            f"kinds: {', '.join(ROPE_KINDS)}. If it is known to be harmless, pass "
            "hf_overrides with rope_parameters that leave it out."
        )
    if extra:
        logger.warning("rope type %r does not use %s; ignored, as transformers does.", kind, ", ".join(extra))


def _read(parameters: dict[str, Any], name: str) -> Any:
    if name in ("short_factor", "long_factor"):
        values = parameters[name]
        if not isinstance(values, list) or not values:
            raise ConfigError(f"rope: {name} must be a list of numbers, found {_show(values)}.")
        return tuple(_positive({name: value}, name) for value in values)
    if name == "truncate":
        value = parameters.get(name)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"rope: truncate must be true or false, found {_show(value)}.")
        return True if value is None else value
    if name == _ORIGINAL:
        return _length(parameters, name) if parameters.get(name) is not None else None
    # Zero switches mscale off and is what "no attention" would mean; nothing else may be zero.
    if name in ("mscale", "mscale_all_dim", "attention_factor") and parameters.get(name) == 0:
        return 0.0
    value = _positive(parameters, name)
    if value is None and name in ("low_freq_factor", "high_freq_factor"):
        raise ConfigError(f"rope: {name} must be a number, found None.")
    return value


def _positive(parameters: dict[str, Any], name: str) -> float | None:
    value = parameters.get(name)
    if value is None:
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value <= MAX_NUMBER:
        raise ConfigError(f"rope: {name}={_show(value)} must be a number above 0, up to {MAX_NUMBER:g}.")
    return float(value)


def _length(config: dict[str, Any], name: str) -> int:
    value = config.get(name)
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    if not isinstance(value, int) or isinstance(value, bool) or not 2 <= value <= MAX_LENGTH:
        raise ConfigError(f"rope: {name}={_show(value)} must be a whole number of tokens, from 2 to {MAX_LENGTH}.")
    return value


def _original_length(config: dict[str, Any], parameters: dict[str, Any]) -> int:
    """The trained length: the top-level field (Phi-3 keeps it there), else the rope's, else the maximum."""
    if config.get(_ORIGINAL) is not None:
        return _length(config, _ORIGINAL)
    return _read(parameters, _ORIGINAL) or _length(config, "max_position_embeddings")


def _check(rope: RopeConfig) -> None:
    """Raises ConfigError for values that are each fine and together give no numbers."""
    if rope.rotary_dim < 2 or rope.rotary_dim % 2:
        raise ConfigError(
            f"rope: head_dim={rope.head_dim} x partial_rotary_factor gives {rope.rotary_dim} "
            "rotary dims; they must be even and at least 2."
        )
    if rope.theta <= 1:
        raise ConfigError(f"rope: rope_theta={rope.theta} must be above 1.")
    if rope.factor is None and rope.kind in ("linear", "dynamic", "llama3"):
        raise ConfigError(f"rope type {rope.kind!r}: factor must be a number, found None.")
    if rope.kind == "dynamic" and rope.rotary_dim <= 2:
        raise ConfigError(f"rope type 'dynamic' needs more than 2 rotary dims, found {rope.rotary_dim}.")
    if rope.kind == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        raise ConfigError(
            f"rope type 'llama3': high_freq_factor={rope.high_freq_factor} must be above "
            f"low_freq_factor={rope.low_freq_factor}."
        )
    for name in ("short_factor", "long_factor"):
        factors = getattr(rope, name)
        if factors is not None and len(factors) != rope.rotary_dim // 2:
            raise ConfigError(
                f"rope: {name} has {len(factors)} numbers, expected {rope.rotary_dim // 2} "
                f"(half of {rope.rotary_dim} rotary dims)."
            )
