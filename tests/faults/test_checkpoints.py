"""Checkpoints that do not fit, met through `LLM`; each part of reading is tested in unit/checkpoint."""

import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import checkpoint

from jaxinfer import LLM
from jaxinfer.checkpoint import hf
from jaxinfer.errors import CheckpointError, ConfigError
from jaxinfer.loading import load
from jaxinfer.loading.convert import convert
from jaxinfer.sharding import make_mesh

pytestmark = pytest.mark.xdist_group("faults")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def edit(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


NORM = "model.layers.1.input_layernorm.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(NORM), f"lacks 1 tensor.*{NORM}"),
        (lambda w: w.update(extra=np.zeros(3, np.float32)), "1 tensor.*does not know: 'extra'"),
        (
            lambda w: w.update({DOWN: np.zeros((48, 32), np.float32)}),
            rf"'{DOWN}': expected shape \[32, 48\], found \[48, 32\]",
        ),
    ],
)
def test_tensors_that_do_not_fit(copy, change, message):
    edit(copy, change)
    with pytest.raises(CheckpointError, match=message):
        LLM(copy, use_tqdm=False)


def test_a_truncated_file(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        LLM(copy, use_tqdm=False)


def test_an_index_that_names_an_absent_file(copy):
    index = {"weight_map": {NORM: "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="model-00002-of-00002.safetensors"):
        LLM(copy, use_tqdm=False)


def test_only_pickles(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=".bin"):
        LLM(copy, use_tqdm=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(architectures=["T5ForConditionalGeneration"]), "T5.*not supported; supported: .*LlamaForCausalLM"),
        (dict(hidden_size=0), "hidden_size"),
        (dict(num_hidden_layers=-1), "num_hidden_layers"),
        (dict(vocab_size=10**12), "vocab_size"),
        (dict(num_key_value_heads=3), "num_attention_heads is 4, which num_key_value_heads = 3 does not divide"),
        (dict(rope_scaling={"rope_type": "spiral", "factor": 2.0}), "spiral"),
        (dict(quantization_config={"quant_method": "gptq"}), "bits=None is not one of"),
        (dict(attn_logit_softcapping=50.0), "attn_logit_softcapping"),
    ],
)
def test_configurations_that_are_not_served(copy, fields, message):
    config(copy, **fields)
    with pytest.raises(ConfigError, match=message):
        LLM(copy, use_tqdm=False)


def test_heads_that_do_not_divide_over_devices(folder):
    with pytest.raises(ConfigError, match="(?s)4.*3|3.*4"):
        LLM(folder, tensor_parallel_size=3, use_tqdm=False)


def test_overrides_are_laid_over_the_configuration(folder):
    with pytest.raises(ConfigError, match="num_key_value_heads = 3"):
        LLM(folder, hf_overrides={"num_key_value_heads": 3}, use_tqdm=False)


def test_no_tokenizer(tmp_path):
    folder = checkpoint.write(tmp_path / "bare", with_tokenizer=False)
    with pytest.raises(CheckpointError, match="pass tokenizer=DIR .*, or skip_tokenizer_init=True"):
        LLM(folder, use_tqdm=False)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"max_model_len": 100_000}, ConfigError, "max_model_len is 100000, more than the"),
        ({"adapters": {"sql": "/nope"}}, CheckpointError, "adapter 'sql': '/nope': the file or directory does not"),
    ],
)
def test_what_cannot_be_served_is_refused_before_the_weights_are_read(folder, monkeypatch, settings, error, message):
    monkeypatch.setattr(load, "_load_weights", None)
    with pytest.raises(error, match=message):
        LLM(folder, **settings)


def test_a_tokenizer_fails_before_the_weights_are_read_and_config_json_is_read_once(copy, monkeypatch):
    reads, read = [], hf.read_json
    monkeypatch.setattr(hf, "read_json", lambda path: (reads.append(path.name), read(path))[1])
    (copy / "model.safetensors").unlink()
    tokenizer = (copy / "tokenizer.json").rename(copy / "kept")
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer.json"):
        LLM(copy, use_tqdm=False)
    tokenizer.rename(copy / "tokenizer.json")
    reads.clear()
    with pytest.raises(CheckpointError, match="has no model.safetensors"):
        LLM(copy, use_tqdm=False)
    assert reads.count("config.json") == 1


@pytest.fixture
def converted(folder, tmp_path):
    convert(folder, tmp_path / "converted", make_mesh(2), progress=False)
    return tmp_path / "converted"


def weights_of(folder):
    """The files of a converted folder's weights, the largest first."""
    files = (path for path in (folder / "weights").rglob("*") if path.is_file())
    return sorted(files, key=lambda path: path.stat().st_size, reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: weights_of(folder)[0].unlink(), "weights/.* is missing; copy the folder again"),
        (lambda folder: os.truncate(weights_of(folder)[0], 100), "weights/.*: expected [0-9]+ bytes, found 100"),
        (
            lambda folder: (folder / "weights/state/manifest.ocdbt").write_bytes(
                b"x" * (folder / "weights/state/manifest.ocdbt").stat().st_size
            ),
            "manifest.ocdbt was changed or damaged",
        ),
        (lambda folder: shutil.rmtree(folder / "weights"), "weights/.* is missing"),
        (lambda folder: (folder / "jaxinfer.json").unlink(), "jaxinfer.json is missing"),
        (
            lambda folder: (folder / "jaxinfer.json").write_text(
                (folder / "jaxinfer.json").read_text().replace('"tensor_parallel_size": 2', '"tensor_parallel_size": 4')
            ),
            "jaxinfer.json was changed after the conversion",
        ),
        (
            lambda folder: (folder / "jaxinfer.json").write_text('{"format": "jaxinfer", "version": 99}'),
            "jaxinfer.json has format version 99.*newer jaxinfer",
        ),
        (lambda folder: config(folder, num_hidden_layers=1), "holds 6 parameter.* layers.1"),
    ],
)
def test_converted_folders_that_were_spoilt(converted, spoil, message):
    spoil(converted)
    with pytest.raises(CheckpointError, match=message):
        LLM(converted, use_tqdm=False)


def test_a_converted_folder_that_was_rounded(folder, tmp_path):
    convert(folder, tmp_path / "rounded", make_mesh(), dtype="bfloat16", progress=False)
    with pytest.raises(ConfigError, match="dtype is 'float32', but .*rounded.*of float32 to bfloat16.*--dtype float32"):
        LLM(tmp_path / "rounded", dtype="float32", use_tqdm=False)
