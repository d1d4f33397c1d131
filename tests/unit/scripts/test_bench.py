"""`scripts/bench.py` on a toy model: the shape of its results, the formulas, the peers' protocol."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from benchmarks import checkpoint, commands
from benchmarks.peer import Peer
from benchmarks.report import Report

from jaxinfer.checkpoint import SafetensorsReader
from jaxinfer.commands.bench import measure, trace
from jaxinfer.commands.bench.trace import Trace
from jaxinfer.commands.bench.work import Work, random_work

pytestmark = pytest.mark.xdist_group("bench")

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"
COMMANDS = {
    "throughput": ["--num-prompts=3", "--max-input-len=20", "--output-len=5", "--repeats=1"],
    "latency": ["--batch-size=2", "--input-len=9", "--output-len=5", "--num-iters=2", "--num-iters-warmup=1"],
    "serving": ["--concurrency", "1", "2", "--scale=0.004"],
}
INSIDE = ("work", "host", "startup", "roofline", "profile", "placement")
"""The other subcommands."""


@pytest.fixture(scope="module")
def results(result: Callable[..., dict], install_peer: Callable[..., None]) -> dict[str, dict]:
    """Each subcommand beside a peer that needs 100 s for anything."""
    install_peer()
    return {command: result(command, *flags, "--peer=hf") for command, flags in COMMANDS.items()}


@pytest.mark.slow
def test_throughput(results: dict[str, dict]):
    work, figures = results["throughput"]["work"], results["throughput"]["jaxinfer"]
    assert (work["requests"], work["new_tokens"]) == (3, 15)
    assert figures["output_tokens_per_second"] * figures["elapsed_time"] == pytest.approx(15)
    assert figures["tokens_per_second"] * figures["elapsed_time"] == pytest.approx(15 + work["prompt_tokens"])
    assert figures["compiled_steps"] >= 2 and figures["compile_seconds"] > 0, "told apart, and in no pass that counts"


@pytest.mark.slow
def test_latency(results: dict[str, dict]):
    work, figures = results["latency"]["work"], results["latency"]["jaxinfer"]
    assert (work["requests"], work["prompt_tokens"], work["repeats"]) == (2, 18, 2)
    assert 0 < figures["best_latency"] <= figures["p50_latency"] <= figures["p99_latency"]


@pytest.mark.slow
def test_serving(results: dict[str, dict]):
    found = results["serving"]
    assert found["work"]["requests@2"]["requests"] == 6
    for clients in (1, 2):
        figures = {name.split("@")[0]: v for name, v in found["jaxinfer"].items() if name.endswith(f"@{clients}")}
        assert 0 < figures["median_ttft_ms"] <= figures["p99_ttft_ms"] < 1e3 * figures["elapsed_time"]
        assert 0 < figures["mean_tpot_ms"] <= figures["longest_gap_ms"]
    # A client that is alone never sees another one's prefill.
    assert found["jaxinfer"]["longest_gap_while_others_prefill_ms@1"] == 0


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.slow
def test_a_peer_has_its_own_figures_and_a_ratio(results: dict[str, dict], command: str):
    found, label = results[command], "@2" if command == "serving" else ""
    ours, theirs = found["jaxinfer"], found["peers"]["hf"]
    if command == "latency":
        expected = theirs["p50_latency"] / ours["p50_latency"]
    else:
        expected = ours[f"output_tokens_per_second{label}"] / theirs[f"output_tokens_per_second{label}"]
    assert found["ratio"][f"hf{label}"] == pytest.approx(expected)
    assert expected > 1
    assert found["work"]["versions"]["hf"] == "fake 1"
    assert theirs[f"same_tokens{label}"] == 0


def test_without_json_a_table_is_printed(bench: Callable[..., tuple], monkeypatch: pytest.MonkeyPatch):
    report = Report({"requests": 3}, {"rate": 6.0}, {"hf": {"rate": 2.0, "other": 1.0}}, {"hf": 3.0})
    monkeypatch.setattr(commands, "throughput", lambda args, model: report)
    code, out, _ = bench("throughput")
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        ["requests:", "3"],
        ["jaxinfer", "hf"],
        ["rate", "6", "2"],
        ["other", "-", "1"],
        ["jaxinfer", "is", "3.00", "times", "as", "fast", "as", "hf"],
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--set=max_num_sqs=3"], "max_num_seqs"),
        (["--min-input-len=21"], "21 tokens, the longest 20"),
        (["--hidden-size=34"], "not divided by"),
        ([f"--checkpoint-dir={SCRIPTS}"], "name an empty one"),
        (["--model=/no/such/folder"], "No such file"),
    ],
)
def test_what_cannot_be_done_is_said_on_one_line(bench: Callable[..., tuple], flags: list[str], message: str):
    code, out, err = bench("throughput", *COMMANDS["throughput"], *flags)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: ") and message in err


def test_the_script_starts_without_jax():
    command = [sys.executable, "-X", "importtime", str(SCRIPTS / "bench.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert all(name in done.stdout for name in (*COMMANDS, *INSIDE))
    assert not any(line.split("|")[-1].strip() == "jax" for line in done.stderr.splitlines())


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("raise SystemExit(3)", "code 3.*--peer-python"),
        (None, "tokens a request"),
        ("""print('{"ready": {}}\\n{"error": "no memory"}', flush=True); input()""", "no memory"),
    ],
)
def test_a_peer_that_fails_is_named(
    install_peer: Callable[..., None], fake_peer: str, program: str | None, message: str, tmp_path: Path
):
    install_peer(fake_peer.replace("EXTRA", "1") if program is None else program)
    with pytest.raises(RuntimeError, match=f"peer hf.*{message}"):
        Peer("hf", sys.executable, tmp_path, "auto").run(Work([[1]], [2]))


def test_a_peer_without_an_interpreter_is_named(tmp_path: Path):
    with pytest.raises(RuntimeError, match="cannot start .*no_python.*--peer-python"):
        Peer("hf", str(tmp_path / "no_python"), tmp_path, "auto")


@pytest.mark.usefixtures("real_peers")
@pytest.mark.slow
@pytest.mark.parametrize("command", ["throughput", "serving"])
def test_transformers_makes_the_same_tokens_of_the_same_work(result: Callable[..., dict], command: str):
    pytest.importorskip("torch")
    found = result(command, *COMMANDS[command], "--peer=hf", "--peer=hf-cb")
    assert set(found["peers"]) == {"hf", "hf-cb"}
    for figures in found["peers"].values():
        assert {value for key, value in figures.items() if key.startswith("same_tokens")} == {1.0}
        assert set(figures) - {"same_tokens", "same_tokens@1", "same_tokens@2"} <= set(found["jaxinfer"])
    assert all(value > 0 for value in found["ratio"].values())


def test_work_is_drawn_from_the_ranges_and_repeatable():
    first, again = (random_work(200, (3, 6), (2, 4), vocab=50, seed=1) for _ in range(2))
    assert first == again != random_work(200, (3, 6), (2, 4), vocab=50, seed=2)
    assert {len(prompt) for prompt in first.prompts} == {3, 4, 5, 6}
    assert set(first.lengths) == {2, 3, 4}
    assert {token for prompt in first.prompts for token in prompt} == set(range(3, 50))
    assert (first.at_once, random_work(5, (1, 1), (1, 1), vocab=9, seed=0, concurrency=2).at_once) == (200, 2)


def test_serving_figures_by_hand():
    work = Work([[1, 2], [3]], [3, 3], 2)
    # The second request waits from 1.5 to 4: the first is silent from 2 to 6 beside it, and from 6 to 7 alone.
    seen = Trace(10.0, [[0] * 3] * 2, [0.0, 1.5], [[2.0, 6.0, 7.0], [4.0, 9.5, 10.0]])
    figures = trace.serving(work, seen)
    assert figures["requests_per_second"] == pytest.approx(0.2)
    assert figures["output_tokens_per_second"] == pytest.approx(0.6)
    assert figures["tokens_per_second"] == pytest.approx(0.9)
    assert figures["mean_ttft_ms"] == pytest.approx(1e3 * (2.0 + 2.5) / 2)
    assert figures["mean_tpot_ms"] == pytest.approx(1e3 * (5.0 / 2 + 6.0 / 2) / 2)
    assert figures["longest_gap_ms"] == pytest.approx(5500)
    assert figures["longest_gap_while_others_prefill_ms"] == pytest.approx(4000)


def test_latency_and_medians_by_hand():
    figures = trace.latency([Trace(seconds, [], [], []) for seconds in (3.0, 1.0, 2.0)])
    assert (figures["avg_latency"], figures["best_latency"], figures["p50_latency"]) == (2.0, 1.0, 2.0)
    assert trace.medians([{"a": 1.0}, {"a": 9.0}, {"a": 2.0}]) == {"a": 2.0}


def test_a_ratio_above_one_is_faster_either_way():
    report = Report({})
    report.add({"jaxinfer": {"rate": 6.0}, "hf": {"rate": 2.0}}, "jaxinfer", fast="rate", label="@8")
    report.add({"jaxinfer": {"time": 2.0}, "hf": {"time": 6.0}}, "jaxinfer", fast="time", invert=True)
    assert report.ratio == {"hf@8": 3.0, "hf": 3.0}
    assert report.jaxinfer == {"rate@8": 6.0, "time": 2.0}
    assert "3.00 times as fast as hf@8" in report.as_table()


class Compiling:
    """Compiles something in each of its first passes."""

    name = "jaxinfer"

    def __init__(self, passes: int):
        self.left, self.steps, self.runs = passes, 0, 0

    def run(self, work: Work) -> Trace:
        self.runs += 1
        if self.left:
            self.left, self.steps = self.left - 1, self.steps + 1
        return Trace(float(self.runs), [[0]], [0.0], [])

    def compiled(self) -> tuple[int, float]:
        return self.steps, 0.0


def test_a_pass_that_compiles_does_not_count(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "PAUSE", 0.0)
    runs = measure.alternate(Compiling(3), [], Work([[1]], [1]), repeats=2)["jaxinfer"]
    assert [run.seconds for run in runs] == [4.0, 5.0]
    with pytest.raises(RuntimeError, match="each compiled"):
        measure.alternate(Compiling(100), [], Work([[1]], [1]), repeats=1)


def test_the_checkpoint_has_the_names_of_hugging_face_and_is_made_once(tmp_path: Path, sizes: dict[str, int]):
    config = sizes | {"head_dim": 8, "dtype": "bfloat16"}
    checkpoint.write(tmp_path / "toy", config, 0)
    stamp = (tmp_path / "toy" / "model.safetensors").stat().st_mtime_ns
    checkpoint.write(tmp_path / "toy", config, 0)
    assert (tmp_path / "toy" / "model.safetensors").stat().st_mtime_ns == stamp
    with SafetensorsReader(tmp_path / "toy") as reader:
        found = {name: reader.info(name) for name in reader.names()}
    assert found["model.layers.1.self_attn.k_proj.weight"].shape == (16, 32)
    assert {info.dtype for info in found.values()} == {"BF16"}
    assert sum(int(np.prod(info.shape)) for info in found.values()) == checkpoint.parameters(config)
    with pytest.raises(ValueError, match="something else"):
        checkpoint.write(tmp_path / "toy", config, 1)
