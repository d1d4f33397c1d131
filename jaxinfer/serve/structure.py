"""Read the structure that a request requires of its answer: a response format, or a tool that must be called."""

import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxinfer._utils.checks import describe
from jaxinfer.serve.body import Fields
from jaxinfer.serve.errors import APIError, wrong_type
from jaxinfer.serve.parsing import CALLS
from jaxinfer.structured_outputs import StructuredOutputsParams, as_structured_outputs

FIELD = "structured_outputs"
"""Field with the name of `SamplingParams`, which is not OpenAI's."""


@dataclass(frozen=True)
class Structure:
    """Structure of an answer, and the field of the request that asks for it."""

    params: StructuredOutputsParams
    field: str
    call: str | None = None
    """Name of the tool whose arguments the answer is; None if it is something else."""
    calls: bool = False
    """Whether the answer is a list of tool calls."""


@contextmanager
def named(field: str) -> Iterator[None]:
    """Make errors about `structured_outputs` name the field that the client has set."""
    try:
        yield
    except (TypeError, ValueError) as error:
        message = str(error)
        if not message.startswith(FIELD) or field == FIELD:
            raise
        raise APIError(re.sub(r"^structured_outputs(\['\w+'\])?", field, message), param=field.split(".")[0]) from None


def of_format(value: Any, field: str, inner: str | None = "json_schema") -> Structure | None:
    """Return the structure of a response format; None for text.

    Args:
        value: format, an object with a type.
        field: its field, for errors.
        inner: field of the format with name and schema; None if they are fields of the format itself.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        raise wrong_type(field, "an object with a type", value)
    kind = value.get("type")
    if kind == "text":
        return None
    with named(field):
        if kind == "json_object":
            return Structure(StructuredOutputsParams(json_object=True), field)
        if kind == "json_schema":
            own = value if inner is None else value.get(inner)
            schema = own.get("schema") if isinstance(own, dict) else None
            if not isinstance(schema, dict | bool):
                where = f"{field}.schema" if inner is None else f"{field}.{inner}.schema"
                raise APIError(f"{where} must be a JSON schema, got {describe(schema)}.", param=field.split(".")[0])
            return Structure(StructuredOutputsParams(json=schema), field)
    raise APIError(
        f"{field} of type {describe(kind)} is not supported by this server: use text, json_object or json_schema.",
        param=field.split(".")[0],
        code="unsupported_parameter",
    )


def of_fields(fields: Fields) -> Structure | None:
    """Return the structure of a completion: that of `response_format` or of `structured_outputs`."""
    found, own = of_format(fields.raw("response_format"), "response_format"), fields.raw(FIELD)
    if own is None:
        return found
    if found is not None:
        raise APIError("response_format and structured_outputs exclude each other: set one of them.", param=FIELD)
    params = as_structured_outputs(own)
    return None if params is None else Structure(params, FIELD)


def of_choice(choice: Any, tools: Sequence[Any] | None, *, parallel: bool = True) -> Structure | None:
    """Return the structure of an answer that must call tools; None if it need not.

    Args:
        choice: "none", "auto", "required" or {"function": {"name": ...}}; None is "auto".
        tools: tools of the request in OpenAI's form.
        parallel: whether the answer may call several tools.
    """
    if choice in (None, "none", "auto"):
        return None
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if choice != "required" and not isinstance(name, str):
        expected = '"none", "auto", "required" or an object with the name of a function'
        raise wrong_type("tool_choice", expected, choice)
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools or ()}
    if not schemas:
        raise APIError("tool_choice asks for a call, and the request has no tools.", param="tool_choice")
    if name is not None and name not in schemas:
        raise APIError(f"tool_choice names {name[:100]!r}, which is not among the tools.", param="tool_choice")
    with named("tools"):
        if name is not None:
            return Structure(StructuredOutputsParams(json=schemas[name] or {"type": "object"}), "tools", call=name)
        return Structure(StructuredOutputsParams(json=_calls_schema(schemas, parallel)), "tools", calls=True)


def _calls_schema(schemas: Mapping[str, Any], parallel: bool) -> dict[str, Any]:
    """Return the JSON schema of a list of tool calls.

    Each tool's schema becomes a definition, as references within it start at its own root.
    """
    definitions, calls = {}, []
    for index, (name, schema) in enumerate(schemas.items()):
        place = f"#/$defs/{index}"
        definitions[str(index)] = _moved(schema or {"type": "object"}, place)
        properties = {"name": {"const": name}, "arguments": {"$ref": place}}
        required = list(properties)
        calls.append({"type": "object", "properties": properties, "required": required, "additionalProperties": False})
    found = {"type": "array", "minItems": 1, "items": {"anyOf": calls}, "$defs": definitions}
    return found if parallel else found | {"maxItems": 1}


def _moved(schema: Any, place: str, depth: int = 0) -> Any:
    """Return a schema whose references start at `place`."""
    if depth > 100:
        raise ValueError(f"{FIELD}: a tool's parameters are nested too deeply.")
    if isinstance(schema, list):
        return [_moved(one, place, depth + 1) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: place + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, place, depth + 1)
        for key, value in schema.items()
    }


class CallParser:
    """Parser of an answer that is tool calls by its structure; the interface is that of `AnswerParser`.

    A call is complete at the end of the answer. If the answer is cut short, its text is content.
    """

    def __init__(self, structure: Structure):
        self._structure, self._text = structure, ""
        self.calls = 0
        """Number of tool calls so far."""

    def push(self, text: str, *, last: bool = False) -> list[dict[str, Any]]:
        """Return the deltas of new text; `last`: whether the answer is complete."""
        self._text += text
        if not last or not self._text:
            return []
        try:
            found = json.loads(self._text)
        except ValueError:
            return [{"content": self._text}]
        if self._structure.call is not None:
            found = [{"name": self._structure.call, "arguments": self._text.strip()}]
        self.calls = len(found)
        return [{CALLS: [_call(index, **call) for index, call in enumerate(found)]}]


def _call(index: int, name: str, arguments: Any) -> dict[str, Any]:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    function = {"name": name, "arguments": text}
    return {"index": index, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
