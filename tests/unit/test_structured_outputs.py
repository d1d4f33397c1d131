"""The structure of an output is checked when it is set."""

import json

import pytest

from jaxinfer import SamplingParams, StructuredOutputsParams
from jaxinfer.structured_outputs import MAX_CHARS, MAX_RULES, as_structured_outputs


class Model:
    """A class with a schema, as pydantic's."""

    @staticmethod
    def model_json_schema():
        return {"type": "integer"}


@pytest.mark.parametrize(
    "fields, kind, text",
    [
        ({"json": {"type": "string", "enum": ["é"]}}, "json", '{"type": "string", "enum": ["é"]}'),
        ({"json": '{"type":"null"}'}, "json", '{"type":"null"}'),
        ({"json": True}, "json", "true"),
        ({"json": Model}, "json", '{"type": "integer"}'),
        ({"json_object": True}, "json_object", '{"type": "object"}'),
        ({"regex": "a+"}, "regex", "a+"),
        ({"choice": ["a", "b"]}, "choice", '["a", "b"]'),
        ({"grammar": 'start: "a"'}, "grammar", 'start: "a"'),
    ],
)
def test_kinds(fields, kind, text):
    made = SamplingParams(structured_outputs=fields).structured_outputs
    assert made == StructuredOutputsParams(**fields) == as_structured_outputs(made)
    assert (made.kind, made.text) == (kind, text)
    assert hash(made) == hash(StructuredOutputsParams(**fields))


def deep():
    found: dict = {}
    for _ in range(100_000):
        found = {"items": found}
    return found


@pytest.mark.parametrize(
    "value, error, message",
    [
        ({}, ValueError, "must set exactly one of json, json_object, regex, choice, grammar, got none"),
        ({"json": {}, "regex": "a"}, ValueError, "exactly one of .*, got json and regex"),
        ({"json": 3}, TypeError, r"structured_outputs\['json'\] must be a JSON schema, .* got int 3"),
        ({"json": {"a": object()}}, ValueError, r"\['json'\] is not plain JSON"),
        ({"json": {"a": float("nan")}}, ValueError, r"\['json'\] is not plain JSON"),
        ({"json": deep()}, ValueError, r"\['json'\] is nested too deeply"),
        ({"regex": 3}, TypeError, r"\['regex'\] must be a string, got int 3"),
        ({"regex": " "}, ValueError, r"\['regex'\] cannot be empty"),
        ({"regex": "a" * (MAX_CHARS + 1)}, ValueError, rf"at most {MAX_CHARS} characters, got {MAX_CHARS + 1}"),
        ({"grammar": "a: b\n" * (MAX_RULES + 1)}, ValueError, f"at most {MAX_RULES} rules .*, got {MAX_RULES + 1}"),
        ({"regex": "\ud800"}, ValueError, "lone surrogate"),
        ({"choice": []}, ValueError, r"\['choice'\] cannot be empty"),
        ({"choice": "ab"}, TypeError, r"\['choice'\] must be a list of strings"),
        ({"choice": ["a", ""]}, ValueError, "cannot contain an empty string"),
        ({"choice": ["a" * 70_000, "b" * 70_000]}, ValueError, f"at most {MAX_CHARS}"),
        ({"json_object": "yes"}, TypeError, r"\['json_object'\] must be True or False"),
        ({"regex": "a", "disable_any_whitespace": True}, ValueError, "applies to JSON only, not to regex"),
        ({"jsn": {}}, TypeError, "has no field str 'jsn': the fields are json, "),
        ("json", TypeError, "structured_outputs must be a StructuredOutputsParams or a dict"),
    ],
)
def test_wrong_values_are_named(value, error, message):
    with pytest.raises(error, match=message):
        SamplingParams(structured_outputs=value)


def test_forced_ends_are_refused():
    with pytest.raises(ValueError, match="forced_eos_token_id does not apply with structured_outputs"):
        SamplingParams(structured_outputs={"regex": "a"}, forced_eos_token_id=0)


def test_a_schema_of_pydantic():
    pydantic = pytest.importorskip("pydantic")
    made = pydantic.create_model("Thing", name=(str, ...))
    assert json.loads(StructuredOutputsParams(json=made).text)["properties"]["name"]["type"] == "string"
