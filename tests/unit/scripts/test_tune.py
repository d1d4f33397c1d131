"""`scripts/tune.py`: tables from kernels in the interpreter, needs of kernels compiled for an H100, a model's calls."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from support.interpret import interpreted
from support.lowering import MEDIUM, require_cuda_compiler
from tuning import candidates, cli, problems
from tuning.assembler import Assembled
from tuning.candidates import Call, Needs

from jaxinfer.kernels.triton import triton_launch, tuned
from jaxinfer.kernels.triton.triton_launch import Target

pytestmark = [pytest.mark.xdist_group("triton"), pytest.mark.slow]

TINY = ["--sequences", "2", "--positions", "20", "--tokens", "20"]
ATTENTION = dict(heads=4, kv_heads=2, dim=16, value_dim=16, latent=0, itemsize=4, tile=1, decode=1, codes=0)
CALLS = {
    "decode": ("attend", ATTENTION),
    "prefill": ("attend", ATTENTION | dict(tile=8, decode=0)),
    "latents": ("attend", ATTENTION | dict(kv_heads=1, dim=40, value_dim=32, latent=1)),
    "codes": ("attend", ATTENTION | dict(codes=1)),
    "experts": ("grouped", dict(mean=2, groups=3, columns=32, inner=32, itemsize=4)),
    "int8 experts": ("grouped", dict(mean=2, groups=3, columns=32, inner=32, itemsize=1)),
    "4 bits": ("packed", dict(rows=3, columns=32, inner=64, group=32, itemsize=4, asymmetric=1)),
    "experts in 4 bits": (
        "packed",
        dict(rows=2, columns=32, inner=64, group=32, itemsize=4, asymmetric=0, experts=3, floats=1),
    ),
}


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(problems, "COMMON", {name: [call] for name, call in CALLS.items()})
    monkeypatch.setattr(cli, "COMMON", problems.COMMON)
    real = Call.candidates
    monkeypatch.setattr(Call, "candidates", lambda self: islice(real(self), 2))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use a GPU whose kernels run in the interpreter."""
    monkeypatch.setattr(triton_launch, "target", lambda mesh: Target(90, 2, "Toy GPU"))
    monkeypatch.setattr(Call, "needs", lambda self, entry: Needs(Assembled(1, 0), 1, 1, True))
    monkeypatch.setattr(candidates, "measure", _once)
    with interpreted():
        yield


class _Seconds:
    def __init__(self, median: float):
        self.median = median


def _once(call) -> _Seconds:
    """Run a call, and report shorter times for each further one, so that the last candidate is the best."""
    call()
    _once.calls = getattr(_once, "calls", 0) + 1
    return _Seconds(1 / _once.calls)


def test_a_table_is_written_read_and_continued(device: None, tmp_path: Path, capsys, monkeypatch):
    words = [*TINY, "--out", str(tmp_path)]
    assert cli.main(words) == 0
    table = json.loads((tmp_path / "Toy_GPU.json").read_text())
    assert table["device"] == "Toy GPU"
    said = capsys.readouterr().out
    for kernel, shape in CALLS.values():
        entry = table["tiles"][kernel][tuned.shape_text(shape)]
        assert entry["us"] < entry["estimated_us"], "the second candidate"
        monkeypatch.setenv(tuned.FOLDER, str(tmp_path))
        tuned.table.cache_clear()
        call = Call(kernel, shape, Target(90, 2, "Toy GPU"), problems.Load())
        chosen = tuned.choose(kernel, shape, call.tiles, Target(90, 2, "Toy GPU"))
        assert tuned.entry_of(chosen) == {name: entry[name] for name in tuned.entry_of(chosen)} != call.estimated
    assert said.count("2 candidates, 0 do not fit") == len(CALLS)
    tuned.table.cache_clear()
    assert cli.main(words) == 0
    assert "candidates" not in capsys.readouterr().out, "all are known"


def test_what_candidates_need_is_known_without_a_gpu(capsys):
    assert cli.main([*TINY, "--compile-only", "--layers", "prefill", "experts", "4 bits"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 * 3 + 1
    assert all("registers, 0 B spilled" in line for line in lines if " threads" in line)
    assert sum(line.startswith("  * ") for line in lines) == 3


def test_the_calls_of_a_model_are_found_without_its_weights(tmp_path: Path):
    require_cuda_compiler()
    from tuning.model import calls_of

    hf = MEDIUM | {"num_hidden_layers": 1, "model_type": "llama", "torch_dtype": "bfloat16"}
    del hf["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(hf))
    shape = dict(heads=8, kv_heads=2, dim=64, value_dim=64, latent=0, itemsize=2, tile=1, decode=1, codes=0)
    assert calls_of(tmp_path, 2, [4], 128) == [("attend", shape), ("attend", shape | dict(tile=32, decode=0))]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--out DIR is missing"),
        (["--out", "x"], "there is no NVIDIA GPU"),
        (["--compile-only", "--target", "h100"], "--target must be capability:cores"),
        (["--compile-only", "--model", "/nowhere"], "/nowhere"),
    ],
)
def test_what_is_missing_is_said_in_a_line(words: list[str], message: str, capsys):
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err
