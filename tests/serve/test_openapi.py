"""The OpenAPI document says what the endpoints read and refuse, field by field."""

import pytest
from serve.conftest import CHAT, MODEL

pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")
jsonschema = pytest.importorskip("jsonschema")
pytestmark = pytest.mark.xdist_group("serve")

ASKED = {
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/chat/completions": {"messages": CHAT, "max_tokens": 1},
    "/v1/responses": {"input": "hello", "max_output_tokens": 1},
    "/v1/embeddings": {"input": "hello"},
    "/v1/messages": {"messages": CHAT, "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": CHAT},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1, 2]},
}
"""A request to each endpoint with a JSON body."""


@pytest.fixture(scope="module")
def document(url):
    return httpx.get(f"{url}/openapi.json").json()


def post(address: str, body: dict):
    return httpx.post(address, json=body, timeout=60)


def schema(document, path):
    return document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]


def test_every_route_is_described(document):
    from jaxinfer.serve.app import ROUTES

    described = {(method.upper(), path) for path, one in document["paths"].items() for method in one}
    assert described == {(method, path.replace(":path", "")) for method, path, _ in ROUTES}


@pytest.mark.parametrize("path", ASKED)
def test_a_field_is_in_the_document_exactly_if_it_is_known(url, document, path):
    stated = schema(document, path)
    jsonschema.Draft202012Validator.check_schema(stated)
    for name in stated["properties"]:  # null is a missing field, unless the field is required
        found = post(url + path, {name: None} | ASKED[path])
        assert found.status_code == 200, (name, found.text)
    found = post(url + path, ASKED[path] | {"no_such_field": 1})
    assert found.status_code == 400 and not jsonschema.Draft202012Validator(stated).is_valid({"no_such_field": 1})
    for name in stated["required"]:
        rest = {key: value for key, value in ASKED[path].items() if key != name}
        assert post(url + path, rest).status_code == 400


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/v1/completions", "n", 65),
        ("/v1/completions", "n", "1"),
        ("/v1/completions", "temperature", -1),
        ("/v1/completions", "top_p", 0),
        ("/v1/completions", "top_p", 1.5),
        ("/v1/completions", "logprobs", 21),
        ("/v1/completions", "prompt", ""),
        ("/v1/completions", "best_of", 2),
        ("/v1/completions", "model", "other"),
        ("/v1/completions", "presence_penalty", 3),
        ("/v1/completions", "stream", 1),
        ("/v1/completions", "stop", ""),
        ("/v1/completions", "seed", 2**63),
        ("/v1/chat/completions", "top_logprobs", 21),
        ("/v1/chat/completions", "logprobs", 1),
        ("/v1/chat/completions", "messages", []),
        ("/v1/messages", "system", 1),
        ("/detokenize", "tokens", [-1]),
    ],
)
def test_what_the_document_excludes_is_refused(url, document, path, field, value):
    asked = ASKED[path] | {field: value}
    assert not jsonschema.Draft202012Validator(schema(document, path)).is_valid(asked)
    found = post(url + path, asked)
    assert found.status_code in (400, 404), found.text
    error = document["components"]["schemas"]["Error"]
    jsonschema.validate(found.json(), error)


def test_a_key_is_part_of_the_document(make_server):
    with make_server(api_key="secret") as url:
        assert httpx.get(f"{url}/openapi.json").status_code == 401
        found = httpx.get(f"{url}/openapi.json", headers={"authorization": "Bearer secret"}).json()
        assert found["security"] == [{"key": []}] and found["paths"]["/health"]["get"]["security"] == []
        assert found["paths"]["/v1/completions"]["post"]["requestBody"]["content"]
        properties = schema(found, "/v1/completions")["properties"]
        assert properties["model"]["anyOf"][0] == {"enum": [MODEL]}
