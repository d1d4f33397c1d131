"""Structure that an output must have: a JSON schema, a regular expression, a choice or a grammar."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxinfer._utils.checks import as_strings, describe
from jaxinfer._utils.keywords import refuse_unknown

MAX_CHARS = 128 * 1024
"""Maximum length in characters of a schema, regular expression, grammar, or all choices together: what a thread with a
stack of `grammars.STACK_BYTES` compiles, however deeply its rules refer to each other."""
MAX_CHOICES = 4096
"""Maximum number of entries of `choice`."""
MAX_RULES = 400
"""Maximum number of rules of a grammar. llguidance's time to report an error grows with the square of how deeply rules
refer to each other: 3 s at 400, a minute at 2000."""
KINDS = ("json", "json_object", "regex", "choice", "grammar")
"""Fields of `StructuredOutputsParams` of which exactly one is set."""


@refuse_unknown({})
@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """Structure of an output, with vLLM's names: exactly one of `json`, `json_object`, `regex`, `choice`, `grammar`.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: none or several structures are set, or one is too long. Both name the field.
    """

    json: str | Mapping[str, Any] | bool | type | None = None
    """JSON schema: a dict, its text, or a class with `model_json_schema` (a pydantic model). Stored as text."""
    json_object: bool = False
    """Whether the output is any JSON object."""
    regex: str | None = None
    """Regular expression that the whole output matches, in the syntax of Rust's `regex`, without anchors."""
    choice: Sequence[str] | None = None
    """Texts of which the output is one."""
    grammar: str | None = None
    """Lark grammar with a rule `start`, or a GBNF grammar with a rule `root`."""
    disable_any_whitespace: bool = False
    """Whether JSON has no whitespace outside strings."""

    def __post_init__(self) -> None:
        for name in ("json_object", "disable_any_whitespace"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{self.field(name)} must be True or False, got {describe(getattr(self, name))}.")
        if self.json is not None:
            self._set("json", _schema_text(self.json))
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{self.field(name)} must be a string, got {describe(value)}.")
            if value is not None and not value.strip():
                raise ValueError(f"{self.field(name)} cannot be empty.")
        rules = sum(":" in line for line in (self.grammar or "").splitlines())
        if rules > MAX_RULES:
            raise ValueError(
                f"{self.field('grammar')} can have at most {MAX_RULES} rules (lines with ':'), got {rules}."
            )
        if self.choice is not None:
            found = as_strings(self.field("choice"), self.choice, most=MAX_CHOICES, longest=MAX_CHARS)
            if not found:
                raise ValueError(f"{self.field('choice')} cannot be empty: give at least one text.")
            self._set("choice", found)
        self._check_together()

    def _check_together(self) -> None:
        given = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            shown = " and ".join(given) or "none"
            raise ValueError(f"structured_outputs must set exactly one of {', '.join(KINDS)}, got {shown}.")
        if self.disable_any_whitespace and self.kind not in ("json", "json_object"):
            raise ValueError(f"{self.field('disable_any_whitespace')} applies to JSON only, not to {self.kind}.")
        length = len(self.text)
        if length > MAX_CHARS:
            raise ValueError(f"{self.field(self.kind)} can have at most {MAX_CHARS} characters, got {length}.")
        try:
            self.text.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{self.field(self.kind)} contains a lone surrogate, which is not valid Unicode; remove it."
            ) from None

    @property
    def kind(self) -> str:
        """Name of the field that is set."""
        return next(name for name in KINDS if getattr(self, name) not in (None, False))

    @property
    def text(self) -> str:
        """The structure as a text: a JSON schema, expression or grammar, or a JSON list of the choices."""
        if self.json_object:
            return '{"type": "object"}'
        return json.dumps(self.choice) if self.choice is not None else getattr(self, self.kind)

    @staticmethod
    def field(name: str) -> str:
        """Return the name of a field as errors call it."""
        return f"structured_outputs[{name!r}]"

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def as_structured_outputs(value: Any) -> StructuredOutputsParams | None:
    """Convert a dict of its fields to a `StructuredOutputsParams`; None stays None.

    Raises:
        TypeError, ValueError: as `StructuredOutputsParams`, and for unknown fields.
    """
    if value is None or isinstance(value, StructuredOutputsParams):
        return value
    names = [field.name for field in dataclasses.fields(StructuredOutputsParams)]
    if not isinstance(value, Mapping):
        raise TypeError(
            "structured_outputs must be a StructuredOutputsParams or a dict with one of "
            f"{', '.join(KINDS)}, got {describe(value)}."
        )
    for name in value:
        if name not in names:
            raise TypeError(f"structured_outputs has no field {describe(name)}: the fields are {', '.join(names)}.")
    return StructuredOutputsParams(**value)


def _schema_text(value: Any) -> str:
    """Return a JSON schema as text."""
    name = StructuredOutputsParams.field("json")
    if hasattr(value, "model_json_schema"):
        value = value.model_json_schema()
    if isinstance(value, str):
        return value
    if not isinstance(value, (Mapping, bool)):
        raise TypeError(f"{name} must be a JSON schema, as a dict or a text, got {describe(value)}.")
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply, or contains itself.") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is not plain JSON: {error}.") from None
