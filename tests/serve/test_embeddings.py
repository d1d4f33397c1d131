"""`/v1/embeddings` with OpenAI's client, which asks for base64 by itself."""

import base64

import numpy as np
import pytest

pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
pytestmark = pytest.mark.xdist_group("serve")

TEXTS = ["hello world", "the cat sat on the mat", "hello"]


def test_embeddings_are_those_of_the_llm(client, llm, url):
    expected = [one.embedding for one in llm.embed(TEXTS, use_tqdm=False)]
    found = client.embeddings.create(model="tiny", input=TEXTS)
    assert [one.index for one in found.data] == [0, 1, 2] and found.object == "list" and found.model == "tiny"
    for one, vector in zip(found.data, expected, strict=True):
        np.testing.assert_allclose(one.embedding, vector, atol=1e-6)
    assert (
        found.usage.prompt_tokens
        == found.usage.total_tokens
        == sum(len(llm.get_tokenizer()(t).input_ids) for t in TEXTS)
    )
    floats = client.embeddings.create(model="tiny", input=TEXTS[0], encoding_format="float")
    np.testing.assert_allclose(floats.data[0].embedding, expected[0], atol=1e-6)
    body = {"model": "tiny", "input": TEXTS[0], "encoding_format": "base64"}
    raw = httpx.post(f"{url}/v1/embeddings", json=body).json()["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(raw), "<f4"), expected[0], atol=1e-6)


def test_pooling_and_token_ids(client, llm):
    ids = [[5, 6, 7, 8], [9]]
    expected = llm.embed(ids, pooling="mean", normalize=False, use_tqdm=False)
    found = client.embeddings.create(model="tiny", input=ids, extra_body={"pooling": "mean", "normalize": False})
    for one, vector in zip(found.data, expected, strict=True):
        np.testing.assert_allclose(one.embedding, vector.embedding, rtol=1e-5, atol=1e-6)
    assert abs(np.linalg.norm(expected[0].embedding) - 1) > 0.01


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": ""}, "cannot be empty"),
        ({"input": ["hello", ""]}, "cannot be empty"),
        ({"input": "hello", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "hello", "dimensions": 4}, "dimensions"),
        ({"input": "hello", "pooling": "max"}, "pooling"),
        ({"input": [[5] * 200]}, "maximum model length of 128"),
        ({"input": [[5, 100000]]}, "out of vocabulary"),
        ({"input": [[5]] * 3000}, "at most 2048"),
    ],
)
def test_bad_input_is_named(url, fields, said):
    found = httpx.post(f"{url}/v1/embeddings", json={"model": "tiny"} | fields)
    assert found.status_code == 400 and said in found.json()["error"]["message"], found.text


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.embeddings.create(model="text-embedding-3-small", input="hello")
