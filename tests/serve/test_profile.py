"""Traces of JAX's profiler: `--profile` of the server and of `jaxinfer bench`."""

from pathlib import Path

import pytest
from serve.conftest import MODEL

from jaxinfer import cli

pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")
pytestmark = pytest.mark.xdist_group("serve")


def traces(folder: Path) -> list[Path]:
    return list(folder.rglob("*.xplane.pb"))


def test_there_are_no_such_endpoints_by_default(url):
    assert [httpx.post(url + path).status_code for path in ("/start_profile", "/stop_profile")] == [404, 404]


def test_a_trace_is_written_between_start_and_stop(make_server, tmp_path):
    with make_server(profile_dir=str(tmp_path)) as url:
        assert httpx.post(url + "/stop_profile").json()["error"]["message"].startswith("no trace runs")
        assert httpx.post(url + "/start_profile").json() == {"directory": str(tmp_path)}
        again = httpx.post(url + "/start_profile")
        assert again.status_code == 409 and "runs already" in again.text
        answer = httpx.post(url + "/v1/completions", json={"model": MODEL, "prompt": "hello", "max_tokens": 2})
        assert answer.status_code == 200 and not traces(tmp_path)
        assert httpx.post(url + "/stop_profile", timeout=60).status_code == 200
    [trace] = traces(tmp_path)
    assert trace.stat().st_size > 1000


@pytest.mark.slow
def test_bench_traces_one_more_pass(tmp_path, capsys):
    sizes = ["--num-prompts", "2", "--input-len", "4", "--output-len", "3", "--repeats", "1"]
    assert cli.main(["bench", "throughput", *sizes, "--profile", str(tmp_path)]) == 0
    assert len(traces(tmp_path)) == 1 and "tokens_per_second" in capsys.readouterr().out
