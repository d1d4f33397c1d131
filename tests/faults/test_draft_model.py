"""Draft models that do not suit are refused before any weight is read; memory is what the plan says."""

import json

import pytest
from safetensors.numpy import save_file
from support import tiny
from support.checkpoint import CONFIG, shaped, tokenizer
from support.plans import EVERY

from jaxinfer import LLM
from jaxinfer.config import EngineConfig
from jaxinfer.distributed.group import Group
from jaxinfer.engine.sizing.setup import build_engine
from jaxinfer.errors import CheckpointError, ConfigError
from jaxinfer.loading import weights
from jaxinfer.loading.draft import DraftCheckpoint
from jaxinfer.sharding import make_mesh, plan

pytestmark = pytest.mark.xdist_group("llama")


def folder(path, hf=CONFIG, *, tensors=False, tokens=None):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(dict(hf)))
    if tensors:
        save_file(shaped(hf), path / "model.safetensors")
    if tokens is not None:
        tokens.save_pretrained(path)
    return path


def drafting(path, **fields):
    return {"method": "draft_model", "model": str(path)} | fields


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (
            CONFIG | {"vocab_size": CONFIG["vocab_size"] + 8},
            r"its vocab_size is \d+, and the served model has \d+ token ids; choose",
        ),
        (tiny.config("lfm2"), "it has layers of kind recurrent, and a draft model's layers must all have full"),
        (tiny.CONFIG | tiny.HYBRIDS["alternating"], r"it has layers of kind sliding\(10\)"),
        (EVERY["bart"], "it has an encoder"),
        (CONFIG | {"architectures": ["NoneSuch"]}, "NoneSuch"),
    ],
    ids=["vocabulary", "recurrent", "sliding", "encoder", "unknown"],
)
def test_models_that_cannot_draft(tmp_path, hf, message):
    target, draft = folder(tmp_path / "target"), folder(tmp_path / "draft", hf)
    with pytest.raises(ConfigError, match=rf"speculative_config: draft model '.*draft': .*{message}"):
        LLM(target, skip_tokenizer_init=True, speculative_config=drafting(draft), use_tqdm=False)


def test_a_folder_that_is_none(tmp_path):
    target = folder(tmp_path / "target")
    with pytest.raises(CheckpointError, match="speculative_config: draft model '.*none'"):
        LLM(target, skip_tokenizer_init=True, speculative_config=drafting(tmp_path / "none"), use_tqdm=False)


def test_tokenizers_decide_where_embeddings_are_padded(tmp_path):
    own, other = tokenizer(), tokenizer()
    other.add_tokens(["<more>"])
    target = folder(tmp_path / "target", tokens=own)
    differs = folder(tmp_path / "differs", tokens=other)
    with pytest.raises(
        ConfigError, match=r"its tokenizer has (\d+) tokens and differs from the served model's, .* \d+"
    ):
        LLM(target, speculative_config=drafting(differs), use_tqdm=False)
    config, mesh = EngineConfig.of({"speculative_config": drafting(tmp_path / "padded")}), make_mesh()
    folder(tmp_path / "padded", CONFIG | {"vocab_size": CONFIG["vocab_size"] + 8}, tokens=own)
    served = weights.parse(CONFIG)[1]
    DraftCheckpoint.find(config).check(served, own, config, mesh)
    config = EngineConfig.of(
        {"speculative_config": drafting(folder(tmp_path / "few", CONFIG | {"vocab_size": 64}, tokens=own))}
    )
    with pytest.raises(ConfigError, match="its vocab_size is 64, and the served"):
        DraftCheckpoint.find(config).check(served, own, config, mesh)


def test_several_processes_and_engines_without_the_model():
    config, mesh = EngineConfig.of({"speculative_config": drafting("DIR")}), make_mesh()
    with pytest.raises(ConfigError, match="not supported where several processes serve one model"):
        DraftCheckpoint.find(config, object.__new__(Group))
    with pytest.raises(ConfigError, match="a draft model and method 'draft_model' go together"):
        build_engine(tiny.random_runner().program.module(tiny.random_runner().params), config, mesh)


@pytest.mark.parametrize(
    ("target", "settings", "message"),
    [
        (tiny.CONFIG | tiny.HYBRIDS["all sliding"], {}, "a draft model for one whose layers all have sliding windows"),
        (tiny.config("lfm2"), {}, "a model with recurrent layers"),
        (tiny.config("llama"), {"deterministic": True}, "deterministic=True"),
        (tiny.config("llama"), {"cache": "contiguous"}, "cache='contiguous'"),
    ],
    ids=["all sliding", "recurrent", "deterministic", "contiguous"],
)
def test_engines_that_do_not_verify(target, settings, message):
    mesh = make_mesh()
    config = EngineConfig.of(settings | {"speculative_config": drafting("DIR"), "max_num_seqs": 2})
    draft = weights.random(tiny.config("llama"), mesh)
    with pytest.raises(ConfigError, match=f"speculative_config does not support {message}"):
        build_engine(weights.random(target, mesh), config, mesh, draft=draft)


@pytest.mark.parametrize("tp", [1, 2])
def test_memory_is_that_of_the_plan(tmp_path, tp):
    """Weights and blocks of both models, also where a model has several groups of layers."""
    several = tiny.CONFIG | tiny.HYBRIDS["five to one"]
    target = folder(tmp_path / "target", several | {"vocab_size": 300}, tensors=True)
    draft = folder(
        tmp_path / "draft",
        tiny.CONFIG | {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "vocab_size": 300},
        tensors=True,
    )
    settings = {"tensor_parallel_size": tp, "speculative_config": drafting(draft), "kv_cache_dtype": "auto"}
    made = plan(target, memory=1 << 26, **settings)
    with LLM(target, skip_tokenizer_init=True, use_tqdm=False, max_num_seqs=2, **settings) as llm:
        runner, use = llm._engine.runner, llm.memory
        assert use.weights == made.device_bytes + made.draft_bytes
        groups = runner.program.layout.groups
        assert use.cache == runner.shapes.num_blocks * made.cache.block_device_bytes / groups
        arrays = [*runner.cache, *runner.draft_cache]
        held = sum(
            leaf.addressable_shards[0].data.nbytes for layer in arrays if layer for leaf in layer if leaf is not None
        )
        assert held == use.cache
    assert made.draft_bytes > 0 and made.tokens < plan(target, memory=1 << 26, tensor_parallel_size=tp).tokens
    assert made.as_dict()["draft_bytes"] == made.draft_bytes and "draft model" in made._repr_html_()
