"""Read a Hugging Face folder's JSON files as plain data, and validate config.json strictly.

Code that a checkpoint names is never run. `ConfigReader` returns typed fields and finally refuses attributes that were
not read, because an attribute unknown to jaxinfer may change the model's outputs.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from jaxinfer.checkpoint.attributes import HARMLESS, ONE_VALUE, is_label, json_equal
from jaxinfer.checkpoint.formats import explain_missing, refuse_quantised
from jaxinfer.checkpoint.plain_json import read_json, show
from jaxinfer.errors import CheckpointError, ConfigError
from jaxinfer.layers.rope_config import ROPE_FIELDS, RopeConfig

logger = logging.getLogger(__name__)

SIZE_CAPS = {
    "vocab_size": 2**22,
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "moe_intermediate_size": 2**20,
    "num_hidden_layers": 1024,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 2**14,
    "d_model": 2**17,
    "encoder_layers": 1024,
    "decoder_layers": 1024,
    "encoder_attention_heads": 4096,
    "decoder_attention_heads": 4096,
    "encoder_ffn_dim": 2**20,
    "decoder_ffn_dim": 2**20,
    "num_experts": 2**14,
    "num_local_experts": 2**14,
    "max_position_embeddings": 2**27,
    "n_routed_experts": 2**14,
    "n_shared_experts": 2**10,
    "num_shared_experts": 2**10,
    "num_experts_per_tok": 2**10,
    "num_experts_per_token": 2**10,
    "shared_expert_intermediate_size": 2**20,
    "num_global_layers": 1024,
    "attention_heads": 4096,
    "num_heads": 4096,
    "max_num_tiles": 256,
    "num_channels": 256,
    "num_mel_bins": 2**12,
    "max_source_positions": 2**20,
    "max_target_positions": 2**20,
    "vision_output_dim": 2**20,
    "kv_lora_rank": 2**17,
    "q_lora_rank": 2**17,
    "qk_nope_head_dim": 2**14,
    "qk_rope_head_dim": 2**14,
    "v_head_dim": 2**14,
    "linear_num_heads": 4096,
    "linear_num_key_heads": 4096,
    "linear_num_value_heads": 4096,
    "linear_head_dim": 2**14,
    "linear_key_head_dim": 2**14,
    "linear_value_head_dim": 2**14,
    "linear_conv_kernel_dim": 2**10,
    "short_conv_kernel_size": 2**10,
    "model_max_length": 2**27,
    "n_group": 2**14,
    "num_expert_group": 2**14,
    "topk_group": 2**14,
}
"""Largest accepted value of each size in config.json: far above any real model and far below an integer overflow."""

_TOKENIZER_FILES = ("added_tokens.json", "tokenizer_config.json", "tokenizer.json")
_ID_DIGITS = 11
"""Digits from which on a token id cannot be an int32. Python refuses to convert thousands of digits."""
REQUIRED: Any = object()
"""Marks a field without a default: a missing value raises ConfigError."""

Default = TypeVar("Default")


def read_config(directory: Path, hf_overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read config.json and apply `hf_overrides` (see `apply_overrides`, whose errors also apply).

    Raises:
        CheckpointError: the file is missing or unreadable.
        ConfigError: the checkpoint is in an unsupported quantised format.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(explain_missing(directory, "config.json"))
    config = apply_overrides(read_json(path), hf_overrides)
    refuse_quantised(config, directory)
    return config


def apply_overrides(config: Mapping[str, Any], hf_overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the contents of config.json with `hf_overrides` applied by field name.

    An override of None removes the field. A dict for a nested configuration is merged into it: `{"vision_config":
    {"name": None}}` removes one nested field.

    Raises:
        ConfigError: the checkpoint is in an unsupported quantised format.
        TypeError: the overrides are not a dict with string keys.
    """
    overrides = {} if hf_overrides is None else hf_overrides
    if not isinstance(overrides, Mapping) or not all(isinstance(name, str) for name in overrides):
        raise TypeError(f"hf_overrides must be a dict of config.json names, found {show(overrides)}.")
    laid = {**config, **_rope_base(config, overrides), **overrides}
    for name, value in overrides.items():
        part = config.get(name)
        if name.endswith("_config") and isinstance(value, Mapping) and isinstance(part, dict):
            laid[name] = {**part, **_rope_base(part, value), **value}
    config = laid
    if config.get("auto_map"):
        logger.info("config.json names code of its own (auto_map): ignored, never executed.")
    refuse_quantised(config)
    return config


def _rope_base(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the base of the rope that a file states inside `rope_parameters`, where overrides replace that object
    without stating one.

    People lay a scaling over a model, and mean the base that it was trained with.
    """
    stated, given = config.get("rope_parameters"), overrides.get("rope_scaling") or overrides.get("rope_parameters")
    if not isinstance(stated, Mapping) or not isinstance(given, Mapping):
        return {}
    names = [name for name in ("rope_theta", "partial_rotary_factor") if config.get(name) is None]
    return {name: stated[name] for name in names if stated.get(name) is not None and given.get(name) is None}


def read_generation_config(directory: Path) -> dict[str, Any]:
    """Read generation_config.json; return {} if the file does not exist."""
    path = directory / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def added_token(directory: Path, text: str) -> int | None:
    """Return the id of an added token of the folder's tokenizer, read from its JSON files; None if it is not found."""
    found = {name: read_json(directory / name) for name in _TOKENIZER_FILES if (directory / name).is_file()}
    ids = [found.get("added_tokens.json", {}).get(text)]
    listed = found.get("tokenizer_config.json", {}).get("added_tokens_decoder")
    for name, token in listed.items() if isinstance(listed, dict) else ():
        named = isinstance(token, dict) and token.get("content") == text
        ids += [int(name)] if named and name.isdecimal() and len(name) < _ID_DIGITS else []
    listed = found.get("tokenizer.json", {}).get("added_tokens")
    for token in listed if isinstance(listed, list) else ():
        ids += [token.get("id")] if isinstance(token, dict) and token.get("content") == text else []
    return next((token for token in ids if _is_int(token) and 0 <= token < 2**31), None)


def check_sizes(config: Mapping[str, Any], *fields: str, part: str = "") -> None:
    """Check that each present field is a whole number from 1 to its cap in `SIZE_CAPS`, before anything is allocated.

    Absent fields pass: the model's family decides whether they have a default. Nested configurations (`vision_config`)
    are checked too.

    Args:
        config: contents of config.json, or of a nested configuration.
        fields: names in `SIZE_CAPS`.
        part: prefix of field names in error messages.

    Raises:
        ConfigError: a size is not a whole number or is outside of its range.
    """
    for name in fields:
        value, cap = int_if_whole(config.get(name)), SIZE_CAPS[name]
        if value is not None and (not _is_int(value) or not 1 <= value <= cap):
            raise ConfigError(f"{part}{name}={show(value)} must be a whole number from 1 to {cap}.")
    for name, value in config.items() if not part else ():
        if name.endswith("_config") and isinstance(value, Mapping):
            check_sizes(value, *fields, part=f"{name}.")


class ConfigReader:
    """Read typed attributes of config.json, or of an object in it, and record which ones were read.

    A field with a default may be absent or null. Every getter raises ConfigError with the family, the field and the
    value; `finish` raises it for attributes that were not read and may change the model's outputs.
    """

    def __init__(self, config: Mapping[str, Any], family: str) -> None:
        self.config = config
        self.default_theta = 10_000.0
        self.family = family
        self._consumed: set[str] = set()
        self._one_value: dict[str, tuple[Any, ...]] = dict(ONE_VALUE)
        self._parts: dict[str, ConfigReader] = {}

    def has(self, name: str) -> bool:
        """Return whether a field is present and not null."""
        return self.config.get(name) is not None

    def get(self, name: str, default: Any = REQUIRED) -> Any:
        """Read a field of any type, or return `default` if it is absent."""
        self._consumed.add(name)
        value = self.config.get(name)
        if value is None and default is REQUIRED:
            raise ConfigError(f"{self.family}: config.json has no {name}, and it has no default.")
        return default if value is None else value

    def get_int(self, name: str, default: Default = REQUIRED, *, least: int = 1) -> int | Default:
        """Read a whole number from `least` to its cap in `SIZE_CAPS` (2^31 - 1 for other fields); 8.0 is read as 8."""
        most = SIZE_CAPS.get(name, 2**31 - 1)
        expected = f"a whole number from {least} to {most}"
        return int_if_whole(
            self._typed(name, default, expected, lambda value: _is_int(int_if_whole(value)) and least <= value <= most)
        )

    def get_float(self, name: str, default: Default = REQUIRED, *, above: float | None = None) -> float | Default:
        """Read a finite number, larger than `above` if that is given."""
        expected = "a finite number" if above is None else f"a finite number above {above:g}"
        value = self._typed(name, default, expected, lambda x: _is_finite(x) and (above is None or x > above))
        return float(value) if _is_int(value) else value

    def get_bool(self, name: str, default: Default = REQUIRED) -> bool | Default:
        """Read a boolean."""
        return self._typed(name, default, "true or false", lambda value: isinstance(value, bool))

    def get_str(self, name: str, default: Default = REQUIRED) -> str | Default:
        """Read a string."""
        return self._typed(name, default, "a string", lambda value: isinstance(value, str))

    def get_list(self, name: str, default: Default = REQUIRED) -> list[Any] | Default:
        """Read a list."""
        return self._typed(name, default, "a list", lambda value: isinstance(value, list))

    def get_choice(self, name: str, default: Default, supported: Collection[str]) -> str | Default:
        """Read a string that must be one of the supported values.

        Raises:
            ConfigError: the value is not supported; the message lists the supported values.
        """
        value = self.get_str(name, default)
        if value not in supported:
            raise ConfigError(
                f"{self.family}: {name} is {value!r}, which is not supported; supported: {', '.join(supported)}"
            )
        return value

    def divide(self, name: str, size: int, by_name: str, by: int) -> int:
        """Divide `size` by `by`, which must leave no remainder; `name` and `by_name` are used in the error message.

        Raises:
            ConfigError: there is a remainder.
        """
        if size % by:
            raise ConfigError(f"{self.family}: {name} is {size}, which {by_name} = {by} does not divide")
        return size // by

    def require(self, name: str, *values: Any) -> None:
        """Require a field to be absent, null, or one of the values that jaxinfer supports.

        For attributes whose other values would need a computation that jaxinfer does not implement.
        """
        self._consumed.add(name)
        value = self.config.get(name)
        if value is None or any(json_equal(value, one) for one in values):
            return
        known = " or ".join(json.dumps(one) for one in values) or "null"
        raise ConfigError(
            f"{self.family}: {name}={show(value)} is not supported: this architecture is computed as with {known}. If "
            f"that is what the weights were trained for, pass hf_overrides={{{name!r}: None}}."
        )

    def restrict(self, values: Mapping[str, tuple[Any, ...]]) -> None:
        """Restrict fields to these values unless the family reads them; `finish` checks them as `require` does."""
        self._one_value.update(values)

    def part(self, name: str, **changed: Any) -> ConfigReader:
        """Return a reader for the nested configuration `name`, with the `changed` values overriding it.

        `finish` of this reader also finishes the nested one.
        """
        value = self._typed(name, REQUIRED, "an object", lambda value: isinstance(value, Mapping))
        self._parts[name] = ConfigReader({**value, **changed}, f"{self.family}, {name}")
        return self._parts[name]

    def defaults(self, **values: Any) -> None:
        """Set defaults, as transformers' config class does, for fields that are absent or null."""
        self.config = {
            **self.config,
            **{name: value for name, value in values.items() if self.config.get(name) is None},
        }

    def defaults_if_absent(self, **values: Any) -> None:
        """Set defaults for absent fields only; an explicit null is kept, as a value of its own (a cap of null means
        no cap).
        """
        self.config = {**values, **self.config}

    def rope(self, head_dim: int, **changed: Any) -> RopeConfig:
        """Read the rotary embedding from the fields of `ROPE_FIELDS`, with the `changed` values overriding them.

        The base is `default_theta`, which a family may set, if config.json states none.
        """
        self.skip(*ROPE_FIELDS)
        return RopeConfig.from_hf({**self.config, **changed}, head_dim, self.default_theta)

    def skip(self, *names: str) -> None:
        """Accept any value of fields that do not change this family's outputs."""
        self._consumed.update(names)

    def finish(self) -> None:
        """Refuse unread attributes that may change the model's outputs; log labels once.

        Null and empty values, `HARMLESS` attributes, and `ONE_VALUE` attributes with a supported value are accepted.
        False does not count as empty.

        Raises:
            ConfigError: names every such attribute of config.json and of its nested configurations.
        """
        left = {name: reader._left() for name, reader in self._parts.items()}
        left = {**self._left(), **{name: found for name, found in left.items() if found}}
        if left:
            found = ", ".join(f"{name}={show(value)}" for name, value in left.items())
            nothing = {name: dict.fromkeys(value) if name in self._parts else None for name, value in left.items()}
            raise ConfigError(
                f"{self.family}: config.json has unknown attributes, which "
                f"may change the numbers: {found}. If they are known to be harmless, pass "
                f"hf_overrides={nothing} (--hf-overrides '{json.dumps(nothing)}' on a command line)."
            )

    def _left(self) -> dict[str, Any]:
        for name, values in self._one_value.items():
            if name not in self._consumed:
                self.require(name, *values)
        known = self._consumed | HARMLESS
        left = {name: value for name, value in self.config.items() if name not in known and not _is_empty(value)}
        labels = tuple(name for name in left if is_label(name))
        if labels:
            _log_labels(self.family, labels)
        return {name: value for name, value in left.items() if name not in labels}

    def _typed(self, name: str, default: Any, expected: str, accepts: Callable[[Any], bool]) -> Any:
        value = self.get(name, default)
        if self.config.get(name) is not None and not accepts(value):
            raise ConfigError(f"{self.family}: {name}={show(value)} must be {expected}.")
        return value


def int_if_whole(value: Any) -> Any:
    """Convert a whole float (8192.0, as some tools write sizes) to an integer; return other values unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    if _is_int(value):
        return abs(value) < 2**1000
    return isinstance(value, float) and math.isfinite(value)


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list, dict)) and not value)


@cache
def _log_labels(family: str, names: tuple[str, ...]) -> None:
    logger.info(
        "%s: config.json has %s, which jaxinfer does not know; ignored as notes by their names.",
        family,
        ", ".join(names),
    )
