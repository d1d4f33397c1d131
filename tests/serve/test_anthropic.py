"""The official client of Anthropic against the server: the texts that `LLM.chat` gives, whole and streamed."""

import pytest
from serve.conftest import CHAT, MODEL

from jaxinfer import SamplingParams

pytest.importorskip("uvicorn")
anthropic = pytest.importorskip("anthropic")
pytestmark = pytest.mark.xdist_group("serve")

PARAMS = SamplingParams(temperature=0, max_tokens=12)
ASKED = dict(model=MODEL, max_tokens=12, extra_body={"temperature": 0})
"""Anthropic's client has no `temperature`; the server reads it."""


@pytest.fixture
def client(url):
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as made:
        yield made


def test_a_message_is_the_answer_of_the_llm(client, llm):
    [expected] = llm.chat([{"role": "system", "content": "be kind"}, *CHAT], PARAMS)
    found = client.messages.create(**ASKED, system="be kind", messages=CHAT)
    assert [block.text for block in found.content] == [expected.outputs[0].text]
    usage = found.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == len(expected.prompt_token_ids)
    assert (usage.output_tokens, found.stop_reason) == (len(expected.outputs[0].token_ids), "max_tokens")
    parts = [{"role": "user", "content": [{"type": "text", "text": CHAT[0]["content"]}]}]
    with client.messages.stream(**ASKED, system=[{"type": "text", "text": "be kind"}], messages=parts) as stream:
        assert "".join(stream.text_stream) == expected.outputs[0].text
        last = stream.get_final_message()
    assert (last.content[0].text, last.stop_reason) == (expected.outputs[0].text, "max_tokens")
    assert last.usage.output_tokens == usage.output_tokens
    counted = client.messages.count_tokens(model=MODEL, system="be kind", messages=CHAT)
    assert counted.input_tokens == len(expected.prompt_token_ids)


def test_a_prefilled_answer_is_continued_and_stops_at_a_sequence(client, llm):
    chat = [*CHAT, {"role": "assistant", "content": "the"}]
    [whole] = llm.chat(chat, PARAMS, add_generation_prompt=False, continue_final_message=True)
    stop = whole.outputs[0].text[3:6]
    found = client.messages.create(**ASKED, messages=chat, stop_sequences=[stop])
    assert found.content[0].text == whole.outputs[0].text.split(stop)[0]
    assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", stop)


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://x"}}


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"model": "other"}, anthropic.NotFoundError, "does not exist"),
        ({"messages": []}, anthropic.BadRequestError, "cannot be empty"),
        ({"messages": [{"role": "user", "content": 3}]}, anthropic.BadRequestError, "messages.0..content must be"),
        ({"messages": [{"role": "user", "content": []}]}, anthropic.BadRequestError, "at least one content block"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, anthropic.BadRequestError, "text of a block"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, anthropic.BadRequestError, "fetches no URLs"),
        ({"tool_choice": {"type": "any"}}, anthropic.BadRequestError, "has no tools"),
        ({"tools": [{"name": "f", "type": "web_search"}]}, anthropic.BadRequestError, "no input_schema"),
        ({"output_config": {"format": {"type": "xml"}}}, anthropic.BadRequestError, "output_config.format"),
        ({"extra_body": {"unknown": 1}}, anthropic.BadRequestError, "Unrecognized"),
        ({"max_tokens": 0}, anthropic.BadRequestError, "max_tokens must be at least 1"),
    ],
)
def test_errors_have_anthropics_form(client, change, kind, message):
    with pytest.raises(kind, match=message) as raised:
        client.messages.create(**ASKED | {"messages": CHAT} | change)
    assert set(raised.value.body) == {"type", "error"} and set(raised.value.body["error"]) == {"type", "message"}
