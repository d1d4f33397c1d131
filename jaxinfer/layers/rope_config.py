"""Parsing of rotary-embedding fields in config.json, in the style of transformers 5 and of earlier versions.

`RopeConfig.from_hf` is strict: a type, key or value whose effect on the numbers is unknown raises ConfigError. The math
is in `rope.py`.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from jaxinfer.errors import ConfigError

logger = logging.getLogger(__name__)

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")

ROPE_FIELDS = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
    "max_position_embeddings",
    "original_max_position_embeddings",
)
"""Top-level fields of config.json that `RopeConfig.from_hf` reads."""

MAX_NUMBER = 1e30
"""Largest theta or factor: keeps everything computed from it finite."""
MAX_LENGTH = 2**27
"""Largest sequence length, in tokens, that a config.json may state; far above any real model."""

_ORIGINAL = "original_max_position_embeddings"
_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "proportional": (),
}
_OPTIONAL = {
    "default": (),
    "linear": (),
    "dynamic": (),
    "llama3": (_ORIGINAL,),
    "yarn": (_ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": (_ORIGINAL, "attention_factor", "factor", "short_mscale", "long_mscale"),
    "proportional": ("factor",),
}
REMEDY = "correct config.json, or pass the right value with hf_overrides"
# mrope assigns a token's time, height and width to sections of the frequencies; for tokens of text the three are equal.
_EVERY_KIND = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"),
    *("mrope_section", "mrope_interleaved"),
}
# Keys of some kinds only: transformers ignores them for other kinds, so they are ignored here too.
_OF_SOME_KIND = {name for table in (_REQUIRED, _OPTIONAL) for names in table.values() for name in names}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of a model. Lengths and positions are in tokens; None means "not stated"."""

    kind: str
    """One of `ROPE_KINDS`."""
    theta: float
    """Base of the geometric series of wavelengths."""
    head_dim: int
    """D, the full width of a head."""
    rotary_dim: int
    """Leading dims of a head that are rotated (partial_rotary_factor x D); for proportional all."""
    max_position: int
    """max_position_embeddings: the longest sequence the checkpoint is declared for."""
    factor: float | None = None
    """Context extension factor; yarn and longrope default to max_position / original_max_position."""
    original_max_position: int | None = None
    """Trained length before context extension (llama3, yarn, longrope)."""
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    """Multiplier of cos and sin (yarn, longrope); derived from the factors if not stated."""
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    """yarn: whether to round the ends of the blended range to whole dims."""
    short_factor: tuple[float, ...] | None = None
    """longrope: divisor of each frequency, [R/2], for sequences up to original_max_position."""
    long_factor: tuple[float, ...] | None = None
    """longrope: divisor of each frequency, [R/2], for longer sequences."""
    short_mscale: float | None = None
    """longrope: multiplier of cos and sin for sequences up to original_max_position, in place of `attention_factor`."""
    long_mscale: float | None = None
    """longrope: the same for longer sequences."""
    sections: tuple[int, ...] | None = None
    """M-RoPE: number of frequencies that time, rows and columns turn (`layers.rope`); None for one position a token."""
    turning: int | None = None
    """proportional: leading frequencies, of the series over all dims, that turn; the others are 0."""

    @classmethod
    def from_hf(cls, config: dict[str, Any], head_dim: int, default_theta: float = 10_000.0) -> RopeConfig:
        """Read `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` of a config.json.

        Args:
            config: content of config.json.
            head_dim: D.
            default_theta: the family's `rope_theta` if the file states none.

        Raises:
            ConfigError: a type, key or value that cannot be served with the right numbers.
        """
        parameters = _standardise(config, default_theta)
        kind = _kind(parameters)
        _check_keys(kind, parameters)
        partial = _positive(parameters, "partial_rotary_factor") or 1.0
        if partial > 1:
            raise ConfigError(f"rope: partial_rotary_factor={partial} must be in (0, 1]; {REMEDY}.")
        fields: dict[str, Any] = {
            "kind": kind,
            "head_dim": head_dim,
            "rotary_dim": int(head_dim * partial),
            "theta": _positive(parameters, "rope_theta"),
            "max_position": _length(config, "max_position_embeddings"),
        }
        for name in _REQUIRED[kind] + _OPTIONAL[kind]:
            fields["original_max_position" if name == _ORIGINAL else name] = _read(parameters, name)
        if kind == "proportional":
            fields |= {"rotary_dim": head_dim, "turning": int(partial * head_dim // 2)}
        if kind in ("llama3", "yarn", "longrope"):
            fields["original_max_position"] = _original_length(config, parameters)
        rope = cls(**fields)
        _check(rope)
        return rope

    @property
    def stretched_length(self) -> int:
        """Longest sequence the scaled frequencies are made for, in tokens.

        In published files `max_position_embeddings` is either this length or, as in the model cards of Qwen2.5 and
        Qwen3, still the trained one. linear and dynamic scale that; yarn scales the original length.
        """
        if self.kind == "yarn" and self.factor is not None:
            return int(self.original_max_position * self.factor)
        return int(self.max_position * self.factor) if self.kind in ("linear", "dynamic") else self.max_position

    @property
    def depends_on_length(self) -> bool:
        """Whether a token's rotation depends on the sequence length and not on its position alone."""
        return self.kind in ("dynamic", "longrope")

    def length_key(self, prompt_len: int) -> bytes:
        """Return a prefix-cache salt: prompts with equal keys and equal tokens have equal rotated keys."""
        if self.kind == "dynamic" and prompt_len > self.max_position:
            return b"dynamic:%d" % prompt_len
        if self.kind == "longrope" and prompt_len > self.original_max_position:
            return b"long"
        return b""


def _standardise(config: dict[str, Any], default_theta: float) -> dict[str, Any]:
    """Return the rope dict in the style of transformers 5, with rope_theta and partial_rotary_factor inside."""
    # As in transformers, rope_scaling takes precedence unless it is empty.
    source = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    parameters = config.get(source) or {}
    if not isinstance(parameters, dict):
        raise ConfigError(
            f"{source} must be an object, or null for the default rope, found {_show(parameters)}; {REMEDY}."
        )
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
    """Format a value for a message, truncated; Python refuses to format integers of thousands of digits."""
    if isinstance(value, int) and abs(value) >= 2**100:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _kind(parameters: dict[str, Any]) -> str:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    # Early Phi-3 configs name longrope "su" or "yarn".
    if kind == "su" or (kind == "yarn" and "short_factor" in parameters and "long_factor" in parameters):
        kind = "longrope"
    if kind not in ROPE_KINDS:
        raise ConfigError(f"rope type {_show(kind)} is not supported; supported: {', '.join(ROPE_KINDS)}; {REMEDY}.")
    return kind


def _check_keys(kind: str, parameters: dict[str, Any]) -> None:
    """Check for missing keys and for keys whose effect on the numbers is unknown.

    Raises:
        ConfigError: there are such keys.
    """
    missing = [name for name in _REQUIRED[kind] if name not in parameters]
    if missing:
        raise ConfigError(f"rope type {kind!r} needs {', '.join(missing)}; found {sorted(parameters)}; {REMEDY}.")
    used = _EVERY_KIND.union(_REQUIRED[kind], _OPTIONAL[kind])
    extra = [name for name, value in parameters.items() if name not in used and value is not None]
    unknown = [name for name in extra if name not in _OF_SOME_KIND]
    if unknown:
        found = ", ".join(f"{name}={_show(parameters[name])}" for name in unknown)
        raise ConfigError(
            f"rope type {kind!r}: unknown {found}, which may change the outputs; supported "
            f"types: {', '.join(ROPE_KINDS)}. If it is known to be harmless, pass "
            "hf_overrides with rope_parameters that leave it out."
        )
    if extra:
        logger.warning("rope type %r does not use %s; ignored, as transformers does.", kind, ", ".join(extra))


def _read(parameters: dict[str, Any], name: str) -> Any:
    if name in ("short_factor", "long_factor"):
        values = parameters[name]
        if not isinstance(values, list) or not values:
            raise ConfigError(f"rope: {name} must be a list of numbers, found {_show(values)}; {REMEDY}.")
        return tuple(_positive({name: value}, name) for value in values)
    if name == "truncate":
        value = parameters.get(name)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"rope: truncate must be true or false, found {_show(value)}; {REMEDY}.")
        return True if value is None else value
    if name == _ORIGINAL:
        return _length(parameters, name) if parameters.get(name) is not None else None
    # mscale=0 disables mscale, and attention_factor=0 is taken as stated; no other number may be 0.
    if name in ("mscale", "mscale_all_dim", "attention_factor") and parameters.get(name) == 0:
        return 0.0
    value = _positive(parameters, name)
    if value is None and name in ("low_freq_factor", "high_freq_factor"):
        raise ConfigError(f"rope: {name} must be a number, found null; {REMEDY}.")
    return value


def _positive(parameters: dict[str, Any], name: str) -> float | None:
    value = parameters.get(name)
    if value is None:
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value <= MAX_NUMBER:
        raise ConfigError(f"rope: {name}={_show(value)} must be a number above 0, up to {MAX_NUMBER:g}; {REMEDY}.")
    return float(value)


def _length(config: dict[str, Any], name: str) -> int:
    value = config.get(name)
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    if not isinstance(value, int) or isinstance(value, bool) or not 2 <= value <= MAX_LENGTH:
        raise ConfigError(
            f"rope: {name}={_show(value)} must be a whole number of tokens, from 2 to {MAX_LENGTH}; {REMEDY}."
        )
    return value


def _original_length(config: dict[str, Any], parameters: dict[str, Any]) -> int:
    """Return the trained length: the top-level field (as in Phi-3), else the rope dict's, else the maximum."""
    if config.get(_ORIGINAL) is not None:
        return _length(config, _ORIGINAL)
    return _read(parameters, _ORIGINAL) or _length(config, "max_position_embeddings")


def _check(rope: RopeConfig) -> None:
    """Check combinations of values that are valid separately.

    Raises:
        ConfigError: the combination is invalid.
    """
    if rope.rotary_dim < 2 or rope.rotary_dim % 2:
        raise ConfigError(
            f"rope: head_dim={rope.head_dim} x partial_rotary_factor gives {rope.rotary_dim} "
            f"rotary dims; they must be even and at least 2; {REMEDY}."
        )
    if rope.theta <= 1:
        raise ConfigError(f"rope: rope_theta={rope.theta} must be above 1; {REMEDY}.")
    if rope.factor is None and rope.kind in ("linear", "dynamic", "llama3"):
        raise ConfigError(f"rope type {rope.kind!r}: factor must be a number, found null; {REMEDY}.")
    if rope.kind == "dynamic" and rope.rotary_dim <= 2:
        raise ConfigError(f"rope type 'dynamic' needs more than 2 rotary dims, found {rope.rotary_dim}; {REMEDY}.")
    if rope.kind == "llama3" and rope.high_freq_factor < rope.low_freq_factor:
        raise ConfigError(
            f"rope type 'llama3': high_freq_factor={rope.high_freq_factor} must be at least "
            f"low_freq_factor={rope.low_freq_factor}; {REMEDY}."
        )
    for name in ("short_factor", "long_factor"):
        factors = getattr(rope, name)
        if factors is not None and len(factors) != rope.rotary_dim // 2:
            raise ConfigError(
                f"rope: {name} has {len(factors)} numbers, expected {rope.rotary_dim // 2} "
                f"(half of {rope.rotary_dim} rotary dims); {REMEDY}."
            )
