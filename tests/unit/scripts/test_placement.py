"""`scripts/placement.py`: tables, JSON, pictures, errors in one line; and what `--tune` makes of its figures."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import jax
import numpy as np
import pytest
from benchmarks.steptime import Step
from placements import cli, tuned_table, tuning
from placements.tuned import Kind, Timing, Tuned

from jaxinfer import cli as command
from jaxinfer import sharding
from jaxinfer.commands.plan import table
from jaxinfer.sharding import Plan

pytestmark = pytest.mark.xdist_group("placement")

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "placement.py"
HF = dict(
    architectures=["LlamaForCausalLM"],
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=97,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    dtype="float32",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing but a config.json."""
    made = tmp_path_factory.mktemp("model")
    (made / "config.json").write_text(json.dumps(HF))
    return made


@pytest.fixture
def place(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command on that model: exit code, stdout, stderr."""
    jax.devices()  # JAX has started, so that no test makes other devices for those after it

    def run(*words: str) -> tuple[int, str, str]:
        try:
            code = cli.main([f"--model={folder}", *words])
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return run


def test_the_table_has_the_sums_and_says_what_they_mean(place):
    code, out, err = place("--tensor-parallel-size=4", "--placement", "layers.0=replicate", "--memory=1MiB")
    assert (code, err) == (0, "")
    words = " ".join(out.split())
    made = sharding.plan(HF, tensor_parallel_size=4, placement={"layers.0": "replicate"}, memory=1 << 20)
    for said in (
        "layers.{1..4}.mlp.down.weight [32 embed, 48 ffn /4] float32 (-, model)",
        "layers.0.mlp.down.weight",
        "layers.1 ... layers.4 sharded 4",
        "layers.0 replicated",
        "9 all-reduce + 1 all-gather",
        "A replicated layer is copied to every device and computed on every device",
        "none lies on the first device only.",
        "The cache of layer(s) 0 is whole on every device",
        f"{made.tokens:,} tokens fit",
    ):
        assert said in words, said
    assert max(map(len, out.splitlines())) <= table.WIDTH


def test_one_device_and_no_room_are_said(place):
    out = place("--memory=1KiB")[1]
    assert "Each decode step exchanges nothing." in out and "The weights do not fit: 1 KiB" in out


def test_the_json_is_that_of_the_plan(place, folder: Path):
    code, out, _ = place("--mesh", "model=2", "--placement=*.mlp=replicate", "--json", "--quantization=int8")
    expected = sharding.plan(folder, mesh={"model": 2}, placement={"*.mlp": "replicate"}, quantization="int8")
    assert code == 0 and json.loads(out) == expected.as_dict()


def test_the_picture_is_a_page(place, tmp_path: Path):
    file = tmp_path / "plan.html"
    code, out, err = place("--tensor-parallel-size=2", f"--html={file}")
    assert (code, out) == (0, "") and str(file) in err
    text = file.read_text(encoding="utf-8")
    HTMLParser().feed(text)
    assert text.startswith("<!DOCTYPE html>") and "layers.0 ... layers.4" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tensor-parallel-size=3"], "axis 'heads' of size 4"),
        (["--tensor-parallel-size=0"], "'0' must be a whole"),
        (["--tensor-parallel-size=x"], "'x' must be a whole"),
        (["--placement=nothing=replicate"], "matches no module"),
        (["--placement=*.mlp"], "'*.mlp' must be PATTERN=TACTIC"),
        (["--placement=*.mlp=split"], "supported: shard"),
        (["--placement=*.mlp=shard", "--placement=*.mlp=replicate"], "'*.mlp' is given twice"),
        (["--placement", "layers.0=shard", "layers.?=replicate"], "'layers.0' is matched by"),
        (["--mesh=model"], "'model' must be AXIS=N"),
        (["--mesh=tensor=2"], "axis 'tensor'"),
        (["--mesh", "model=2", "data=2"], "vision tower"),
        (["--mesh=model=2", "--tensor-parallel-size=4"], "pass one of the two"),
        (["--memory=much"], "'much' must be a size"),
        (["--model=/no/such/folder"], "does not exist"),
        (["--json", "--html=x"], "not allowed with"),
        (["--tune", "--html=x"], "no --html"),
        (["--tune", "--devices=64"], "JAX has started with 8 device"),
        (["--dtype=int3"], "invalid choice"),
    ],
)
def test_bad_input_is_one_line(place, words: list[str], message: str):
    code, out, err = place(*words)
    assert code == 2 and out == ""
    last = err.strip().splitlines()[-1]
    assert message in last and "error: " in last
    assert "Traceback" not in err


def test_an_unknown_architecture_is_one_line(place, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(HF | {"architectures": ["BogusModel"]}))
    code, _, err = place(f"--model={tmp_path}")
    assert code == 2 and err.count("\n") == 1 and "'BogusModel'" in err and "LlamaForCausalLM" in err


@pytest.mark.parametrize(("text", "size"), [("80GiB", 80 << 30), ("24GB", 24 * 10**9), ("123", 123), ("1.5KiB", 1536)])
def test_sizes(text: str, size: int):
    assert command.parse(["plan", f"--memory={text}"])[1].memory == size


@pytest.mark.slow
def test_the_script_itself_plans_the_packaged_model_on_devices_that_are_not_there():
    environment = {"PATH": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, SCRIPT, "--tensor-parallel-size=2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["devices"] == 2


ATTENTION, MLP = "layers.*.attention", "layers.*.mlp"
DECODE, PREFILL = Step("decode", 8, 32), Step("prefill", 64)


def planned(memory: int | None = None) -> Callable[..., Plan]:
    return lambda hf, placement: sharding.plan(hf, tensor_parallel_size=2, placement=placement, memory=memory)


def test_the_kinds_are_what_is_divided(folder: Path):
    few = tuning.shortened(HF | {"vision_config": {"num_hidden_layers": 9}}, 2)
    assert few["num_hidden_layers"] == few["vision_config"]["num_hidden_layers"] == 2
    found = {kind.pattern: kind for kind in tuning.kinds(planned(), HF, tuning.shortened(HF, 2))}
    assert set(found) == {"embedding", "head", ATTENTION, MLP}
    assert (found[MLP].count, found[MLP].measured, found[MLP].steps) == (5, 2, ("decode", "prefill"))
    assert found[MLP].replicated_bytes == 2 * found[MLP].sharded_bytes == 5 * 3 * 32 * 48 * 4
    assert tuning.depth(planned()(HF, {}), "decode") == 5 and tuning.depth(planned()(HF, {}), "encode") == 0
    alone = lambda hf, placement: sharding.plan(hf, placement=placement)  # noqa: E731
    assert tuning.kinds(alone, HF, HF) == ()


def test_passes_that_do_not_agree_say_nothing():
    assert tuning.agreed(np.array([1.0, 2.0, 3.0, -1.0, 2.0])) == 2.0
    assert tuning.agreed(np.array([-1.0, -2.0, -3.0])) == -2.0
    assert tuning.agreed(np.array([-1.0, 2.0, -1.0, 2.0])) == 0.0


@pytest.mark.slow
def test_the_fastest_that_fits_is_chosen():
    kinds = tuning.kinds(planned(), HF, tuning.shortened(HF, 2))
    saved = [{ATTENTION: 0.2, MLP: 0.3, "head": -0.1, "embedding": 0.0}, {ATTENTION: 0.1, MLP: -0.2}]
    timings = [Timing(step, 1.0, own) for step, own in zip((DECODE, PREFILL), saved)]
    # Of the two steps together attention saves 0.3, the MLP 0.1, both 0.4.
    plan = lambda placement: planned(1 << 20)(HF, placement)  # noqa: E731
    assert tuning.choose(kinds, timings, plan, 1)[::2] == ((ATTENTION, MLP), True)
    both, attention, mlp, none = (
        planned(1 << 20)(HF, dict.fromkeys(own, "replicate")) for own in ((ATTENTION, MLP), (ATTENTION,), (MLP,), ())
    )
    assert both.tokens < attention.tokens < none.tokens
    assert tuning.choose(kinds, timings, plan, both.tokens + 16)[::2] == ((ATTENTION,), True)
    assert tuning.choose(kinds, timings, plan, max(attention.tokens, 16) + 16)[::2] == ((MLP,), True)
    assert tuning.choose(kinds, timings, plan, mlp.tokens + 16)[::2] == ((), True)
    chosen = tuning.choose(kinds, timings, plan, none.tokens + 16)
    assert chosen[0] == () and not chosen[2]
    unknown = tuning.choose(kinds, timings, lambda placement: planned()(HF, placement), 10**9)
    assert unknown[::2] == ((ATTENTION, MLP), True)


def test_what_was_found_is_said(capsys: pytest.CaptureFixture[str]):
    kinds = tuning.kinds(planned(), HF, tuning.shortened(HF, 2))
    timing = Timing(DECODE, 2e-3, {ATTENTION: 1e-3, MLP: -1e-3})
    made = planned()(HF, {ATTENTION: "replicate"})
    found = Tuned(2, kinds, (timing,), (ATTENTION,), made, True, 256, {str(DECODE): 0.75})
    tuned_table.show(found)
    out = capsys.readouterr().out
    words = " ".join(out.split())
    assert out.splitlines()[-1] == f"--placement '{ATTENTION}=replicate'" == found.flags
    assert "+1" in words and "-1" in words and "2 ms" in words and "decode 8: 0.500" in words and "0.750" in words
    none = replace(found, proposal=(), confirmed={})
    assert none.flags == "" and "All sharded is the fastest" in " ".join(tuned_table.conclusions(none))
    assert "No placement fits" in " ".join(tuned_table.conclusions(replace(none, fits=False)))
    assert "There is one device" in " ".join(tuned_table.conclusions(replace(none, devices=1)))
    assert json.loads(json.dumps(found.as_dict()))["placement"] == {ATTENTION: "replicate"}


@pytest.mark.slow
def test_measuring_runs_on_virtual_devices(place):
    words = ["--tune", "--batch-sizes", "2", "--context=16", "--repeats=2", "--prefill-tokens"]
    code, out, err = place(*words, "--tensor-parallel-size=2", "--json")
    assert code == 0, err
    found = json.loads(out)
    (step,) = found["steps"]
    assert step["step"] == "decode 2" and step["seconds"] > 0
    assert set(step["saved"]) == {"embedding", "head", ATTENTION, MLP}
    assert found["fits"] and found["device_bytes"] > 0
    code, out, _ = place(*words, "16", "--devices=1", "--tensor-parallel-size=1")
    assert code == 0 and "There is one device" in out and "prefill 16" in out


def test_a_kind_stands_for_all_its_modules():
    kind = Kind(MLP, ("decode",), 5, 2, 10, 20)
    assert Timing(DECODE, 4.0, {kind.pattern: 1.0}).ratio([MLP]) == 0.75
    assert Timing(DECODE, 4.0, {kind.pattern: 9.0}).ratio([MLP, "other"]) == 0.0
