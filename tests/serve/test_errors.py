"""Requests that are refused: each error has OpenAI's form and names the field and the limit."""

import functools
import itertools
import re
import select
import socket
import threading
import time

import pytest
from serve.conftest import CHAT, MODEL
from support.stepping import PATIENCE, wait_until

pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
pytestmark = pytest.mark.xdist_group("serve")


WAV = b"RIFF,\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x80>\0\0\0}\0\0\2\0\x10\0data\x08\0\0\0" + b"\1\0" * 4
"""Four samples."""


def refused(url: str, path: str, body, **headers) -> tuple[int, dict]:
    given = {"content": body} if isinstance(body, bytes) else {"json": body}
    found = httpx.post(url + path, headers=headers, timeout=60, **given)
    error = found.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return found.status_code, error


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("temperature", -1, "non-negative"),
        ("temperature", "hot", "temperature must be a number"),
        ("top_p", 0, r"\(0, 1\]"),
        ("n", 65, "at most max_n = 64"),
        ("n", True, "n must be"),
        ("max_tokens", 0, "at least 1"),
        ("max_completion_tokens", 1.5, "max_completion_tokens must be an integer"),
        ("stop", [""], "empty string"),
        ("seed", 2**70, "seed must be"),
        ("logit_bias", {"x": 1}, "token ids"),
        ("logit_bias", {"999": 1}, "outside the vocabulary"),
        ("logit_bias", {"7": 100.5}, "token 7 must be between -100 and 100"),
        ("top_logprobs", 3, "logprobs=true"),
        ("top_logprobs", 21, "between 0 and 20"),
        ("stream", "yes", "true or false"),
        ("stream_options", {"include_usage": True}, "stream=true"),
        ("tools", [{}], r"tools\[0\] must be"),
        ("tools", [{"type": "web_search", "function": {"name": "f"}}], r"tools\[0\] must be .*'function'"),
        ("functions", [{"name": "f"}], "not supported"),
        ("best_of", 2, "Unrecognized request argument supplied: best_of"),
        ("messages", [], "cannot be empty"),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}], "text"),
        ("messages", "hello", "messages must be a list"),
        ("chat_template_kwargs", {"tokenize": True}, "reserved"),
        ("model", "other", "does not exist"),
    ],
)
def test_a_wrong_field_is_named(url, field, value, message):
    status, error = refused(url, "/v1/chat/completions", {"model": MODEL, "messages": CHAT, field: value})
    assert status == (404 if field == "model" else 400)
    assert re.search(message, error["message"]), error["message"]
    assert error["type"] == ("not_found_error" if field == "model" else "invalid_request_error")
    if field != "messages":
        assert error["param"].split("[")[0] == field


@pytest.mark.parametrize(
    "body", [b"{", b"[1]", b"\xff", b'{"n": NaN}', b'{"a":' * 100_000, b"", b'{"seed": ' + b"9" * 10_000 + b"}"]
)
def test_wrong_json(url, body):
    status, error = refused(url, "/v1/completions", body)
    assert status == 400 and error["code"] == "invalid_json" and "JSON" in error["message"]


@pytest.mark.parametrize("prompt", [None, "", [], [True], [-1], [999], [[1], "a", 3], "\ud800", "hello " * 200])
def test_wrong_prompts(url, prompt):
    status, error = refused(
        url, "/v1/completions", {"prompt": prompt} if prompt != "\ud800" else b'{"prompt":"\\ud800"}'
    )
    assert status == 400 and "prompt" in error["message"] and error["param"] == "prompt"


@pytest.mark.parametrize(
    "path, body, message",
    [
        ("/v1/completions", {"prompt": ["a", [999]]}, "prompt[1]: token id 999"),
        ("/v1/completions", {"prompt": [999]}, "prompt: token id 999"),
        ("/v1/embeddings", {"input": ["a", ""]}, "input[1]: The decoder prompt cannot be empty"),
        ("/v1/embeddings", {"input": ""}, "input: The decoder prompt cannot be empty"),
        ("/v1/chat/completions", {"messages": [*CHAT, {"role": "user"}]}, "messages[1]['content'] must be"),
        ("/v1/chat/completions", {"messages": [CHAT[0] | {"content": "a " * 999}]}, "messages: The decoder prompt"),
        ("/v1/responses", {"input": []}, "input cannot be empty"),
        ("/v1/responses", {"input": [*CHAT, {"role": "user"}]}, "input[1]['content'] must be"),
        ("/v1/responses", {"input": [{"role": "user"}], "instructions": "a"}, "input[0]['content'] must be"),
        ("/tokenize", {"prompt": ""}, "prompt: The decoder prompt cannot be empty"),
        ("/tokenize", {"messages": [{"role": 5}]}, "messages[0]['role'] must be"),
    ],
)
def test_an_error_names_the_field_and_the_place_that_the_client_sent(url, path, body, message):
    status, error = refused(url, path, body)
    assert status == 400 and error["message"].startswith(message), error["message"]
    assert error["param"] == message.split("[")[0].split(" ")[0].rstrip(":")


def test_unknown_paths_and_methods(url):
    assert refused(url, "/v1/none", {})[0] == 404
    assert refused(url, "/health", {})[0] == 405
    assert "GET" in httpx.post(f"{url}/health").headers["allow"]
    assert httpx.request("TRACE", f"{url}/v1/completions").headers["allow"] == "POST"


@pytest.mark.parametrize(
    "body, message",
    [
        ({"messages": CHAT, "tools": [{"type": "function", "function": {"name": {}}}]}, "tools[0] must be"),
        ({"prompt": "a", "tools": 3}, "tools must be a list"),
        ({"prompt": "a", "messages": CHAT}, "either prompt or messages"),
        ({}, "either prompt or messages"),
        ({"messages": CHAT, "add_generation_prompt": "yes"}, "add_generation_prompt"),
        ({"messages": CHAT, "continue_final_message": {}}, "continue_final_message must be"),
        ({"messages": CHAT, "continue_final_message": 0}, "continue_final_message must be"),
        ({"messages": CHAT, "chat_template_kwargs": {"tokenize": True}}, "reserved"),
    ],
)
def test_wrong_fields_of_tokenize(url, body, message):
    status, error = refused(url, "/tokenize", body)
    assert status == 400 and message in error["message"] and error["param"]


def test_what_the_model_cannot_do_is_said(url):
    form = {"files": {"file": ("a.wav", WAV)}, "data": {"model": MODEL}}
    found = httpx.post(f"{url}/v1/audio/transcriptions", **form)
    assert found.status_code == 400 and "does not transcribe" in found.json()["error"]["message"]


def test_limits(make_server):
    with make_server(max_body_bytes=2000, max_n=2, max_tokens=8) as url:
        status, error = refused(url, "/v1/completions", {"prompt": "a" * 3000})
        assert status == 413 and "max_body_bytes = 2000" in error["message"]
        chunks = (b"a" * 500 for _ in range(100))
        assert httpx.post(f"{url}/v1/completions", content=chunks).status_code == 413
        status, error = refused(url, "/v1/completions", {"prompt": ["a", "b", "c"]})
        assert status == 400 and "max_n = 2" in error["message"] and error["param"] == "prompt"
        status, error = refused(url, "/v1/completions", {"prompt": "a", "max_tokens": 9})
        assert status == 400 and "max_tokens must be at most 8" in error["message"]


def test_concurrent_requests(make_server, llm, monkeypatch):
    go_on, step = threading.Event(), llm._engine.step
    monkeypatch.setattr(llm._engine, "step", lambda: (go_on.wait(30), step()))
    with make_server(max_concurrent_requests=1) as url:
        with httpx.stream("POST", f"{url}/v1/completions", json={"prompt": "a", "stream": True}, timeout=60) as first:
            status, error = refused(url, "/v1/completions", {"prompt": "a"})
            go_on.set()
            assert first.read().endswith(b"data: [DONE]\n\n")
        assert status == 429 and "max_concurrent_requests of this server is 1" in error["message"]
        # The first request is counted until a moment after its last byte.
        wait_until(lambda: httpx.post(f"{url}/v1/completions", json={"prompt": "a"}).status_code == 200)


def test_a_full_queue(make_server, monkeypatch):
    from jaxinfer import AsyncLLM

    monkeypatch.setattr(AsyncLLM, "num_waiting", property(lambda self: 7))
    with make_server(max_queue_length=7) as url:
        status, error = refused(url, "/v1/completions", {"prompt": "a"})
    assert (
        status == 429 and error["code"] == "queue_full" and "max_queue_length of this server is 7" in error["message"]
    )


def test_keys(make_server):
    with make_server(api_key="secret") as url:
        asked = {"prompt": "a", "max_tokens": 1}
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}, {"x-api-key": "ö"}):
            encoded = {name: value.encode() for name, value in headers.items()}
            status, error = refused(url, "/v1/completions", asked, **encoded)
            assert status == 401 and error["code"] == "invalid_api_key"
        for headers in ({"authorization": "Bearer secret"}, {"x-api-key": "secret"}):
            assert httpx.post(f"{url}/v1/completions", json=asked, headers=headers).status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/metrics").status_code == 401
        wrong = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
        with wrong as client, pytest.raises(openai.AuthenticationError):
            client.models.list()


LIMIT = 2.0
"""Time limit of a request, in seconds: those that are quick must meet it on a busy machine."""


def test_a_body_that_arrives_a_byte_at_a_time_is_given_up(make_server):
    with make_server(body_timeout=LIMIT) as url, httpx.Client() as other:
        address = url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1]))) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
            assert other.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
            assert b"408" in slow.recv(4096).split(b"\r\n")[0]


HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


def ok(connection: socket.socket) -> bool:
    """Read one answer."""
    return b" 200 " in connection.recv(4096).split(b"\r\n")[0]


def is_given_up(connection: socket.socket) -> bool:
    """Send headers a byte at a time until the server answers and closes the connection."""
    until = time.monotonic() + 20 * LIMIT
    for number in itertools.count():
        connection.sendall(HEALTH[number % 10 : number % 10 + 1])
        if select.select([connection], [], [], 0.05)[0]:
            return b"408" in connection.recv(4096).split(b"\r\n")[0] and connection.recv(1) == b""
        assert time.monotonic() < until, "each byte gives it more time"


def test_headers_that_arrive_a_byte_at_a_time_are_given_up(make_server):
    """On a new connection as after a request; one that is idle is kept for longer than that."""
    with make_server(body_timeout=LIMIT) as url:
        host, port = url.removeprefix("http://").split(":")
        connect = functools.partial(socket.create_connection, (host, int(port)), timeout=PATIENCE)
        with connect() as quick:
            quick.sendall(HEALTH[:9])
            time.sleep(0.1)
            quick.sendall(HEALTH[9:])
            assert ok(quick)
            began = time.monotonic()
            with connect() as slow:
                assert is_given_up(slow) and time.monotonic() - began > 0.99 * LIMIT
            quick.sendall(HEALTH)
            assert ok(quick), "it was idle for longer than the limit"
            assert is_given_up(quick)


def test_a_request_whose_logits_are_not_finite_ends_alone(url, llm, monkeypatch):
    engine = llm._engine
    take = engine.committer._take_token
    monkeypatch.setattr(
        engine.committer, "_take_token", lambda sequence, *_: engine.endings.fail(sequence, "not finite")
    )
    assert refused(url, "/v1/completions", {"prompt": "a"})[0] == 500
    streamed = httpx.post(f"{url}/v1/completions", json={"prompt": "a", "stream": True})
    assert streamed.status_code == 200 and '"error":{' in streamed.text and "not finite" in streamed.text
    monkeypatch.setattr(engine.committer, "_take_token", take)
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "a"}).status_code == 200
