"""Structured output of real models: every finished output is valid by another library, 64 rows at a time."""

import json
import re

import pytest

from jaxinfer import SamplingParams

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")
pytestmark = pytest.mark.slow

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "role": {"enum": ["admin", "editor", "reader"]},
    },
    "required": ["name", "age", "role"],
    "additionalProperties": False,
}


def an_object(**properties):
    """Schema of an object with exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def text(most):
    return {"type": "string", "maxLength": most}


SCHEMAS = [
    PERSON,
    an_object(people={"type": "array", "items": PERSON, "minItems": 1, "maxItems": 2}),
    an_object(day={"type": "string", "format": "date"}, at={"type": "string", "format": "date-time"}),
    an_object(id={"type": "string", "format": "uuid"}, host={"type": "string", "format": "ipv4"}),
    an_object(value={"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "null"}, text(8)]}),
    an_object(city={"enum": ["Zürich", "北京", "São Paulo", "Москва", "🗼"]}, note=text(16)),
    {"$defs": {"person": PERSON}} | an_object(owner={"$ref": "#/$defs/person"}, guest={"$ref": "#/$defs/person"}),
    {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "v": {"type": "boolean"},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["v", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    an_object(
        matrix={"type": "array", "items": {"type": "array", "items": {"enum": [0, 1]}, "maxItems": 3}, "maxItems": 3}
    ),
    an_object(
        code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
        price={"type": "number", "minimum": 0, "maximum": 100},
    ),
    {
        "oneOf": [
            an_object(kind={"const": "circle"}, radius={"type": "integer", "minimum": 1, "maximum": 9}),
            an_object(kind={"const": "square"}, side={"type": "integer", "minimum": 1, "maximum": 9}),
        ]
    },
    {
        "type": "object",
        "properties": {"a": text(6), "b": {"type": "boolean"}},
        "additionalProperties": {"enum": [1, 2]},
        "maxProperties": 4,
        "required": ["a", "b"],
    },
]
REGEXES = [r"\+[0-9]{2} [0-9]{3} [0-9]{4}", r"(yes|no), because [a-z ]{5,30}\.", r"[一-鿿]{2,6}", "[α-ω]{3,12}"]
LARK = """
start: sum
sum: product ("+" product)~0..2
product: NUMBER ("*" NUMBER)~0..2
NUMBER: /[1-9][0-9]{0,2}/
"""
CHECK = jsonschema.FormatChecker()


def check(kind, structure, made):
    if kind == "json":
        jsonschema.validate(json.loads(made), structure, format_checker=CHECK)
    elif kind == "regex":
        assert re.fullmatch(structure, made), made
    elif kind == "choice":
        assert made in structure, made
    else:
        assert re.fullmatch(
            r"[1-9][0-9]{0,2}(\*[1-9][0-9]{0,2}){0,2}(\+[1-9][0-9]{0,2}(\*[1-9][0-9]{0,2}){0,2}){0,2}", made
        )


def test_every_finished_output_is_valid(model):
    """All structures in one batch, greedy and sampled, beside free rows."""
    structures = [("json", one) for one in SCHEMAS] + [("regex", one) for one in REGEXES]
    structures += [("choice", ["Zürich", "Zürichsee", "北京"]), ("grammar", LARK)]
    prompts, params, asked = [], [], []
    for kind, structure in structures:
        question = f"Answer in this form: {json.dumps(structure, ensure_ascii=False)}\nAnswer: "
        for fields in (dict(temperature=0), dict(temperature=1, seed=3, n=1 + (kind != "json"))):
            prompts.append(question)
            params.append(SamplingParams(**fields, max_tokens=300, structured_outputs={kind: structure}))
            asked.append((kind, structure))
    results = model.llm().generate(prompts, params, use_tqdm=False)
    counts = {"stop": 0, "length": 0}
    for (kind, structure), result in zip(asked, results, strict=True):
        for output in result.outputs:
            counts[output.finish_reason] += 1
            if output.finish_reason == "stop":
                check(kind, structure, output.text)
    assert counts["stop"] >= 0.9 * sum(counts.values()), counts
