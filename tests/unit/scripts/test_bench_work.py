"""`scripts/bench.py work`: the five works, their figures, openvino-genai's protocol."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from benchmarks import standard
from benchmarks.peer import Peer
from benchmarks.standard import STANDARDS

from jaxinfer.commands.bench import trace
from jaxinfer.commands.bench.trace import Trace
from jaxinfer.commands.bench.work import Work

pytestmark = pytest.mark.xdist_group("bench")


def test_the_works_are_those_of_the_table():
    made = {name: one.work(vocab=32000, seed=0) for name, one in STANDARDS.items()}
    sizes = {
        name: (len(work.prompts), {len(prompt) for prompt in work.prompts}, set(work.lengths))
        for name, work in made.items()
    }
    assert sizes.pop("W1") == (1, {128}, {64})
    assert sizes.pop("W2") == (8, {128}, {64})
    assert sizes.pop("W4") == (1, {2048}, {1})
    assert sizes.pop("W5") == (8, {512}, {32})
    requests, prompts, new = sizes.pop("W3")
    assert (requests, new, sizes) == (32, {48}, {})
    assert 16 <= min(prompts) < max(prompts) <= 256
    assert made["W5"].samples == 8 and made["W5"].temperature > 0
    assert made["W5"].new_tokens == 8 * 8 * 32
    assert {work.temperature for name, work in made.items() if name != "W5"} == {0.0}


def test_the_figures_by_hand():
    work = Work([[1, 2], [3]], [3, 3])
    # The first sequence has two tokens by the time the second has its first: one and two tokens are left.
    seen = Trace(10.0, [[0] * 3] * 2, [0.0, 0.0], [[1.0, 2.0, 5.0], [2.0, 4.0, 6.0]])
    assert trace.first_tokens(seen) == 2.0
    assert trace.prefill_rate(work, seen) == pytest.approx(3 / 2)
    assert trace.decode_rate(work, seen) == pytest.approx(3 / 4)
    alone = Trace(5.0, [[0] * 3], [0.0], [[1.0, 2.0, 5.0]])
    assert trace.decode_rate(Work([[1]], [3]), alone) == pytest.approx(2 / 4)
    assert standard.GENERATED.of(Work([[1]], [3], samples=2, temperature=1.0), seen) == pytest.approx(6 / 10)
    assert trace.span([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


@pytest.mark.slow
def test_each_figure_has_its_span_and_ratio(result: Callable[..., dict], install_peer: Callable[..., None]):
    install_peer()
    found = result("--work", "W1", "W4", "--scale=0.01", "--repeats=2", "--peer=hf")
    assert found["work"]["command"] == "work"
    ours, theirs, figures = found["jaxinfer"], found["peers"]["hf"], ("prefill_tokens", "decode_tokens", "first_token")
    names = {name.split("@")[1] for name in ours if "@" in name}
    assert names == {"W1_prefill_tokens_per_second", "W1_decode_tokens_per_second", "W4_first_token_seconds"}
    assert len(figures) == len(names)
    for name in names:
        assert 0 < ours[f"min@{name}"] <= ours[f"median@{name}"] <= ours[f"max@{name}"]
        pair = ours[f"median@{name}"], theirs[f"median@{name}"]
        assert found["ratio"][f"hf@{name}"] == pytest.approx(
            pair[1] / pair[0] if name.endswith("seconds") else pair[0] / pair[1]
        )
        assert found["ratio"][f"hf@{name}"] > 1
    assert theirs["same_tokens@W4"] in (0, 1)


def test_a_work_that_is_none_is_refused(bench: Callable[..., tuple], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        bench("--work", "W6")


@pytest.mark.usefixtures("real_peers")
@pytest.mark.slow
def test_all_five_beside_transformers(result: Callable[..., dict]):
    pytest.importorskip("torch")
    found = result("work", "--scale=0.02", "--repeats=1", "--peer=hf", "--peer=hf-cb")
    expected = {f"{name}_{figure.name}" for name, one in STANDARDS.items() for figure in one.figures}
    for figures in (found["jaxinfer"], *found["peers"].values()):
        assert {name.removeprefix("median@") for name in figures if name.startswith("median@")} == expected
    for figures in found["peers"].values():
        assert {value for name, value in figures.items() if name.startswith("same_tokens")} == {1.0}
        assert not any(name.startswith("same_tokens@W5") for name in figures)


OPENVINO = """
class Tensor:
    def __init__(self, data):
        self.data = data
"""
GENAI = '''
__version__ = "fake"

class SchedulerConfig:
    enable_prefix_caching = True

class GenerationConfig:
    num_return_sequences, ignore_eos, apply_chat_template, do_sample = 1, False, True, False

class Output:
    def __init__(self, token):
        self.generated_ids = [token]

class Handle:
    """One token a step and sample; sample s of a prompt that starts with t says 100 * t + 10 * s + step."""

    def __init__(self, tokens, config):
        assert config.ignore_eos and not config.apply_chat_template
        assert config.do_sample == (config.num_return_sequences > 1)
        self.tokens, self.config, self.made, self.ready = tokens, config, 0, []

    def step(self):
        if self.made < self.config.max_new_tokens:
            samples = reversed(range(self.config.num_return_sequences))
            self.ready.append({s: Output(100 * int(self.tokens[0, 0]) + 10 * s + self.made) for s in samples})
            self.made += 1

    def can_read(self):
        return bool(self.ready)

    def read(self):
        return self.ready.pop(0)

class ContinuousBatchingPipeline:
    def __init__(self, folder, scheduler, device, settings):
        assert not scheduler.enable_prefix_caching and device == "CPU"
        assert settings == {"INFERENCE_PRECISION_HINT": "f32"} and folder.endswith("fp32")
        self.handles = []

    def add_request(self, request_id, tensor, config):
        self.handles.append(Handle(tensor.data, config))
        return self.handles[-1]

    def has_non_finished_requests(self):
        return any(h.made < h.config.max_new_tokens for h in self.handles)

    def step(self):
        for handle in self.handles:
            handle.step()
'''


@pytest.fixture
def openvino(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Peer:
    """The server of openvino-genai, over a stand-in for it and an exported model."""
    (tmp_path / "openvino.py").write_text(OPENVINO)
    (tmp_path / "openvino_genai.py").write_text(GENAI)
    (tmp_path / "exported" / "fp32").mkdir(parents=True)
    (tmp_path / "exported" / "fp32" / "openvino_model.xml").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Peer("openvino", sys.executable, tmp_path, "float32", str(tmp_path / "exported"))


def test_openvino_is_asked_for_the_same_and_its_samples_are_put_in_order(openvino: Peer):
    assert openvino.versions == {"openvino-genai": "fake", "weights": "fp32", "precision": "f32"}
    seen = openvino.run(Work([[4], [5]], [2, 2], samples=2, temperature=1.0))
    assert seen.tokens == [[400, 401], [410, 411], [500, 501], [510, 511]]
    assert all(0 < first < last <= seen.seconds for first, last in seen.times)
    served = openvino.run(Work([[4], [5]], [2, 1], concurrency=1))
    assert served.tokens == [[400, 401], [500]]
    assert served.arrivals[1] >= served.times[0][-1]
    openvino.close()


def test_without_openvino_the_flag_is_named(tmp_path: Path):
    with pytest.raises(RuntimeError, match="peer openvino: cannot start .*no_python.*--openvino-python"):
        Peer("openvino", str(tmp_path / "no_python"), tmp_path, "auto", "")
