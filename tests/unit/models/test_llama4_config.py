"""Parsing of Llama 4's config.json: which layers have chunks, rope and experts."""

from typing import Any

import numpy as np
import pytest
from support.families import published
from support.tiny import config

from jaxinfer.checkpoint.hf import apply_overrides
from jaxinfer.errors import ConfigError
from jaxinfer.kv.groups import layout
from jaxinfer.layers.attention import Growth
from jaxinfer.loading import weights
from jaxinfer.models.llama4 import Llama4Config
from jaxinfer.sharding import make_mesh, plan

SCOUT, MAVERICK, TEXT = (published()[f"llama4-{name}"] for name in ("scout", "maverick", "text"))


def parsed(hf: dict[str, Any], **changes: Any) -> Llama4Config:
    return weights.parse(apply_overrides(hf, changes))[1]


def test_published_models():
    found = parsed(SCOUT)
    chunked, full = found.attention_of(0), found.attention_of(3)
    assert (chunked.window, chunked.scoring.chunked, chunked.query_growth) == (8192, True, None)
    assert (full.window, full.scoring.chunked) == (None, False)
    assert full.query_growth == Growth(0.1, 8192, ahead=1, wide=True)
    assert chunked.interleaved and chunked.rotated_norm == full.rotated_norm == 1e-5
    assert (
        found.nope_layers == tuple(range(3, 48, 4)) and found.rope_of(3) is None and found.rope_of(0).kind == "llama3"
    )
    assert (found.dense_layers, found.moe.experts, found.moe.ffn, found.moe.shared) == ((), 16, 8192, 8192)
    assert found.max_length == 10_485_760 and found == parsed(TEXT), "the same model without its tower"
    other = parsed(MAVERICK)
    assert other.dense_layers == tuple(range(0, 48, 2)) and other.ffn_of(0) == 16_384 and other.moe.experts == 128
    assert other.attention_of(0).rotated_norm is None and other.rope_of(0).kind == "default"
    # 109 and 400 billion parameters with their towers.
    assert [plan(hf, tensor_parallel_size=8).checkpoint_bytes for hf in (SCOUT, MAVERICK)] == [
        215_539_722_240,
        801_423_697_920,
    ]


def test_options():
    tiny = config("llama4")
    assert parsed(tiny, attn_temperature_tuning=0).growth is None
    assert parsed(tiny, no_rope_layers=[], no_rope_layer_interval=2).nope_layers == (1,)
    assert parsed(tiny, moe_layers=[]).moe is None
    assert parsed(tiny, moe_layers=[0, 2]).dense_layers == (1,)
    # Without chunks all layers are full, and those with rope keep it.
    whole = parsed(tiny | {"attention_chunk_size": None})
    assert {whole.attention_of(layer).window for layer in range(3)} == {None} and whole.nope_layers == (1,)


def test_layers_with_chunks_have_a_cache_of_their_own_kind():
    family, found = weights.parse(config("llama4"))
    module = weights.abstract(family, found, np.dtype("float32"), make_mesh(1))
    kinds = layout(tuple(module.cache_specs())).kinds
    assert {(kind.kind.name, kind.count) for kind in kinds} == {("chunked(6)", 2), ("full", 1)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["sliding_attention"] * 3}, r"layer_types\[0\].*'full_attention' or 'chunked_attention'"),
        ({"attention_chunk_size": None, "layer_types": ["chunked_attention"] * 3}, "attention_chunk_size is null"),
        ({"attention_chunk_size": 0}, "attention_chunk_size=0 must be a whole number from 1"),
        ({"no_rope_layers": [1, 0]}, r"no_rope_layers is \[1, 0\].*num_hidden_layers = 3"),
        ({"moe_layers": [3]}, r"moe_layers is \[3\].*from 0 to 2"),
        ({"attn_temperature_tuning": "yes"}, "attn_temperature_tuning is 'yes'"),
        ({"floor_scale": 0}, "floor_scale=0"),
        ({"num_experts_per_tok": 7}, "7 experts per token"),
    ],
)
def test_bad_values_are_named(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        parsed(config("llama4") | changes)
