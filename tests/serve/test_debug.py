"""`/debug/cache`: off by default, behind the key, recorded only while somebody looks, without any text of prompts."""

import json
import re
import threading
import time
from importlib.resources import files

import pytest
from serve.conftest import MODEL

pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")
pytestmark = pytest.mark.xdist_group("serve")

DATA = "/debug/cache/data"
PROMPT = {"model": MODEL, "prompt": "hello cat hello cat", "max_tokens": 60, "n": 2, "seed": 1, "ignore_eos": True}


def test_it_is_off_by_default(url):
    assert [httpx.get(url + path).status_code for path in ("/debug/cache", DATA)] == [404, 404]


def test_it_shows_blocks_and_requests_while_they_run(llm, make_server, monkeypatch):
    shown_running, step = threading.Event(), llm._engine.step

    def wait_for_the_page() -> None:
        """Leave a request where it is after its first token until the page has shown it."""
        begun = any(sequence.made for request in llm._engine.requests.values() for sequence in request.sequences)
        if begun and not shown_running.is_set():
            time.sleep(0.005)
        else:
            step()

    monkeypatch.setattr(llm._engine, "step", wait_for_the_page)
    with make_server(debug_cache=True) as url:
        assert llm._engine.recorder is None
        assert httpx.get(url + DATA).status_code == 200
        assert llm._engine.recorder is not None, "a first look starts the recording"
        threads = [threading.Thread(target=httpx.post, args=(url + "/v1/completions",), kwargs=dict(json=PROMPT))]
        threads[0].start()
        seen, until = [], time.monotonic() + 60
        while threads[0].is_alive() and time.monotonic() < until:
            seen.append(httpx.get(url + DATA).json())
            if seen[-1]["requests"]:
                shown_running.set()
        shown_running.set()
        threads[0].join()
        while (last := httpx.get(url + DATA).json())["requests"] and time.monotonic() < until:
            time.sleep(0.05)
    running = [one for shown in seen for one in shown["requests"]]
    assert {one["phase"] for one in running} & {"prefill", "decode"} and all(one["blocks"] > 0 for one in running)
    for shown in [*seen, last]:
        assert sum(n for _, n in shown["codes"]) == shown["num_blocks"] == sum(shown["counts"].values())
        assert all(sum(n for _, n in step["codes"]) == shown["shown_blocks"] for step in shown["steps"])
    assert sum(step["forks"] for step in last["steps"]) == 1
    assert [row["state"] for row in last["timeline"]["rows"][-2:]] == ["length", "length"]
    assert last["requests"] == [] and sum(last["lookups"].values()) >= 1
    assert "hello" not in json.dumps(last), "no text of a prompt"


def test_the_recording_ends_when_nobody_looks(llm, make_server, monkeypatch):
    monkeypatch.setattr("jaxinfer.serve.debug.UNWATCHED", 0.2)
    with make_server(debug_cache=True) as url:
        httpx.get(url + DATA)
        until = time.monotonic() + 20
        while llm._engine.recorder is not None and time.monotonic() < until:
            time.sleep(0.05)
        assert llm._engine.recorder is None
        assert httpx.get(url + DATA).status_code == 200 and llm._engine.recorder is not None


def test_it_follows_the_key(make_server):
    with make_server(debug_cache=True, api_key="secret") as url:
        for path in ("/debug/cache", DATA):
            refused = httpx.get(url + path)
            assert refused.status_code == 401 and refused.headers["www-authenticate"].startswith("Basic ")
            assert httpx.get(url + path, auth=("me", "wrong")).status_code == 401
            assert httpx.get(url + path, headers={"authorization": "Basic ==="}).status_code == 401
            assert httpx.get(url + path, headers={"authorization": "Bearer secret"}).status_code == 200
            assert httpx.get(url + path, auth=("anyone", "secret")).status_code == 200
        other = httpx.get(url + "/v1/models", auth=("anyone", "secret"))
        assert other.status_code == 401, "a browser's stored password opens nothing else"
        assert "www-authenticate" not in other.headers


def test_the_page_loads_nothing_from_elsewhere(make_server):
    with make_server(debug_cache=True) as url:
        found = httpx.get(url + "/debug/cache")
    assert found.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in found.headers["content-security-policy"]
    text = files("jaxinfer.serve").joinpath("debug_cache.html").read_text()
    assert found.text == text
    assert not re.search(r"https?://|src=|@import|innerHTML|eval\(", text)
