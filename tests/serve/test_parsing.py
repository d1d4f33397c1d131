"""Answers with reasoning and tool calls, parsed with a response template; turns of Anthropic's form."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("starlette")
from jaxinfer.serve.anthropic_input import conversation, tools
from jaxinfer.serve.parsing import AnswerParser, message_of

TEMPLATE = {
    "start_anchor": "<|assistant|>",
    "defaults": {"role": "assistant"},
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "content": "json",
            "repeats": True,
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<|end|>"},
    },
}
ANSWER = '<think>two</think>Hello<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


def parsed(text: str, size: int, template=TEMPLATE) -> tuple[dict, AnswerParser]:
    parser = AnswerParser(SimpleNamespace(response_template=template), "<|assistant|>", None)
    deltas = [delta for at in range(0, len(text), size) for delta in parser.push(text[at : at + size])]
    return message_of(deltas + parser.push("", last=True)), parser


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_reasoning_content_and_calls(size):
    message, parser = parsed(ANSWER, size)
    assert (message["reasoning_content"], message["content"], parser.calls) == ("two", "Hello", 1)
    [call] = message["tool_calls"]
    assert call["function"]["name"] == "add" and json.loads(call["function"]["arguments"]) == {"a": 1}


@pytest.mark.parametrize("size", [1, 1000])
def test_what_cannot_be_parsed_is_content(size):
    assert "{not json}" in parsed("Hello<tool_call>{not json}</tool_call>", size)[0]["content"]


def test_without_a_template_all_is_content():
    assert parsed(ANSWER, 5, None)[0]["content"] == ANSWER


def test_turns_of_anthropics_form():
    use = {"type": "tool_use", "id": "1", "name": "add", "input": {"a": 1}}
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
    found = conversation(
        [{"type": "text", "text": "be kind"}],
        [
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, use]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "2"}, image]},
        ],
    )
    assert [message["role"] for message in found] == ["system", "assistant", "tool", "user"]
    assert found[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert found[1]["reasoning_content"] == "hm" and found[2]["content"] == "2"
    assert found[3]["content"] == [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
    [tool] = tools([{"name": "add", "description": "d", "input_schema": {"type": "object"}}])
    assert tool["function"] == {"name": "add", "description": "d", "parameters": {"type": "object"}}
