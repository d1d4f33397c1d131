"""Parsing of Kimi-Linear's published config.json, inconsistent values, and incomplete groups of tensors."""

import json
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import checkpoint, tiny

from jaxinfer.checkpoint.hf import apply_overrides
from jaxinfer.errors import CheckpointError, ConfigError
from jaxinfer.kv.groups import layout
from jaxinfer.layers.kda import KdaSpec
from jaxinfer.layers.router import RouterConfig
from jaxinfer.loading import weights
from jaxinfer.models.decoder_config import FULL, LINEAR, DecoderConfig
from jaxinfer.sharding import make_mesh
from jaxinfer.sharding.policy import Placement

ATTENDING = [4, 8, 12, 16, 20, 24, 27]
KIMI_LINEAR: dict[str, Any] = dict(
    architectures=["KimiLinearForCausalLM"],
    model_type="kimi_linear",
    auto_map={
        "AutoConfig": "configuration_kimi.KimiLinearConfig",
        "AutoModel": "modeling_kimi.KimiLinearModel",
        "AutoModelForCausalLM": "modeling_kimi.KimiLinearForCausalLM",
    },
    bos_token_id=163584,
    dtype="bfloat16",
    eos_token_id=163586,
    first_k_dense_replace=1,
    head_dim=72,
    hidden_act="silu",
    hidden_size=2304,
    initializer_range=0.02,
    intermediate_size=9216,
    kv_lora_rank=512,
    linear_attn_config=dict(
        full_attn_layers=ATTENDING,
        head_dim=128,
        kda_layers=[i for i in range(1, 28) if i not in ATTENDING],
        num_heads=32,
        short_conv_kernel_size=4,
    ),
    mla_use_nope=True,
    model_max_length=1048576,
    moe_intermediate_size=1024,
    moe_layer_freq=1,
    moe_renormalize=True,
    moe_router_activation_func="sigmoid",
    num_attention_heads=32,
    num_expert_group=1,
    num_experts=256,
    num_experts_per_token=8,
    num_hidden_layers=27,
    num_key_value_heads=32,
    num_nextn_predict_layers=0,
    num_shared_experts=1,
    pad_token_id=163839,
    q_lora_rank=None,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    rms_norm_eps=1e-05,
    rope_scaling=None,
    rope_theta=10000.0,
    routed_scaling_factor=2.446,
    tie_word_embeddings=False,
    topk_group=1,
    transformers_version="4.56.2",
    use_cache=True,
    use_grouped_topk=True,
    v_head_dim=128,
    vocab_size=163840,
)


def parsed(**changes: Any) -> DecoderConfig:
    return weights.parse(apply_overrides(KIMI_LINEAR, changes))[1]


def abstract(tp: int, placement: dict[str, str] | None = None, **changes: Any) -> Any:
    model_family, config = weights.parse(apply_overrides(KIMI_LINEAR, changes))
    return weights.abstract(model_family, config, np.dtype("float32"), make_mesh(tp), placement=Placement.of(placement))


def test_kimi_linear():
    found = parsed()
    assert [i + 1 for i, kind in enumerate(found.kinds) if kind == FULL] == ATTENDING
    assert found.linear == KdaSpec(2304, 32, 128, 32, 128, 4, 1e-5)
    spec = found.attention
    assert (spec.heads, spec.rank, spec.key_dim, spec.shared_dim, spec.value_dim) == (32, 512, 128, 64, 128)
    assert (spec.scale, spec.query_rank, found.rope, found.max_length) == (192**-0.5, None, None, 1048576)
    assert (found.moe.experts, found.moe.per_token, found.moe.ffn, found.moe.shared) == (256, 8, 1024, 1024)
    assert found.moe.router == RouterConfig("sigmoid", True, 2.446, correction=True)
    assert (found.dense_layers, found.ffn, found.norm_eps, found.tied) == ((0,), 9216, 1e-5, False)


@pytest.mark.slow
def test_cache_specs_of_kimi_linear():
    """20 layers with a state each, and seven with a latent of 512 + 64 columns per token."""
    kept = layout(tuple(abstract(1).cache_specs()))
    assert (len(kept.states), len(kept.array_specs) * kept.groups) == (20, 7)
    assert {spec.head_dim for spec in kept.array_specs} == {576}


def linear(**changes: Any) -> dict[str, Any]:
    return {"linear_attn_config": KIMI_LINEAR["linear_attn_config"] | changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (linear(full_attn_layers=[*ATTENDING, 5]), "names layer 5 twice .*keep it in one list"),
        (linear(full_attn_layers=[*ATTENDING, 4]), "names layer 4 twice"),
        (
            linear(full_attn_layers=ATTENDING[:-1]),
            r"layer 27 \(counted from 1\) is in neither full_attn_layers nor kda_layers",
        ),
        (
            linear(full_attn_layers=[i - 1 for i in ATTENDING], kda_layers=[0]),
            r"linear_attn_config.kda_layers .*from 1 to 27 .*got \[0\]",
        ),
        (linear(full_attn_layers=[*ATTENDING, 28]), "full_attn_layers must be a list of layers from 1 to 27"),
        (linear(kda_layers="all"), "kda_layers must be a list of layers from 1 to 27 .*'all'"),
        (linear(kda_layers=[True]), "kda_layers must be a list"),
        (linear(kda_layers=None), "has no kda_layers"),
        (linear(num_heads=0), "linear_attn_config.*num_heads=0"),
        (linear(num_heads=32.5), "num_heads=32.5"),
        (linear(head_dim=-1), "head_dim=-1"),
        (linear(short_conv_kernel_size=1), "short_conv_kernel_size=1 must be a whole number from 2"),
        (linear(heads=32), "linear_attn_config.*heads"),
        ({"linear_num_heads": 16}, "linear_attn_config.num_heads is 32 and linear_num_heads is 16; remove one"),
        ({"layer_types": [LINEAR] * 27}, "layer_types and linear_attn_config name different kinds"),
        (
            {"linear_attn_config": None, "layer_types": [LINEAR, FULL]},
            "layer_types must be a list of num_hidden_layers = 27",
        ),
        ({"linear_attn_config": [4]}, r"linear_attn_config=\[4\] must be an object"),
        ({"mla_use_nope": False}, "mla_use_nope=False is not supported: .* for true only"),
        ({"moe_router_activation_func": "softmax"}, "moe_router_activation_func='softmax' is not supported"),
        ({"num_key_value_heads": 8}, "num_key_value_heads is 8, but all 32 heads read one latent"),
        (
            {"num_expert_group": 3},
            r"256 experts \(num_experts.*do not divide into 3 groups \(.*num_expert_group\); choose",
        ),
        ({"topk_group": 2}, r"topk_group is 2; with 1 groups \(n_group.* it must be 1 to 1"),
        (
            {"num_expert_group": 64, "topk_group": 1},
            r"8 experts .*num_experts_per_token\) exceed the 4 experts of 1 groups \(topk_group\); lower",
        ),
        (
            {"num_experts_per_token": 257},
            r"257 experts .*num_experts_per_token\) .*; with 256 experts \(num_experts.*choose 1 to 256",
        ),
        ({"what": 3}, "unknown attributes.*what"),
    ],
)
def test_inconsistent_configs_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        parsed(**changes)


@pytest.mark.parametrize(
    ("tp", "changes", "placement", "message"),
    [
        (
            8,
            linear(num_heads=12),
            None,
            r"layers.0.attention.*'q' of 12 heads.*axis 'model' of size 8.*\(1, 2, 3, 4, 6, 12\)",
        ),
        (8, {"num_attention_heads": 12, "num_key_value_heads": 12}, None, "layers.3.attention.*12 heads"),
        (8, {"moe_intermediate_size": 1028}, None, "layers.1.mlp.*'ffn' of size 1028 .of each expert.*'experts'"),
        (8, {"num_experts": 252}, {"*.mlp": "experts"}, "layers.1.mlp.*'expert' of size 252 .*'shard'"),
    ],
)
def test_indivisible_sizes_are_named(tp, changes, placement, message):
    with pytest.raises(ConfigError, match=message):
        abstract(tp, placement, **changes)


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    """Tensors of the tiny model under their names on the Hub: separate convolutions and experts."""
    folder = checkpoint.write(tmp_path_factory.mktemp("kimi"), tiny.config("kimi_linear"), with_tokenizer=False)
    found = {
        name.replace("mlp.", "block_sparse_moe."): value
        for name, value in load_file(folder / "model.safetensors").items()
    }
    for name in [name for name in found if ".conv1d." in name]:
        parts = np.split(found.pop(name), 3)
        found |= {name.replace("conv1d", f"{part}_conv1d"): own for part, own in zip("qkv", parts, strict=True)}
    return json.loads((folder / "config.json").read_text()), found


@pytest.mark.parametrize(
    "lost",
    [
        "0.self_attn.g_a_proj.weight",
        "0.self_attn.f_a_proj.weight",
        "0.self_attn.b_proj.weight",
        "0.self_attn.g_b_proj.weight",
        "0.self_attn.q_conv1d.weight",
        "0.self_attn.A_log",
        "1.self_attn.kv_a_proj_with_mqa.weight",
    ],
)
def test_half_of_a_group_that_is_missing_is_named(tensors, lost, tmp_path):
    hf, found = tensors
    (tmp_path / "config.json").write_text(json.dumps(hf))
    save_file({name: value for name, value in found.items() if lost not in name}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"lacks 1 tensor\(s\) of this model: 'model.layers.{lost}'"):
        weights.load(tmp_path, make_mesh(1), progress=False)
