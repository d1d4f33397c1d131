"""Test converted folders: weights are identical on any number of devices, and every error names its file."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from support import scripts
from support.checkpoint import shaped
from support.tiny import ARCHITECTURES, CONFIG

from jaxinfer.checkpoint import orbax, rules
from jaxinfer.checkpoint.manifest import NAME, VERSION, Manifest
from jaxinfer.errors import CheckpointError, ConfigError
from jaxinfer.loading import convert
from jaxinfer.loading import weights as loading
from jaxinfer.sharding import make_mesh
from jaxinfer.sharding.policy import Placement

pytestmark = [pytest.mark.xdist_group("orbax"), pytest.mark.slow]
ROOT = Path(__file__).parents[3]


def write(folder: Path, family: str = "llama", stored: type = np.float32, **changes: Any) -> Path:
    """Write a checkpoint of the tiny configuration."""
    folder.mkdir(parents=True)
    hf = CONFIG | {"architectures": [ARCHITECTURES[family]], "dtype": np.dtype(stored).name} | changes
    save_file(shaped(hf, stored), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf))
    return folder


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """Return `make(family, tp, stored, **settings of convert)`, which gives a cached checkpoint and its converted
    folder.
    """
    base = tmp_path_factory.mktemp("orbax")

    @cache
    def source(family: str, stored: type) -> Path:
        return write(base / f"{family}-{np.dtype(stored).name}", family, stored)

    @cache
    def converted(family: str, tp: int, stored: type, settings: tuple) -> Path:
        out = base / hashlib.sha256(repr((family, tp, stored, settings)).encode()).hexdigest()[:16]
        how = dict(settings)
        how["placement"] = Placement(dict(how.get("placement", ())))
        convert.convert(source(family, stored), out, make_mesh(tp), progress=False, **how)
        return out

    def get(family: str = "llama", tp: int = 1, stored: type = np.float32, **settings: Any) -> tuple[Path, Path]:
        return source(family, stored), converted(family, tp, stored, tuple(sorted(settings.items())))

    return get


@pytest.fixture
def copy(make, tmp_path: Path) -> Path:
    """Return a converted folder for two devices that a test may modify."""
    return shutil.copytree(make(tp=2)[1], tmp_path / "copy")


def load(folder: Path, tp: int = 1, **settings: Any) -> dict[str, Any]:
    return rules.parameters(loading.load(folder, make_mesh(tp), progress=False, **settings))


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Check that every device holds the same part of every parameter, bit for bit, with the same sharding."""
    assert found.keys() == expected.keys()
    for path, param in expected.items():
        ours, theirs = found[path].get_value(), param.get_value()
        assert (ours.dtype, ours.shape, ours.sharding) == (theirs.dtype, theirs.shape, theirs.sharding), path
        for a, b in zip(ours.addressable_shards, theirs.addressable_shards, strict=True):
            assert (a.device, a.index) == (b.device, b.index)
            np.testing.assert_array_equal(np.asarray(a.data), np.asarray(b.data), path)


@pytest.mark.parametrize(
    ("before", "after", "family", "quantization"),
    [
        (*sizes, family, quantization)
        for sizes in ((2, 2), (1, 4), (4, 1), (2, 4))
        for family in ("qwen2", "phi3")
        for quantization in (None, "int8")
    ],
)
def test_it_restores_what_the_checkpoint_gives_on_as_many_devices(make, before, after, family, quantization):
    """Cover biases (qwen2), tensors that stack outputs (phi3), kv heads shared by four devices, and a padded
    vocabulary of 97.
    """
    source, folder = make(family, before, quantization=quantization)
    assert_same(load(folder, after), load(source, after, quantization=quantization))


@pytest.mark.parametrize("differs", [True, False])
def test_a_converted_folder_has_the_ties_of_the_file_that_it_was_made_from(differs, tmp_path):
    source = write(tmp_path / "source")
    hf = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(hf))
    content = shaped(CONFIG | hf | {"tie_word_embeddings": False})
    content["lm_head.weight"] = content["model.embed_tokens.weight"] + differs
    save_file(content, source / "model.safetensors")
    convert.convert(source, tmp_path / "out", make_mesh(2), quantization="int8", progress=False)
    expected, found = load(source, 4, quantization="int8"), load(tmp_path / "out", 4)
    assert ("head.weight_scale" in found) is differs
    assert_same(found, expected)


def test_on_as_many_devices_each_shard_is_read_as_it_lies(make, monkeypatch):
    _, folder = make(tp=2)
    read = []
    monkeypatch.setattr(orbax.StoredSource, "_values", lambda self, path: read.append(path))
    load(folder, 2)
    assert read == []


def test_on_another_number_only_what_lies_otherwise_is_put_together_again(make, monkeypatch):
    _, folder = make(tp=2)
    read, values = set(), orbax.StoredSource._values

    def noted(self: orbax.StoredSource, path: str) -> np.ndarray:
        read.add(re.sub(r"\d+", "i", path))
        return values(self, path)

    monkeypatch.setattr(orbax.StoredSource, "_values", noted)
    load(folder, 1)
    assert read == {"embedding.weight", "head.weight", "layers.i.attention.qkv.weight", "layers.i.mlp.gate_up.weight"}


def test_a_folder_that_is_not_quantised_is_quantised_as_it_is_read(make):
    source, folder = make(tp=2)
    assert_same(load(folder, 4, quantization="int8"), load(source, 4, quantization="int8"))


def test_a_placement_holds_until_another_is_asked_for(make):
    whole, divided = {"layers.*.attention": "replicate"}, {"layers.*.attention": "shard"}
    source, folder = make(tp=2, placement=tuple(whole.items()))
    assert_same(load(folder, 2), load(source, 2, placement=Placement(whole)))
    assert_same(load(folder, 4), load(source, 4, placement=Placement(whole)))
    assert_same(load(folder, 2, placement=Placement(divided)), load(source, 2))
    with pytest.raises(ConfigError, match="'nothing.like.it' matches no module"):
        load(folder, 2, placement=Placement({"nothing.like.it": "shard"}))


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_heads_of_zeroes_are_left_out_where_they_are_not_needed(make, quantization):
    source, folder = make("qwen2", 3, quantization=quantization, pad_heads=True)
    for tp in (3, 2):
        assert_same(load(folder, tp), load(source, tp, quantization=quantization, pad_heads=True))
    assert np.count_nonzero(load(folder, 3)["layers.0.attention.out.weight"].get_value()[:, -1]) == 0


def test_another_dtype_where_nothing_was_rounded(make):
    source, folder = make(tp=2, stored=ml_dtypes.bfloat16)
    assert Manifest.read(folder).dtype == "bfloat16"
    for tp in (1, 2):
        for dtype in ("bfloat16", "float32"):
            assert_same(load(folder, tp, dtype=dtype), load(source, tp, dtype=dtype))


def test_which_dtypes_hold_which_exactly(make):
    made = Manifest.read(make()[1])
    kinds = ("bfloat16", "float16", "float32", "float64", "float8_e4m3fn")
    holds = {
        kept: {kind for kind in kinds if replace(made, dtype=kept, source_dtypes=["int64", kind]).exact}
        for kept in kinds[:3]
    }
    assert holds == {
        "bfloat16": {"bfloat16", "float8_e4m3fn"},
        "float16": {"float16", "float8_e4m3fn"},
        "float32": set(kinds) - {"float64"},
    }


def test_another_dtype_of_rounded_weights_is_refused(make):
    source, folder = make(tp=1, dtype="bfloat16")
    assert_same(load(folder, dtype="bfloat16"), load(source, dtype="bfloat16"))
    for settings in (dict(dtype="float32"), dict(quantization="int8")):
        ((name, value),) = settings.items()
        with pytest.raises(ConfigError) as error:
            load(folder, **settings)
        for text in (f"{name} is {value!r}", "of float32 to bfloat16", f"--{name} {value}", str(folder)):
            assert text in str(error.value)


def test_zeroes_and_what_is_not_finite_are_kept(tmp_path):
    source = write(tmp_path / "source")
    content = shaped(CONFIG | {"architectures": ["LlamaForCausalLM"]})
    content["model.norm.weight"][:] = 0
    content["lm_head.weight"][:] = 0
    content["model.embed_tokens.weight"][3] = np.nan
    content["model.embed_tokens.weight"][4] = np.inf
    save_file(content, source / "model.safetensors")
    convert.convert(source, tmp_path / "out", make_mesh(2), progress=False)
    assert_same(load(tmp_path / "out", 2), load(source, 2))


def test_what_lies_beside_the_weights_is_taken_over(tmp_path):
    source = write(tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("x")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("y")
    (source / "code.py").write_text("raise SystemExit")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    manifest = convert.convert(source, tmp_path / "out", make_mesh(), progress=False)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted(
        ["config.json", "tokenizer.json", "chat_template.jinja", "additional_chat_templates", NAME, "weights"]
    )
    assert (tmp_path / "out" / "additional_chat_templates" / "tool.jinja").read_text() == "y"
    assert Manifest.read(tmp_path / "out") == manifest
    assert list(tmp_path.glob(".*")) == []


def test_the_fingerprint_follows_names_and_numbers(tmp_path):
    source = write(tmp_path / "source")

    def of(name: str) -> str:
        return convert.convert(source, tmp_path / name, make_mesh(), progress=False).source_fingerprint

    first = of("a")
    content = shaped(CONFIG | {"architectures": ["LlamaForCausalLM"]})
    save_file(content, source / "model.safetensors", metadata={"format": "pt"})
    assert of("b") == first
    content["model.norm.weight"][0] += 1
    save_file(content, source / "model.safetensors")
    assert of("c") != first


def refused(folder: Path, *named: str, tp: int = 2) -> None:
    with pytest.raises(CheckpointError) as error:
        load(folder, tp)
    for text in named:
        assert text in str(error.value)


def largest(folder: Path) -> Path:
    return max(
        (path for path in (folder / "weights").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )


def test_every_file_that_is_missing_or_cut_is_named(copy):
    files = [path for path in sorted((copy / "weights").rglob("*")) if path.is_file()]
    for path in (*files[:5], largest(copy)):
        kept = path.read_bytes()
        path.unlink()
        refused(copy, str(path), "is missing", "scripts/convert.py")
        if kept:
            path.write_bytes(kept[:-1])
            refused(copy, str(path), f"expected {len(kept)} bytes, found {len(kept) - 1}")
        path.write_bytes(kept)
    load(copy, 2)


def test_a_changed_file_is_named(copy):
    path = copy / "weights" / "state" / "_METADATA"
    path.write_bytes(path.read_bytes().replace(b"norm", b"form", 1))
    refused(copy, str(path), "changed or damaged")


def test_a_large_file_is_held_against_its_digest_when_that_is_asked_for(copy, monkeypatch):
    monkeypatch.setattr("jaxinfer.checkpoint.manifest.SMALL_BYTES", 0)
    path = largest(copy)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    manifest = Manifest.read(copy)
    manifest.check_files(copy)
    with pytest.raises(CheckpointError, match=re.escape(f"{path} was changed or damaged")):
        manifest.check_files(copy, contents=True)


def edit(folder: Path, change: Callable[[dict], None], *, sign: bool = False) -> None:
    """Modify a manifest; `sign` also updates its digest."""
    body = json.loads((folder / NAME).read_text())
    change(body)
    if sign:
        body.pop("digest")
        body["digest"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / NAME).write_text(json.dumps(body))


def test_int8_of_other_blocks_or_of_none_is_refused(make, tmp_path):
    """What an older jaxinfer wrote says nothing of blocks, and was not rotated."""
    path = "layers.0.mlp.gate_up.weight"
    for change in (lambda stored: stored.update(block=2), lambda stored: stored.pop("block")):
        folder = shutil.copytree(make(tp=2, quantization="int8")[1], tmp_path / "copy", dirs_exist_ok=True)
        edit(folder, lambda body: change(body["parameters"][path]), sign=True)  # noqa: B023
        with pytest.raises(
            CheckpointError, match=f"keeps '{path}' in int8 with [12] columns per rotated block, this model needs 32"
        ):
            load(folder, 2)


@pytest.mark.parametrize(
    ("change", "sign", "message"),
    [
        (lambda body: body.update(tensor_parallel_size=4), False, "was changed after the conversion"),
        (lambda body: body.pop("digest"), False, "was changed after the conversion"),
        (lambda body: body.update(version=VERSION + 1), False, f"format version {VERSION + 1}.*reads up to {VERSION}"),
        (lambda body: body.update(version="1"), True, "is not the manifest"),
        (lambda body: body.update(format="other"), True, "is not the manifest"),
        (lambda body: body.pop("dtype"), True, "lacks or misstates a field.*dtype"),
        (lambda body: body.update(extra=1), True, "lacks or misstates a field.*extra"),
        (lambda body: body.update(parameters=[]), True, "lacks or misstates a field"),
        (lambda body: body["parameters"].pop("norm.scale"), True, "lacks 1 tensor.*'model.norm.weight'"),
        (lambda body: body["files"].update({"../../x": [1, ""]}), True, "'../../x', which lies outside"),
        (lambda body: body["files"].update({"/x": [1, ""]}), True, "'/x', which lies outside"),
    ],
)
def test_a_changed_manifest_is_refused(copy, change, sign, message):
    edit(copy, change, sign=sign)
    with pytest.raises(CheckpointError, match=message) as error:
        load(copy, 2)
    assert str(copy) in str(error.value) or "tensor" in str(error.value)


def test_rows_lie_where_the_manifest_says(copy):
    """The order of a fused weight's outputs may change between releases, which the shape does not show."""

    def swap(body: dict) -> None:
        for path, stored in body["parameters"].items():
            if path.endswith("gate_up.weight"):
                stored["rows"] = {"gate": stored["rows"]["up"], "up": stored["rows"]["gate"]}

    before, path = load(copy, 2), "layers.1.mlp.gate_up.weight"
    edit(copy, swap, sign=True)
    after = load(copy, 2)
    gate, up = np.split(np.asarray(before[path].get_value()), 2, axis=1)
    np.testing.assert_array_equal(after[path].get_value(), np.concatenate([up, gate], axis=1))
    assert_same(
        {name: after[name] for name in after if "gate_up" not in name},
        {name: before[name] for name in before if "gate_up" not in name},
    )


def test_a_manifest_that_is_no_json_or_not_there(copy):
    (copy / NAME).write_text('{"format": "jaxi')
    refused(copy, f"{copy / NAME} is not usable JSON")
    (copy / NAME).unlink()
    refused(copy, f"{copy / NAME} is missing", "did not finish")


def test_a_configuration_that_does_not_fit_the_weights(copy):
    path = copy / "config.json"
    before = json.loads(path.read_text())
    for changes, named in (
        (dict(num_hidden_layers=1), "parameter(s) that the model of its config.json does not have"),
        (dict(num_hidden_layers=3), "'model.layers.2."),
        (dict(hidden_size=64), "expected shape [97, 64], found [97, 32]"),
    ):
        path.write_text(json.dumps(before | changes))
        refused(copy, named)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # raised by TensorStore after its error
def test_what_orbax_says_is_said_in_one_line(copy, monkeypatch):
    import orbax.checkpoint.experimental.v1 as ocp

    monkeypatch.setattr(Manifest, "check_files", lambda *_, **__: None)
    largest(copy).unlink()
    refused(copy, f"{copy / 'weights'} cannot be read: ")

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(ocp, "load", full)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):  # handled by `LLM`
        load(copy, 2)


def test_what_is_there_is_not_overwritten(make, tmp_path):
    source, folder = make()
    for out in (folder, source):
        with pytest.raises(CheckpointError, match="exists already"):
            convert.convert(source, out, make_mesh(), progress=False)
    with pytest.raises(CheckpointError, match="is a converted checkpoint already"):
        convert.convert(folder, tmp_path / "out", make_mesh(), progress=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / ".empty.partial").mkdir()
    (tmp_path / ".empty.partial" / "left.json").write_text("of one that was interrupted")
    convert.convert(source, tmp_path / "empty", make_mesh(), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"] and not (tmp_path / "empty" / "left.json").exists()
    assert_same(load(tmp_path / "empty"), load(source))


def test_two_conversions_to_one_folder(make, tmp_path, monkeypatch):
    source, _ = make()

    copy_others = convert._copy_others

    def second(*given: Path) -> None:
        monkeypatch.setattr(convert, "_copy_others", copy_others)
        with pytest.raises(CheckpointError, match="is being written by another conversion"):
            convert.convert(source, tmp_path / "out", make_mesh(), progress=False)
        copy_others(*given)

    monkeypatch.setattr(convert, "_copy_others", second)
    convert.convert(source, tmp_path / "out", make_mesh(), progress=False)
    assert_same(load(tmp_path / "out"), load(source))


def test_a_failed_conversion_leaves_nothing(make, tmp_path, monkeypatch):
    source, _ = make()
    (tmp_path / ".out.partial" / "weights.partial_save").mkdir(parents=True)  # left by an interrupted conversion
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(CheckpointError, match="1 bytes free, but the weights need [0-9]+; free space"):
        convert.convert(source, tmp_path / "out", make_mesh(), progress=False)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", fails)
    with pytest.raises(CheckpointError, match="out cannot be written: No space left on device"):
        convert.convert(source, tmp_path / "out", make_mesh(), progress=False)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="does not divide"):
        convert.convert(source, tmp_path / "out", make_mesh(3), progress=False)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from jaxinfer.checkpoint import orbax
from jaxinfer.checkpoint.manifest import Manifest
from jaxinfer.loading import convert
from jaxinfer.sharding import make_mesh

def dies_in(owner, name, calls=1, after=False):
    method, left = getattr(owner, name), [calls]
    def called(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0 and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        made = method(*args, **kwargs)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return made
    setattr(owner, name, called)

def dies_with(name):  # before the next change of a file after this folder was made
    folder = Path(sys.argv[2]) / f".{point}.partial" / name
    events = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir")
    sys.addaudithook(lambda event, _: event in events and folder.exists() and os.kill(os.getpid(), signal.SIGKILL))

POINTS = {
    "before": lambda: dies_in(orbax, "save"),
    "between": lambda: dies_in(orbax, "save", 3),
    "written": lambda: dies_in(orbax, "finalize"),
    "merging": lambda: dies_with("weights.partial_save/state"),
    "finalized": lambda: dies_in(orbax, "finalize", after=True),
    "copied": lambda: dies_in(convert, "_copy_others", after=True),
    "manifest": lambda: dies_in(Manifest, "write"),
}
for point, patch in POINTS.items():
    child = os.fork()  # before JAX has started anything
    if child == 0:
        patch()
        convert.convert(Path(sys.argv[1]), Path(sys.argv[2]) / point, make_mesh(1), progress=False)
        os._exit(0)
    print(point, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Program that runs conversions and kills each at a different point."""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_conversion_leaves_nothing_that_loads_and_the_next_one_works(tmp_path):
    source = write(tmp_path / "source")
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=ROOT)
    points = dict(line.split() for line in done.stdout.splitlines())
    assert len(points) == 7, done.stderr
    for point, status in points.items():
        assert int(status) == -signal.SIGKILL, (point, status, done.stderr)
        assert not (tmp_path / "out" / point).exists()
        left = tmp_path / "out" / f".{point}.partial"
        assert left.is_dir()
        with pytest.raises(CheckpointError):
            load(left)
    for point in ("between", "merging", "manifest"):
        convert.convert(source, tmp_path / "out" / point, make_mesh(), progress=False)
        assert_same(load(tmp_path / "out" / point), load(source))
    assert not list((tmp_path / "out").glob(".between*"))


PEAK = """
import json, sys
from pathlib import Path
from jaxinfer.loading import convert, weights
from jaxinfer.sharding import make_mesh

def status(name):
    return int(next(l for l in open("/proc/self/status") if l.startswith(name)).split()[1]) * 1024

def peak(work):
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    made = work()
    return status("VmHWM") - before

tiny, large, out, mesh = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), make_mesh(2)
for source, name in ((tiny, "tiny"), (large, "large")):
    for kind in (None, "int8"):
        target = out / f"{name}-{kind}"
        writing = peak(lambda: convert.convert(source, target, mesh, quantization=kind, progress=False))
        reading = peak(lambda: weights.load(target, mesh, dtype="bfloat16", progress=False))
        print(json.dumps([name, kind, writing, reading]), flush=True)
"""
"""Program that converts a tiny checkpoint first, to import all modules, then measures the growth of resident memory
with a large one."""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs /proc")
def test_conversion_takes_less_memory_than_three_times_the_largest_tensor(tmp_path):
    """Restoring needs little more memory than the weights."""
    tiny = write(tmp_path / "tiny", stored=ml_dtypes.bfloat16)
    large = write(
        tmp_path / "large",
        stored=ml_dtypes.bfloat16,
        hidden_size=1024,
        intermediate_size=4096,
        vocab_size=65536,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        num_hidden_layers=16,
    )
    command = [sys.executable, "-c", PEAK, *map(str, (tiny, large, tmp_path / "out"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    tensor = 65536 * 1024 * 2
    for name, kind, writing, reading in map(json.loads, done.stdout.splitlines()[2:]):
        stored = Manifest.read(tmp_path / "out" / f"{name}-{kind}").parameters.values()
        weights = sum(int(np.prod(p.shape)) * np.dtype(p.dtype).itemsize for p in stored)
        assert weights > 3 * tensor
        assert writing < 3 * tensor, (kind, writing / tensor)
        assert reading < weights + 3 * orbax.GROUP_BYTES < 2 * weights, (kind, reading / weights)


@pytest.fixture
def command(monkeypatch):
    """Return `main` of scripts/convert.py, with JAX's devices already set up."""
    for name in ("JAX_PLATFORMS", "XLA_FLAGS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    return scripts.load("convert").main


def test_the_command_converts_and_verifies(command, make, tmp_path, capsys):
    source, _ = make()
    out = tmp_path / "out"
    arguments = ["--model", str(source), "--out", str(out), "--tensor-parallel-size", "2", "--quantization", "int8"]
    assert command([*arguments, "--placement", "layers.0.attention=replicate", "*.mlp=shard"]) == 0
    assert "int8 and float32, 2 shards" in capsys.readouterr().out
    assert Manifest.read(out).placement == {"layers.0.attention": "replicate", "*.mlp": "shard"}
    assert command(["--verify", str(out)]) == 0
    assert "as it was written" in capsys.readouterr().out
    path = largest(out)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert command(["--verify", str(out)]) == 2
    assert str(path) in capsys.readouterr().err
    assert command(arguments) == 2
    assert capsys.readouterr().err == f"error: {out} exists already; choose another folder, or remove it.\n"
    assert command(["--verify", str(source)]) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--model", "x"],
        ["--out", "x"],
        ["--verify", "x", "--model", "y", "--out", "z"],
        ["--model", "x", "--out", "y", "--placement", "a"],
        ["--model", "x", "--out", "y", "--tensor-parallel-size", "0"],
    ],
)
def test_the_command_refuses_what_makes_no_sense(command, arguments):
    with pytest.raises(SystemExit) as stopped:
        command(arguments)
    assert stopped.value.code == 2
