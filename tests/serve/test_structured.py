"""Structured output through the official clients: formats, tools that must be called, errors that name the field."""

import json
import re
from typing import Literal

import pytest
from serve.conftest import CHAT, MODEL

pytest.importorskip("uvicorn")
pytest.importorskip("llguidance")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")
pytestmark = pytest.mark.xdist_group("serve")


class Item(pydantic.BaseModel, extra="forbid"):
    colour: Literal["red", "blue"]
    count: int = pydantic.Field(ge=0, le=9)


class Order(pydantic.BaseModel, extra="forbid"):
    item: Item


SCHEMA = Order.model_json_schema()
DRAWN = dict(temperature=0.9, seed=5)
FORMAT = {"type": "json_schema", "json_schema": {"name": "order", "schema": SCHEMA, "strict": True}}
REFERS = {
    "type": "object",
    "properties": {"x": {"$ref": "#/$defs/digit"}},
    "required": ["x"],
    "additionalProperties": False,
    "$defs": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
}
TOOLS = [
    {"type": "function", "function": {"name": "buy", "parameters": REFERS}},
    {"type": "function", "function": {"name": "wait"}},
]


def test_a_chat_is_parsed_by_pydantic(client):
    found = client.chat.completions.parse(model=MODEL, messages=CHAT, response_format=Order, **DRAWN)
    assert isinstance(found.choices[0].message.parsed, Order) and found.choices[0].finish_reason == "stop"
    asked = dict(model=MODEL, messages=CHAT, response_format=FORMAT, n=2, **DRAWN)
    whole = client.chat.completions.create(**asked)
    texts = ["", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert all(Order.model_validate_json(text) for text in texts)


def test_an_object_of_any_form(client):
    asked = dict(model=MODEL, messages=CHAT, response_format={"type": "json_object"}, max_tokens=40, **DRAWN)
    [choice] = client.chat.completions.create(**asked).choices
    assert choice.message.content.startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


def test_completions_take_every_structure(client):
    asked = dict(model=MODEL, prompt=["hello", "the cat"], max_tokens=110, **DRAWN)
    found = client.completions.create(**asked, extra_body={"response_format": FORMAT})
    assert all(Order.model_validate_json(choice.text) for choice in found.choices)
    found = client.completions.create(**asked, extra_body={"structured_outputs": {"regex": "[ab]{3}"}})
    assert all(re.fullmatch("[ab]{3}", choice.text) for choice in found.choices)


def test_responses_have_a_format(client):
    found = client.responses.parse(model=MODEL, input="hello cat", text_format=Order, temperature=0.9)
    assert isinstance(found.output_parsed, Order) and found.status == "completed"
    assert found.text.format.type == "json_schema"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_must_be_called(client, streamed):
    named = {"type": "function", "function": {"name": "buy"}}
    for choice, names in ((named, {"buy"}), ("required", {"buy", "wait"})):
        asked = dict(model=MODEL, messages=CHAT, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, **DRAWN)
        asked["tools"] = TOOLS[:1] if choice == "required" else TOOLS
        if streamed:
            deltas = [c for chunk in client.chat.completions.create(**asked, stream=True) for c in chunk.choices]
            [call] = [call for one in deltas for call in one.delta.tool_calls or ()]
            reason = deltas[-1].finish_reason
        else:
            [one] = client.chat.completions.create(**asked).choices
            [call], reason = one.message.tool_calls, one.finish_reason
            assert one.message.content is None
        assert call.function.name in names and reason == "tool_calls"
        assert 0 <= json.loads(call.function.arguments)["x"] <= 9


def test_a_tool_must_be_called_in_a_response(client):
    tools = [{"type": "function", "name": "buy", "parameters": REFERS}]
    choice = {"type": "function", "name": "buy"}
    [item] = client.responses.create(model=MODEL, input="hello", tools=tools, tool_choice=choice).output
    assert item.type == "function_call" and item.name == "buy" and "x" in json.loads(item.arguments)


@pytest.mark.parametrize(
    "choice", [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "buy"}]
)
def test_a_tool_must_be_used_by_anthropics_client(url, choice):
    anthropic = pytest.importorskip("anthropic")
    tools = [{"name": "buy", "input_schema": REFERS}]
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        found = client.messages.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=110,
            tools=tools,
            tool_choice=choice,
        )
    [block] = found.content
    assert block.type == "tool_use" and block.name == "buy" and 0 <= block.input["x"] <= 9
    assert found.stop_reason == "tool_use"


def test_a_call_that_is_cut_short_is_content(client):
    asked = dict(model=MODEL, messages=CHAT, tools=TOOLS[:1], tool_choice="required", max_tokens=3, **DRAWN)
    [choice] = client.chat.completions.create(**asked).choices
    assert choice.finish_reason == "length" and choice.message.content and not choice.message.tool_calls


@pytest.mark.parametrize(
    "path, fields, param, message",
    [
        ("chat/completions", {"response_format": "json"}, "response_format", "must be an object with a type"),
        ("chat/completions", {"response_format": {"type": "xml"}}, "response_format", "str 'xml' is not supported"),
        (
            "chat/completions",
            {"response_format": {"type": "json_schema"}},
            "response_format",
            "response_format.json_schema.schema must be a JSON schema, got None",
        ),
        (
            "chat/completions",
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "foo"}}}},
            "response_format",
            "^response_format cannot be used: Invalid type: foo",
        ),
        (
            "chat/completions",
            {"response_format": FORMAT, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
            "exclude each other",
        ),
        ("chat/completions", {"structured_outputs": {"regex": "("}}, "structured_outputs", "unclosed group"),
        ("chat/completions", {"structured_outputs": {"regexp": "a"}}, "structured_outputs", "has no field"),
        ("chat/completions", {"tool_choice": "required"}, "tool_choice", "has no tools"),
        (
            "chat/completions",
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "sell"}}},
            "tool_choice",
            "names 'sell', which is not among the tools",
        ),
        ("chat/completions", {"tools": TOOLS, "tool_choice": "always"}, "tool_choice", "must be"),
        (
            "chat/completions",
            {"tools": [{"function": {"name": "f", "parameters": {"type": "foo"}}}], "tool_choice": "required"},
            "tools",
            "^tools cannot be used: Invalid type: foo",
        ),
        (
            "responses",
            {"text": {"format": {"type": "json_schema", "schema": {"type": "foo"}}}},
            "text",
            "^text.format cannot be used: Invalid type",
        ),
        ("responses", {"text": {"format": {"type": "grammar"}}}, "text", "not supported"),
    ],
)
def test_errors_name_the_field(url, path, fields, param, message):
    own = {"input": "hello"} if path == "responses" else {"messages": CHAT}
    found = httpx.post(f"{url}/v1/{path}", json={"model": MODEL} | own | fields)
    error = found.json()["error"]
    assert (found.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param), error
    assert re.search(message, error["message"]), error["message"]
