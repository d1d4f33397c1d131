"""`/debug/cache`: off by default, behind the key, recorded only while somebody looks, without any text of prompts."""

import json
import re
import threading
from importlib.resources import files

import pytest
from serve.conftest import MODEL
from support.stepping import Held, begun, wait_until

pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")
pytestmark = pytest.mark.xdist_group("serve")

DATA = "/debug/cache/data"
PROMPT = {"model": MODEL, "prompt": "hello cat hello cat", "max_tokens": 60, "n": 2, "seed": 1, "ignore_eos": True}


@pytest.fixture(autouse=True)
def _unrecorded(llm):
    """End the recording that a server has left, or the next test finds it."""
    yield
    if llm._engine.recorder is not None:
        llm.stop_recording()


def test_it_is_off_by_default(url):
    assert [httpx.get(url + path).status_code for path in ("/debug/cache", DATA)] == [404, 404]


def running(shown: dict) -> list[dict]:
    """Requests on the page that do not wait."""
    return [one for one in shown["requests"] if one["phase"] in ("prefill", "decode")]


def test_it_shows_blocks_and_requests_while_they_run(llm, make_server):
    """They stay where they are after the first token until the page has shown them."""
    seen, engine = [], llm._engine
    with make_server(debug_cache=True) as url, Held(engine, lambda: begun(engine)) as steps:
        assert engine.recorder is None
        assert httpx.get(url + DATA).status_code == 200
        assert engine.recorder is not None, "a first look starts the recording"
        asking = threading.Thread(target=httpx.post, args=(url + "/v1/completions",), kwargs=dict(json=PROMPT))
        asking.start()
        while asking.is_alive():
            seen.append(httpx.get(url + DATA).json())
            if running(seen[-1]):
                steps.release()
        wait_until(lambda: not httpx.get(url + DATA).json()["requests"])
        last = httpx.get(url + DATA).json()
    shown_running = [one for shown in seen for one in running(shown)]
    assert shown_running and all(one["blocks"] > 0 for one in shown_running)
    for shown in [*seen, last]:
        assert sum(n for _, n in shown["codes"]) == shown["num_blocks"] == sum(shown["counts"].values())
        assert all(sum(n for _, n in step["codes"]) == shown["shown_blocks"] for step in shown["steps"])
    assert sum(step["forks"] for step in last["steps"]) == 1
    assert [row["state"] for row in last["timeline"]["rows"][-2:]] == ["length", "length"]
    assert last["requests"] == [] and sum(last["lookups"].values()) >= 1
    assert "hello" not in json.dumps(last), "no text of a prompt"


def test_the_recording_ends_when_nobody_looks(llm, make_server, monkeypatch):
    with make_server(debug_cache=True) as url:
        with monkeypatch.context() as patch:
            patch.setattr("jaxinfer.serve.debug.UNWATCHED", 0.2)
            httpx.get(url + DATA)
            wait_until(lambda: llm._engine.recorder is None)
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
