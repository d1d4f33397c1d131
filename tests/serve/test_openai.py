"""The official client of OpenAI against the server: the same tokens and texts as `LLM` gives, whole and streamed."""

import pytest
from serve.conftest import CHAT, MODEL

from jaxinfer import SamplingParams

pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")
pytest.importorskip("openai")
pytestmark = pytest.mark.xdist_group("serve")

DRAWN = dict(temperature=0.8, seed=3, n=2)


def test_a_chat_is_that_of_the_llm(client, llm):
    [expected] = llm.chat(CHAT, SamplingParams(**DRAWN, max_tokens=12, logprobs=2))
    found = client.chat.completions.create(
        model=MODEL, messages=CHAT, max_completion_tokens=12, logprobs=True, top_logprobs=2, **DRAWN
    )
    assert [choice.message.content for choice in found.choices] == [output.text for output in expected.outputs]
    assert [choice.finish_reason for choice in found.choices] == [output.finish_reason for output in expected.outputs]
    tokens = found.choices[1].logprobs.content
    chosen = [table[token] for token, table in zip(expected.outputs[1].token_ids, expected.outputs[1].logprobs)]
    assert [(token.token, token.logprob) for token in tokens] == [(one.decoded_token, one.logprob) for one in chosen]
    assert all(len(token.top_logprobs) == 2 for token in tokens)
    assert found.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert found.usage.completion_tokens == sum(len(output.token_ids) for output in expected.outputs)


def test_a_streamed_chat_adds_up(client, llm):
    [expected] = llm.chat(CHAT, SamplingParams(**DRAWN, max_tokens=12))
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=CHAT, max_tokens=12, stream=True, stream_options={"include_usage": True}, **DRAWN
        )
    )
    usage = chunks.pop().usage
    assert usage.completion_tokens == sum(len(output.token_ids) for output in expected.outputs)
    for index in range(2):
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert choices[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in choices) == expected.outputs[index].text
        assert [choice.finish_reason for choice in choices if choice.finish_reason] == [
            expected.outputs[index].finish_reason
        ]


@pytest.mark.parametrize("prompt", ["hello world", [10, 11, 12], ["hello", "the cat sat"], [[10, 11], [12]]])
def test_completions_are_those_of_the_llm(client, llm, prompt):
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=1)
    expected = [output for result in llm.generate(prompt, params) for output in result.outputs]
    asked = dict(model=MODEL, prompt=prompt, temperature=0, max_tokens=8, logprobs=1)
    found = client.completions.create(**asked)
    texts = [""] * len(expected)
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert [choice.text for choice in found.choices] == texts == [output.text for output in expected]
    for choice, output in zip(found.choices, expected, strict=True):
        numbers = [table[token].logprob for token, table in zip(output.token_ids, output.logprobs)]
        assert choice.logprobs.token_logprobs == numbers


def test_stop_strings_and_fields_that_are_not_openais(client, llm):
    [whole] = llm.generate("hello", SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    stop = whole.outputs[0].text[4:7]
    found = client.completions.create(
        model=MODEL, prompt="hello", temperature=0, max_tokens=20, stop=stop, extra_body={"ignore_eos": True}
    )
    assert found.choices[0].text == whole.outputs[0].text.split(stop)[0]
    assert found.choices[0].finish_reason == "stop" and found.choices[0].stop_reason == stop


def test_models_and_tokens(client, llm):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).max_model_len == 128
    base = str(client.base_url).removesuffix("/v1/")
    tokens = httpx.post(f"{base}/tokenize", json={"prompt": "hello world"}).json()
    assert tokens["tokens"] == llm.get_tokenizer().encode("hello world") and tokens["count"] == len(tokens["tokens"])
    text = httpx.post(f"{base}/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert text == {"prompt": "hello world"}
    rendered = httpx.post(f"{base}/tokenize", json={"messages": CHAT}).json()["tokens"]
    assert rendered == llm.chat(CHAT, SamplingParams(max_tokens=1))[0].prompt_token_ids
    assert httpx.get(f"{base}/health").status_code == 200


def test_metrics_have_the_names_of_vllm(client):
    import httpx
    from prometheus_client.parser import text_string_to_metric_families

    client.completions.create(model=MODEL, prompt="hello", max_tokens=2)
    base = str(client.base_url).removesuffix("/v1/")
    families = {one.name: one for one in text_string_to_metric_families(httpx.get(f"{base}/metrics").text)}
    assert families["jaxinfer:num_requests_running"].samples[0].value == 0
    assert families["jaxinfer:generation_tokens"].type == "counter"
    [reason, *_] = families["jaxinfer:request_success"].samples
    assert reason.labels == {"model_name": MODEL, "finished_reason": reason.labels["finished_reason"]}
    seconds = families["jaxinfer:time_to_first_token_seconds"]
    counts = [one.value for one in seconds.samples if one.name.endswith("_bucket")]
    assert seconds.type == "histogram" and counts == sorted(counts) and counts[-1] > 0
