"""`jaxinfer bench serve` against a server, and the formulas of its figures."""

import argparse
import asyncio
import json
import re
from itertools import islice

import pytest
from serve.conftest import MODEL

from jaxinfer import cli
from jaxinfer.commands.bench.client import Answer, Target, send
from jaxinfer.commands.bench.serving import arrivals, figures
from jaxinfer.commands.bench.texts import texts

pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")
pytestmark = pytest.mark.xdist_group("serve")


def exit_status(*words: str) -> int:
    try:
        return cli.main(["bench", *words])
    except SystemExit as exit:
        return exit.code


def served(url: str) -> int:
    """Return the number of requests that a server has answered."""
    text = httpx.get(f"{url}/metrics").text
    return int(sum(map(float, re.findall(r"^jaxinfer:request_success_total.* ([\d.]+)$", text, re.MULTILINE))))


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_a_load_is_measured(url, endpoint, capsys, tmp_path):
    file = tmp_path / "figures.json"
    words = ["--base-url", url, "--endpoint", endpoint, "--num-prompts", "6", "--max-concurrency", "3"]
    words += ["--input-len", "2", "--output-len", "5", "--output-json", str(file), "--percentiles", "50,90"]
    before = served(url)
    assert exit_status("serve", "--json", "--num-warmups", "2", *words) == 0
    assert served(url) == before + 2 + 6
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(file.read_text()) and found["model"] == MODEL
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (6, 0, 30)
    assert found["total_input_tokens"] >= 6 * 3
    assert found["output_throughput"] * found["duration"] == pytest.approx(30)
    assert 0 < found["p50_ttft_ms"] <= found["p90_ttft_ms"] <= 1e3 * found["duration"]
    assert found["mean_ttft_ms"] < found["mean_e2el_ms"] and found["mean_tpot_ms"] > 0


def test_a_duration_ends_the_load(url, capsys):
    words = ("--base-url", url, "--duration", "0.5", "--max-concurrency", "2", "--input-len", "1", "--output-len", "2")
    assert exit_status("serve", "--json", *words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["completed"] >= 2 and 0.5 <= found["duration"] < 30


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["serve", "--base-url", "http://127.0.0.1:9"], 1, "http://127.0.0.1:9 cannot be reached"),
        (["serve", "--base-url", "ftp://x"], 2, "--base-url must start with"),
        (["serve", "--num-prompts", "0"], 2, "at least 1"),
        (["serve", "--request-rate", "nan"], 2, "above 0"),
        (["serve", "--percentiles", "50,x"], 2, "percentiles from 0 to 100"),
        (["throughput", "--model", "/nowhere"], 2, "/nowhere"),
        (["latency", "--output-json", "/nowhere/x.json"], 2, "is not a directory"),
    ],
)
def test_errors_are_one_line(words, status, message, capsys):
    assert exit_status(*words) == status
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in error and message in error


def test_refused_requests_fail_the_run_and_the_first_reason_is_printed(make_server, capsys):
    with make_server(max_tokens=4) as url:
        assert exit_status("serve", "--base-url", url, "--num-prompts", "3", "--output-len", "5") == 1
        assert "none of 3 requests was answered" in (error := capsys.readouterr().err) and "at most 4" in error
        assert exit_status("serve", "--base-url", url, "--num-prompts", "2", "--model", "other") == 1
        assert "does not exist" in capsys.readouterr().err


def test_the_figures_are_those_of_vllm():
    answers = [
        Answer(first=1.0, seconds=3.0, gaps=[0.5, 1.5], prompt_tokens=10, new_tokens=5),
        Answer(first=2.0, seconds=2.0, prompt_tokens=20, new_tokens=1),
        Answer(error="status 429: full"),
    ]
    found = figures(answers, 4.0, (50, 99))
    assert (found["completed"], found["failed"], found["error"]) == (2, 1, "status 429: full")
    assert (found["request_throughput"], found["output_throughput"], found["total_token_throughput"]) == (0.5, 1.5, 9.0)
    assert (found["mean_ttft_ms"], found["p50_ttft_ms"], found["std_ttft_ms"]) == (1500.0, 1500.0, 500.0)
    assert found["mean_tpot_ms"] == 500.0  # an answer of one token has none
    assert (found["mean_itl_ms"], found["p50_itl_ms"], found["mean_e2el_ms"]) == (1000.0, 1000.0, 2500.0)
    with pytest.raises(RuntimeError, match="none of 1 requests"):
        figures(answers[2:], 1.0, (50,))


def test_arrivals_have_their_rate_and_prompts_share_no_prefix():
    args = argparse.Namespace(seed=0, duration=None, num_prompts=2000, request_rate=50.0)
    times = list(arrivals(args))
    assert len(times) == 2000 and times == sorted(times) and times[-1] == pytest.approx(40, rel=0.1)
    assert set(arrivals(argparse.Namespace(seed=0, duration=None, num_prompts=3, request_rate=None))) == {0.0}
    made = list(islice(texts(8, None), 100))
    assert len({text[:10] for text in made}) == 100 and {len(text.split()) for text in made} == {9}
    assert list(islice(texts(8, 1), 3)) == list(islice(texts(8, 1), 3))


def test_an_answer_of_tokens_without_text_is_no_failure(monkeypatch):
    """An answer may be special tokens alone; its times are those of the end of the stream."""
    import httpx

    def served(usage: dict) -> Answer:
        lines = [f"data: {json.dumps(event)}\n\n" for event in ({"choices": [{"text": ""}]}, {"usage": usage})]
        transport = httpx.MockTransport(lambda request: httpx.Response(200, text="".join(lines) + "data: [DONE]\n\n"))

        async def ask() -> Answer:
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await send(client, Target("m", "completions", 2, ignore_eos=True), "hello")

        return asyncio.run(ask())

    found = served({"prompt_tokens": 3, "completion_tokens": 2})
    assert found.error is None and found.new_tokens == 2 and 0 < found.first <= found.seconds
    assert served({"prompt_tokens": 3, "completion_tokens": 0}).error == "the stream had no tokens"


def test_a_stream_that_is_cut_is_a_failed_request():
    import httpx

    def cut(request: httpx.Request) -> httpx.Response:
        raise httpx.RemoteProtocolError("peer closed connection")

    async def ask() -> Answer:
        async with httpx.AsyncClient(transport=httpx.MockTransport(cut), base_url="http://test") as client:
            return await send(client, Target("m", "completions", 2, ignore_eos=True), "hello")

    assert asyncio.run(ask()).error == "RemoteProtocolError: peer closed connection"
