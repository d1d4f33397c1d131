"""Parsing of Gemma 4's config.json: which layers share what, and the layout of their cache."""

from typing import Any

import pytest
from support.families import FULL, SLIDING, published
from support.tiny import config

from jaxinfer.checkpoint.hf import apply_overrides
from jaxinfer.errors import ConfigError
from jaxinfer.loading import weights
from jaxinfer.models.gemma4 import Gemma4Config
from jaxinfer.sharding import plan

E2B, LARGE, SPARSE = (published()[f"gemma4-{name}"] for name in ("e2b", "31b", "26b-a4b"))


def parsed(hf: dict[str, Any], **changes: Any) -> Gemma4Config:
    return weights.parse(apply_overrides(hf, changes))[1]


def tiny(**changes: Any) -> Gemma4Config:
    return parsed(config("gemma4"), **changes)


def test_e2b():
    found = parsed(E2B)
    full, local = found.attention_of(4), found.attention_of(0)
    assert (full.head_dim, full.kv_heads, full.window) == (512, 1, None)
    assert (local.head_dim, local.kv_heads, local.window) == (256, 1, 512)
    assert full.scoring.scale == local.scoring.scale == 1.0 and full.value_norm and local.value_norm
    assert [i for i in range(35) if found.attention_of(i).lends] == [13, 14], "the last layer of each kind"
    assert {i: found.lender_of(i) for i in (14, 15, 18, 19, 34)} == {14: None, 15: 13, 18: 13, 19: 14, 34: 14}
    assert (found.ffn_of(14), found.ffn_of(15)) == (6144, 12_288)
    assert (found.input_width, found.input_vocab, found.experts, found.logit_softcap) == (256, 262_144, None, 30.0)
    assert (found.rope.kind, found.rope.turning, found.rope.head_dim, found.local_rope.head_dim) == (
        "proportional",
        64,
        512,
        256,
    )
    assert found == parsed(published()["gemma4-text"]), "the same model without its towers"


def test_large():
    found = parsed(LARGE)
    assert found.attention.keys_are_values and not found.local_attention.keys_are_values
    assert (found.attention.kv_heads, found.local_attention.kv_heads, found.query_group) == (4, 16, 2)
    assert (found.input_width, found.lent_layers, found.max_length) == (0, 0, 262_144)
    moe = parsed(SPARSE).experts
    assert (moe.experts, moe.per_token, moe.ffn, moe.router.input_norm, moe.router.expert_scale) == (
        128,
        8,
        704,
        1e-6,
        True,
    )


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize(("hf", "layers"), [(E2B, 15), (LARGE, 60), (SPARSE, 30)], ids=["E2B", "31B", "26B-A4B"])
def test_a_block_has_no_room_that_no_layer_uses(hf: dict[str, Any], layers: int, tp: int):
    """Of narrower layers as many lie in an array as fill it; layers that borrow take nothing."""
    made = plan(hf, tensor_parallel_size=tp, block_size=16).cache
    assert sum(layer.block_device_bytes > 0 for layer in made.layers) == layers
    used = sum(layer.block_device_bytes for layer in made.layers)
    assert used <= made.block_device_bytes < 1.04 * used


def test_a_file_that_transformers_wrote_has_the_shape_of_full_layers_by_number():
    shape = {"head_dim": 64, "num_key_value_heads": 2}
    nothing = dict(global_head_dim=None, num_global_key_value_heads=None)
    assert tiny(per_layer_config={"2": shape, "4": shape}, **nothing) == tiny()
    without = tiny(per_layer_config={"2": {"head_dim": 64}, "4": {"head_dim": 64}}, **nothing)
    assert (without.attention.kv_heads, without.attention.head_dim) == (4, 64)
    heads = tiny(per_layer_config={"2": {"num_key_value_heads": 2}, "4": {"num_key_value_heads": 2}}, **nothing)
    assert (heads.attention.kv_heads, heads.attention.head_dim) == (2, 16)
    same = tiny(per_layer_config={}, **nothing)
    assert (same.attention.kv_heads, same.attention.head_dim) == (4, 16)


def test_numbers_of_layers_are_padded_with_zeros_where_there_are_ten_or_more():
    kinds, shape = [SLIDING, SLIDING, FULL] * 4, {"head_dim": 64, "num_key_value_heads": 2}
    each = {f"{number:02}": shape for number in (2, 5, 8, 11)}
    made = tiny(num_hidden_layers=12, layer_types=kinds, per_layer_config=each)
    assert (made.attention.kv_heads, made.attention.head_dim) == (2, 64)


def test_the_last_layer_is_full():
    assert tiny(layer_types=[SLIDING, SLIDING, FULL, SLIDING, SLIDING]).kinds[-1] == FULL
    assert parsed(LARGE, text_config={**LARGE["text_config"], "layer_types": None}).kinds == parsed(LARGE).kinds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_shared_layers": 3}, "num_kv_shared_layers=3 leaves 2 of 5 layers.*none is full_attention"),
        ({"num_kv_shared_layers": 5}, "num_kv_shared_layers=5 leaves 0 of 5 layers"),
        ({"num_kv_shared_layers": 9}, "num_kv_shared_layers=9 leaves 0 of 5 layers"),
        ({"vocab_size_per_layer_input": 90}, "vocab_size_per_layer_input=90 is below vocab_size=97"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ({"num_global_key_value_heads": 3}, "num_attention_heads is 4.*kv heads of full layers = 3"),
        ({"per_layer_config": {"2": {"head_dim": 32}, "4": {"head_dim": 64}}}, "per_layer_config=.*each full layer"),
        ({"per_layer_config": {"2": {"head_dim": 32}}}, "per_layer_config=.*each full layer"),
        ({"per_layer_config": {"2": {"window": 3}, "4": {"window": 3}}}, "per_layer_config=.*each full layer"),
        ({"per_layer_config": [64]}, "per_layer_config="),
        ({"num_experts": None}, "num_experts"),
        ({"top_k_experts": 7}, "7 experts per token"),
        ({"rope_parameters": {FULL: {"rope_type": "default", "partial_rotary_factor": 0.5}}}, "rotates 32 of 64"),
        ({"what": 3}, "unknown attributes.*what=3"),
    ],
)
def test_what_cannot_be_computed_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)


def test_a_quantised_cache_has_a_scale_for_each_narrow_head():
    """Wide heads have room for several, and use one."""
    made = plan(config("gemma4"), kv_cache_dtype="int8", block_size=16, dtype="bfloat16").cache
    heads, columns = 2 * 4 + 2 * 4, 2 * 4 * 16 + 2 * 64  # of a position in a block of each of the two groups
    assert made.block_device_bytes == 2 * 16 * (columns + 2 * heads)
