"""LoRA adapters are served as models of their own."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from support import checkpoint

from jaxinfer import LLM, SamplingParams
from jaxinfer.serve.cli import _adapters

pytestmark = pytest.mark.xdist_group("serve")

CHAT = [{"role": "user", "content": "hello cat"}]
ASKED = {"temperature": 0, "max_tokens": 8}


@pytest.fixture
def poet(llm: LLM) -> Iterator[str]:
    rng, tensors = np.random.default_rng(0), {}
    width = checkpoint.CONFIG["hidden_size"]
    for layer in range(checkpoint.CONFIG["num_hidden_layers"]):
        where = f"base_model.model.model.layers.{layer}.mlp.down_proj.lora_"
        tensors[f"{where}A.weight"] = rng.standard_normal((2, checkpoint.CONFIG["intermediate_size"]))
        tensors[f"{where}B.weight"] = rng.standard_normal((width, 2)) * 4
    llm.add_adapter("poet", tensors, config={"r": 2, "lora_alpha": 2})
    yield "poet"
    llm.remove_adapter("poet")


def test_an_adapter_answers_under_its_own_name(llm: LLM, client: Any, poet: str):
    params = SamplingParams(**ASKED)
    own, plain = (
        llm.generate("hello", params, adapter=name, use_tqdm=False)[0].outputs[0].text for name in (poet, None)
    )
    assert own != plain
    assert [model.id for model in client.models.list()] == ["tiny", poet]
    assert client.models.retrieve(poet).parent == "tiny"
    for name, text in ((poet, own), ("tiny", plain)):
        made = client.completions.create(model=name, prompt="hello", **ASKED)
        assert (made.model, made.choices[0].text) == (name, text)
    chat = llm.chat(CHAT, params, adapter=poet, use_tqdm=False)[0].outputs[0].text
    assert chat != llm.chat(CHAT, params, use_tqdm=False)[0].outputs[0].text
    chunks = list(client.chat.completions.create(model=poet, messages=CHAT, stream=True, **ASKED))
    assert {chunk.model for chunk in chunks} == {poet}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == chat
    answer = client.responses.create(model=poet, input="hello cat", temperature=0, max_output_tokens=8)
    assert answer.model == poet
    vectors = [client.embeddings.create(model=name, input="hello").data[0].embedding for name in (poet, "tiny")]
    assert vectors[0] != vectors[1]


def test_a_name_that_is_no_model_lists_those_there_are(client: Any, poet: str):
    with pytest.raises(openai.NotFoundError, match="this server has `tiny`, `poet`"):
        client.completions.create(model="prose", prompt="hello")


def test_an_adapter_in_use_is_not_removed(llm: LLM, poet: str):
    stream = llm.stream("hello", SamplingParams(max_tokens=40, ignore_eos=True), adapter=poet)
    next(stream)
    with pytest.raises(RuntimeError, match=r"remove_adapter\('poet'\) while 1 request"):
        llm.remove_adapter(poet)
    stream.close()


def test_options_of_the_command_line():
    assert _adapters(["a=b", "c=d=e"], "tiny") == {"a": "b", "c": "d=e"} and _adapters([], "tiny") is None
    for given in (["a"], ["=b"], ["a="], ["a=b", "a=c"], ["tiny=b"]):
        with pytest.raises(ValueError, match="--adapter"):
            _adapters(given, "tiny")
