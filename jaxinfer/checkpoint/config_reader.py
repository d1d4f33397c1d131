"""Read typed attributes of config.json, and refuse those that were not read: they may change the model's outputs."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any, TypeVar

from jaxinfer.checkpoint.attributes import HARMLESS, ONE_VALUE, is_label, json_equal
from jaxinfer.checkpoint.plain_json import show
from jaxinfer.checkpoint.size_limits import SIZE_CAPS, int_if_whole, is_int
from jaxinfer.errors import ConfigError
from jaxinfer.layers.rope_config import ROPE_FIELDS, RopeConfig

logger = logging.getLogger(__name__)

REQUIRED: Any = object()
"""Marks a field without a default: a missing value raises ConfigError."""

Default = TypeVar("Default")


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
            self._typed(name, default, expected, lambda value: is_int(int_if_whole(value)) and least <= value <= most)
        )

    def get_float(self, name: str, default: Default = REQUIRED, *, above: float | None = None) -> float | Default:
        """Read a finite number, larger than `above` if that is given."""
        expected = "a finite number" if above is None else f"a finite number above {above:g}"
        value = self._typed(name, default, expected, lambda x: _is_finite(x) and (above is None or x > above))
        return float(value) if is_int(value) else value

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
            f"{self.family}: {name}={show(value)} is not supported: this architecture is implemented for {known} "
            f"only. If the weights were trained for that, pass hf_overrides={{{name!r}: None}}."
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

    def replace(self, **values: Any) -> None:
        """Read these values in place of those of config.json, which the family has read."""
        self.config = {**self.config, **values}

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


def _is_finite(value: Any) -> bool:
    if is_int(value):
        return abs(value) < 2**1000
    return isinstance(value, float) and math.isfinite(value)


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list, dict)) and not value)


@cache
def _log_labels(family: str, names: tuple[str, ...]) -> None:
    logger.info(
        "%s: config.json has %s, which are ignored: their names mark them as metadata of a tool.",
        family,
        ", ".join(names),
    )
