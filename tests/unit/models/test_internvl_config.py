"""Both kinds of InternVL's config.json: parsing, and refusal of unsupported values."""

import copy
import json
from typing import Any

import jax.numpy as jnp
import pytest
from support import internvl
from support.tiny import CONFIG

from jaxinfer.checkpoint.hf import apply_overrides
from jaxinfer.errors import ConfigError
from jaxinfer.layers.vision import VisionConfig
from jaxinfer.loading import weights
from jaxinfer.media.inputs import Features
from jaxinfer.models.internvl.config import InternVLConfig
from jaxinfer.sharding import make_mesh

ORIGINAL: dict[str, Any] = json.loads("""
{"architectures": ["InternVLChatModel"],
 "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
 "downsample_ratio": 0.5, "dynamic_image_size": true, "force_image_size": 448, "hidden_size": 896,
 "image_fold": null,
 "llm_config": {
   "_name_or_path": "./pretrained/Qwen2.5-32B-Instruct", "architectures": ["Qwen2ForCausalLM"],
   "attention_dropout": 0.0,
   "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
   "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 70, "model_type": "qwen2",
   "moe_config": null, "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
   "rms_norm_eps": 1e-06,
   "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}, "rope_theta": 1000000.0,
   "sliding_window": null, "torch_dtype": "bfloat16", "use_bfloat16": true, "use_cache": false,
   "use_sliding_window": false, "vocab_size": 151674},
 "max_dynamic_patch": 12, "min_dynamic_patch": 1, "model_type": "internvl_chat", "output_attentions": false,
 "pad2square": false, "ps_version": "v2", "select_layer": -1, "system_message": null, "template": "internvl2_5",
 "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_backbone_lora": 0, "use_llm_lora": 0,
 "use_thumbnail": true,
 "vision_config": {
   "_name_or_path": "OpenGVLab/InternViT-6B-448px-V1-5", "architectures": ["InternVisionModel"],
   "attention_dropout": 0.0, "auto_map": {"AutoModel": "modeling_intern_vit.InternVisionModel"},
   "capacity_factor": 1.2, "drop_path_rate": 0.1, "dropout": 0.0, "eval_capacity_factor": 1.4, "hidden_act": "gelu",
   "hidden_size": 1024, "image_size": 448, "initializer_factor": 0.1, "initializer_range": 1e-10,
   "intermediate_size": 4096, "laux_allreduce": "all_nodes", "layer_norm_eps": 1e-06, "model_type": "intern_vit_6b",
   "moe_coeff_ratio": 0.5, "moe_intermediate_size": 768, "moe_output_scale": 4.0, "noisy_gate_policy": "RSample_before",
   "norm_type": "layer_norm", "num_attention_heads": 16, "num_channels": 3, "num_experts": 8, "num_hidden_layers": 24,
   "num_routed_experts": 4, "num_shared_experts": 4, "patch_size": 14, "qk_normalization": false, "qkv_bias": true,
   "shared_expert_intermediate_size": 3072, "torch_dtype": "bfloat16", "use_bfloat16": true, "use_flash_attn": false,
   "use_moe": false, "use_residual": true, "use_rts": false, "use_weighted_residual": false}}
""")
"""The public config.json of InternVL3-1B."""


def parsed(hf: dict[str, Any]) -> InternVLConfig:
    return weights.parse(hf)[1]


def changed(path: str, value: Any, hf: dict[str, Any] | None = None) -> dict[str, Any]:
    """config.json with one attribute, `part.name` or `name`, set; "absent" removes it."""
    made = copy.deepcopy(internvl.config() if hf is None else hf)
    *parts, name = path.split(".")
    at = made[parts[0]] if parts else made
    at[name] = value
    if value == "absent":
        del at[name]
    return made


def test_a_published_original_config_is_read_without_its_code():
    config = parsed(ORIGINAL)
    assert config.vision == VisionConfig(
        width=1024,
        layers=24,
        heads=16,
        ffn=4096,
        activation="gelu",
        channels=3,
        image_size=448,
        patch_size=14,
        norm="layer_norm",
        norm_eps=1e-6,
        qkv_bias=True,
        qk_norm_eps=None,
    )
    assert config.features == Features("image", (3, 448, 448), 256, -1)
    assert (config.text.attention.width, config.num_layers, config.vocab_size) == (896, 24, 151674)
    assert not config.text.tied
    assert config.max_length == 65536 and config.query_group == 7 and config.text.attention.qkv_bias
    assert config.length_key(100) == config.text.length_key(100) and config.recompute_after is None
    module = weights.abstract(*weights.parse(ORIGINAL), jnp.dtype("bfloat16"), make_mesh(1))
    assert module.vision_tower.layers[23].mlp.up.weight.shape == (1, 4096, 1024)


def test_the_defaults_of_the_original_are_those_of_internvit_6b():
    sizes = dict(
        hidden_size=3200,
        num_attention_heads=25,
        intermediate_size=12800,
        num_hidden_layers=48,
        image_size=448,
        patch_size=14,
    )
    hf = {**ORIGINAL, "vision_config": sizes, "ps_version": None, "force_image_size": None, "image_token_id": 151667}
    config = parsed(hf)
    assert (config.vision.norm, config.vision.qk_norm_eps, config.vision.qkv_bias) == ("rms_norm", 1e-6, False)
    assert config.transposed and config.features.placeholder == 151667


def test_transformers_has_its_own_names_for_the_same_things():
    vision = dict(norm_type="rms_norm", use_qk_norm=True, attention_bias=True, use_mean_pooling=False)
    config = parsed(internvl.config(vision=vision))
    assert (config.vision.norm, config.vision.qk_norm_eps, config.vision.qkv_bias) == ("rms_norm", 1e-6, True)
    assert config.vision.final_norm and not config.transposed
    assert config.features == Features("image", (3, 28, 28), 4, internvl.PLACEHOLDER)


@pytest.mark.parametrize(
    ("whole", "part", "tied"),
    [
        (True, False, True),
        (False, True, False),
        ("absent", True, True),
        ("absent", "absent", True),
    ],
)
def test_tie_word_embeddings_of_the_whole_model_has_precedence(whole, part, tied):
    hf = changed("tie_word_embeddings", whole, changed("text_config.tie_word_embeddings", part))
    assert parsed(hf).text.tied is tied


def test_the_tower_ends_with_the_selected_layer():
    stored = changed("vision_config.num_hidden_layers", 6)
    asked = {-1: 6, -2: 5, -7: 0, 0: 0, 3: 3, 6: 6}
    assert {n: parsed(changed("vision_feature_layer", n, stored)).vision.layers for n in asked} == asked
    rules = weights.parse(changed("vision_feature_layer", -2, stored))
    unread = [rule for rule in rules[0].weight_rules(rules[1]) if ".layer.5." in rule.source]
    assert unread and not any(rule.target for rule in unread)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        *(
            (f"{part}.{name}", value, rf"{part}\.{name}=.*must be a whole number from 1 to")
            for part, name in [
                ("vision_config", "hidden_size"),
                ("vision_config", "num_hidden_layers"),
                ("vision_config", "intermediate_size"),
                ("text_config", "vocab_size"),
                ("text_config", "num_attention_heads"),
            ]
            for value in (0, -1, 2**40)
        ),
        *(
            ("vision_config.image_size", value, "vision_config: image_size=.*must be a whole number from 1 to 8192")
            for value in (0, -28, 2**20, [28, 35], [28], "28", [28, True], 28.5)
        ),
        ("vision_config.patch_size", 0, "vision_config: patch_size=0 must be"),
        ("vision_config.patch_size", 5, "image_size is 28, which patch_size = 5 does not divide"),
        ("vision_config.num_attention_heads", 5, "hidden_size is 32, which num_attention_heads = 5 does not divide"),
        ("vision_config.num_channels", 0, "num_channels=0"),
        ("vision_config.norm_type", "batch_norm", "norm_type is 'batch_norm'.*supported: layer_norm, rms_norm"),
        ("vision_config.hidden_act", "mish", "hidden_act is 'mish'.*supported: silu"),
        ("vision_config.unheard_of", 3, r"unheard_of.*hf_overrides=\{'vision_config': \{'unheard_of': None\}\}"),
        ("vision_config", "absent", "no vision_config"),
        ("text_config", [1], r"text_config=\[1\] must be an object"),
        (
            "text_config.model_type",
            "mamba",
            "text_config.*'mamba'.*supported: Qwen2ForCausalLM, Qwen3ForCausalLM, LlamaForCausalLM",
        ),
        ("text_config.architectures", ["InternLM2ForCausalLM"], "InternLM2ForCausalLM.*supported: Qwen2"),
        ("text_config.rope_scaling", {"rope_type": "unheard_of"}, "'unheard_of'.*supported: default"),
        ("downsample_ratio", 0.3, "downsample_ratio is 0.3"),
        ("downsample_ratio", 0, "downsample_ratio is 0"),
        ("downsample_ratio", -0.5, "downsample_ratio is -0.5"),
        ("image_seq_length", 5, "image_seq_length is 5; it must be a square"),
        ("image_seq_length", 2**22, "a tile is .* up to 8192"),
        ("image_token_id", 97, "image_token_id is 97, but vocab_size is 97"),
        ("image_token_id", -1, "image_token_id=-1"),
        ("vision_feature_layer", [-1, -2], r"vision_feature_layer .*is \[-1, -2\]; it must be an integer"),
        ("vision_feature_layer", 3, "it must be an integer from -3 to 2"),
        ("vision_feature_select_strategy", "full", "'full', which is not supported; supported: default"),
        ("projector_hidden_act", "mish", "projector_hidden_act is 'mish'"),
    ],
)
def test_unsupported_values_are_refused(path, value, message):
    with pytest.raises(ConfigError, match=message) as error:
        weights.parse(changed(path, value))
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("ps_version", "v3", "ps_version is 'v3'.*supported: v1, v2"),
        ("force_image_size", 450, "a tile is 450 pixels a side .*multiple of .* = 28"),
        ("vision_config.use_moe", True, "use_moe"),
        ("llm_config.architectures", ["InternLM2ForCausalLM"], "InternLM2ForCausalLM.*supported: Qwen2"),
        ("llm_config.num_hidden_layers", 0, r"llm_config\.num_hidden_layers=0"),
        ("select_layer", 25, "it must be an integer from -25 to 24"),
    ],
)
def test_unsupported_values_of_original_configs_are_refused(path, value, message):
    with pytest.raises(ConfigError, match=message):
        weights.parse(changed(path, value, ORIGINAL))


def test_an_attribute_of_a_part_can_be_overridden():
    hf = changed("vision_config.unheard_of", 3)
    assert parsed(apply_overrides(hf, {"vision_config": {"unheard_of": None}})) == parsed(internvl.config())


def test_the_text_model_is_the_tiny_one():
    assert parsed(internvl.config()).text.ffn == CONFIG["intermediate_size"]
