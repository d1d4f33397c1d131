"""A model over several devices gives the same as on one: the same checkpoint, read for each mesh and placement."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from support import checkpoint
from support.cases import EDGES, GREEDY, mixed, requests
from support.tiny import ARCHITECTURES, CONFIG, make_engine, make_request, prompt, run, shapes

from jaxinfer.checkpoint import rules
from jaxinfer.checkpoint.rules import parameters
from jaxinfer.checkpoint.safetensors import SafetensorsReader
from jaxinfer.engine.request import Request
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.functional import split
from jaxinfer.loading import weights
from jaxinfer.media.inputs import Features
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.sharding import axes, make_mesh

pytestmark = [pytest.mark.xdist_group("sharded"), pytest.mark.slow]

Sharded = Callable[..., Runner]

PLACEMENTS = {
    "attention replicated": {"*.attention": "replicate"},
    "mlp replicated": {"*.mlp": "replicate"},
    "ends replicated": {"embedding": "replicate", "head": "replicate"},
    "all replicated": {"*": "replicate"},
    "one layer replicated": {"layers.0": "replicate"},
    "only mlp sharded": {"layers": "replicate", "*.mlp": "shard"},
}


def everything() -> list[Request]:
    """Greedy and seeded requests with lengths at block and chunk ends, and one that forks."""
    fork = SamplingParams(temperature=0.3, seed=5, n=3, max_tokens=10)
    return [*mixed(EDGES), make_request("fork", prompt(18, 50), fork)]


def greedy() -> list[Request]:
    """Greedy requests, for models that differ from Llama only in their layers: sampling is the same."""
    return requests(EDGES, GREEDY)


def check(found: Runner, single: Runner, wanted: Callable[[], list[Request]] = everything, **host: Any) -> None:
    """Assert that all tokens are equal."""
    assert run(make_engine(found, **host), wanted()) == run(make_engine(single), wanted())


def test_the_checkpoint_read_for_one_device_holds_the_weights_written(sharded: Sharded):
    """Two meshes that agree could both be wrong."""
    hf = checkpoint.CONFIG | CONFIG | dict(architectures=["LlamaForCausalLM"], num_attention_heads=8)
    made = parameters(weights.random(hf, make_mesh(1), dtype="float32"))
    read = parameters(sharded().program.module(sharded().params))
    assert made.keys() == read.keys()
    for path in made:
        np.testing.assert_array_equal(made[path][...], read[path][...])


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_sharded_is_single(sharded: Sharded, tp: int):
    check(sharded("llama", tp), sharded())


MORE = {"olmo3": (2, 8), "gpt_oss": (2, 8), "kimi_linear": (2, 4), "qwen3_moe": (2, 8)}
"""Families that represent a kind of layer: norms over all heads, sinks, states, experts. Llama is tested on 2, 4 and
8.
"""


@pytest.mark.parametrize(
    ("family", "tp"), [(family, tp) for family in ARCHITECTURES if family != "llama" for tp in MORE.get(family, (2,))]
)
def test_every_family_sharded_is_single(sharded: Sharded, family: str, tp: int):
    check(sharded(family, tp), sharded(family), greedy)


@pytest.mark.parametrize(
    ("family", "tp", "placement"),
    [
        ("mixtral", 2, "experts"),
        ("qwen3_moe", 2, "experts"),
        ("qwen3_moe", 8, "experts"),
        ("qwen3_moe", 4, "replicate"),
    ],
)
def test_other_expert_placements_equal_single(sharded: Sharded, family: str, tp: int, placement: str):
    """Whole experts on each device, or all of them on every device."""
    check(sharded(family, tp, {"*.mlp": placement}), sharded(family), greedy)


@pytest.mark.parametrize("tp", [2, 8])
def test_sharded_is_single_with_few_blocks_and_short_chunks(sharded: Sharded, tp: int):
    check(sharded("llama", tp), sharded(), pool_blocks=13, budget=7)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_each_placement_is_single(sharded: Sharded, name: str):
    check(sharded("llama", 4, PLACEMENTS[name]), sharded(), greedy)


def zero_heads(runner: Runner) -> int:
    """Number of query heads whose rows are all zero, in the first layer."""
    weight = parameters(runner.program.module(runner.params))["layers.0.attention.qkv.weight"]
    layout = runner.program.module(runner.params).layers[0].attention.layout
    queries = np.asarray(weight[...])[:, : layout.stored_heads // weight.shape[0] * 16]
    return int((queries.reshape(layout.stored_heads, -1) == 0).all(axis=1).sum())


# Larger groups (14 around 2 as in Qwen2-0.5B), added kv heads, both, no groups at all (25 as in InternViT-6B).
@pytest.mark.parametrize(
    ("family", "heads", "kv_heads", "tp", "added"),
    [
        ("llama", 6, 3, 4, 2),
        ("qwen2", 14, 2, 8, 2),
        ("qwen3", 9, 3, 8, 7),
        ("llama", 5, 5, 4, 3),
        ("olmo3", 6, 2, 4, 2),
        ("gpt_oss", 6, 2, 4, 2),
    ],
)
def test_zero_heads_do_not_change_tokens(sharded: Sharded, family: str, heads: int, kv_heads: int, tp: int, added: int):
    sizes = dict(num_attention_heads=heads, num_key_value_heads=kv_heads)
    padded = sharded(family, tp, pad_heads=True, **sizes)
    assert zero_heads(padded) == added
    check(padded, sharded(family, **sizes), greedy)


def test_a_decoder_beside_a_vision_tower_has_a_copy_on_each_device_of_the_axis_data(sharded: Sharded, tmp_path: Path):
    hf = CONFIG | dict(architectures=["LlamaForCausalLM"], num_attention_heads=8)
    folder = checkpoint.write(tmp_path, hf, with_tokenizer=False)
    mesh = jax.make_mesh((2, 2), (axes.DATA, axes.MODEL), axis_types=(AxisType.Auto,) * 2)
    model_family, config = weights.parse(hf)
    seeing = replace(config, features=Features("image", (3, 8, 8), rows=4, placeholder=-1))
    module = weights.abstract(model_family, seeing, np.dtype("float32"), mesh)
    module.config = config  # the decoder alone
    with SafetensorsReader(folder) as reader:
        rules.load(module, model_family.weight_rules(config), reader, mesh, progress=False)
    runner = Runner(*split(module, mesh), shapes())
    assert {len(param.sharding.device_set) for param in runner.params} == {4}
    check(runner, sharded(), greedy)


def test_padding_that_nothing_needs_adds_nothing(sharded: Sharded):
    padded = sharded("llama", 4, pad_heads=True)
    assert [a.shape for a in padded.params] == [a.shape for a in sharded("llama", 4).params]
