"""OpenAI's responses: the texts that `LLM.chat` gives, whole and streamed; items of tools and reasoning."""

import pytest
from serve.conftest import CHAT, MODEL

from jaxinfer import SamplingParams

pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
from jaxinfer.serve.body import Fields
from jaxinfer.serve.response_items import Items
from jaxinfer.serve.responses import conversation

pytestmark = pytest.mark.xdist_group("serve")


def test_a_response_is_the_answer_of_the_llm(client, llm):
    [expected] = llm.chat(
        [{"role": "system", "content": "be kind"}, *CHAT], SamplingParams(temperature=0, max_tokens=9)
    )
    asked = dict(model=MODEL, instructions="be kind", temperature=0, max_output_tokens=9)
    found = client.responses.create(**asked, input=CHAT[0]["content"])
    assert found.output_text == expected.outputs[0].text
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert found.usage.input_tokens == len(expected.prompt_token_ids)
    with client.responses.stream(**asked, input=CHAT) as stream:
        events = list(stream)
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == expected.outputs[0].text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output_text == found.output_text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id is not supported"),
        ({"input": 3}, "input must be a string or a list"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "this server takes message"),
        ({"tools": [{"type": "web_search"}]}, r"tools.0. must be"),
        ({"max_output_tokens": 0}, "max_output_tokens must be at least 1"),
    ],
)
def test_what_is_refused(client, change, message):
    with pytest.raises(openai.BadRequestError, match=message):
        client.responses.create(**{"model": MODEL, "input": "hello"} | change)


def test_items_of_a_conversation():
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "1 + 1?"}]},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "1", "name": "add", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "2"},
    ]
    found = conversation(Fields({"instructions": "be kind", "input": items}))
    assert [message["role"] for message in found] == ["system", "user", "assistant", "assistant", "tool"]
    assert found[3]["tool_calls"][0]["function"] == {"name": "add", "arguments": "{}"}


def test_events_of_reasoning_text_and_calls():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    items = Items()
    events = [
        event["type"].removeprefix("response.")
        for delta in ({"reasoning_content": "hm"}, {"content": "a"}, {"content": "b"}, {"tool_calls": [call]})
        for event in items.add(delta)
    ]
    part = ["output_item.added", "content_part.added"], ["content_part.done", "output_item.done"]
    assert events == [
        *(*part[0], "reasoning_text.delta", "reasoning_text.done", *part[1]),
        *(*part[0], "output_text.delta", "output_text.delta", "output_text.done", *part[1]),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"),
    ]
    assert [item["type"] for item in items.done] == ["reasoning", "message", "function_call"] and items.close() == []
