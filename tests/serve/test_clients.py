"""Clients that go away or do not read: their requests end, the engine has nothing left, and others go on."""

import json
import socket

import pytest
from support.stepping import Held, begun, wait_until

pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")
pytestmark = pytest.mark.xdist_group("serve")

LONG = {"prompt": [5, 6, 7], "max_tokens": 100, "ignore_eos": True, "temperature": 0}


def gauges(url: str) -> tuple[float, float]:
    """Running requests and use of the cache, as the server reports them."""
    lines = [line.rsplit(" ", 1) for line in httpx.get(f"{url}/metrics").text.splitlines() if not line.startswith("#")]
    values = {name.split("{")[0]: float(value) for name, value in lines}
    return values["jaxinfer:num_requests_running"], values["jaxinfer:kv_cache_usage_perc"]


def wait_until_idle(url: str) -> None:
    """Poll the metrics until nothing runs and no block is held."""
    wait_until(lambda: gauges(url) == (0, 0))


def made(llm) -> int:
    return llm._engine.metrics.counters["generation_tokens"]


def post(url: str, **fields) -> socket.socket:
    """Ask for a long completion on a connection of its own."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps(LONG | fields)
    connection = socket.create_connection((host, int(port)))
    connection.sendall(
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()
    )
    return connection


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_hangs_up(url, llm, streamed):
    before, engine = made(llm), llm._engine
    with Held(engine, lambda: begun(engine), until=lambda: not engine.requests) as steps:
        with post(url, stream=streamed) as connection:
            steps.wait()
            if streamed:
                assert connection.recv(1)
        wait_until_idle(url)
    assert made(llm) - before < 100


def test_a_client_that_never_reads(make_server, llm, monkeypatch):
    """Its events fill the sockets' buffers; then its request is aborted, while others are answered."""
    from jaxinfer.serve import completions

    monkeypatch.setattr(completions, "event", lambda data: b"data: " + b"x" * (1 << 20) + b"\n\n")
    with make_server(write_timeout=0.3) as url, post(url, stream=True):
        assert httpx.post(f"{url}/v1/completions", json=LONG).status_code == 200
        wait_until_idle(url)


def test_stopping_the_server_ends_streams(make_server, llm):
    with make_server() as url, httpx.stream("POST", f"{url}/v1/completions", json=LONG | {"stream": True}) as response:
        next(response.iter_bytes())
