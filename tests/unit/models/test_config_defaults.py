"""Attributes that a config.json omits have transformers' defaults; unsupported values are refused."""

import json
from importlib.util import find_spec
from typing import Any

import jax.numpy as jnp
import pytest
import transformers
from support import checkpoint, tiny
from support.families import families

from jaxinfer import LLM, sharding
from jaxinfer.checkpoint.hf import apply_overrides, read_config
from jaxinfer.errors import ConfigError
from jaxinfer.loading import weights

SIZES = dict(vocab_size=96, hidden_size=64, intermediate_size=48, num_hidden_layers=4, num_attention_heads=32)
"""All that a decoder's file must state."""


def parsed(hf: dict[str, Any]) -> Any:
    return weights.parse(apply_overrides(hf))[1]


needs_torch = pytest.mark.skipif(
    find_spec("torch") is None, reason="transformers gives access to its model classes only where torch is installed"
)


@needs_torch
@pytest.mark.parametrize("family", tiny.ARCHITECTURES | tiny.VARIANTS)
def test_omitted_attributes_have_transformers_defaults(family):
    """`to_dict` writes every attribute of the class; a file with only the sizes must mean the same."""
    stated = SIZES | dict(families()[family].defaults)
    name = (tiny.ARCHITECTURES | tiny.VARIANTS)[family]
    cls = getattr(transformers, name).config_class
    whole = json.loads(cls(**stated).to_json_string(use_diff=False))
    named = {"architectures": [name]}
    assert parsed(stated | named) == parsed(whole | named)


@needs_torch
@pytest.mark.parametrize("architecture", ["MllamaForConditionalGeneration", "InternVLForConditionalGeneration"])
def test_defaults_of_nested_configs_are_transformers(architecture):
    cls = getattr(transformers, architecture).config_class
    whole = json.loads(cls().to_json_string(use_diff=False)) | {"architectures": [architecture]}
    short = {
        name: {key: part[key] for key in ("model_type",) if key in part}
        for name, part in whole.items()
        if name in ("text_config", "vision_config")
    }
    assert parsed(short | {"architectures": [architecture]}) == parsed(whole)


LLAMA = tiny.config("llama")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_causal": False}, "is_causal=False is not supported: this architecture is implemented for true only"),
        ({"use_rope": False}, "use_rope=False"),
        ({"use_gated_activation": False}, "use_gated_activation=False"),
        ({"norm_topk_prob": False}, "norm_topk_prob=False"),
        ({"use_parallel_block": False}, "use_parallel_block=False"),
        ({"qkv_bias": True}, "qkv_bias=True"),
        ({"use_qk_norm": True}, "use_qk_norm=True"),
        ({"num_experts": 8}, "num_experts=8"),
        ({"embedding_multiplier": 12.0}, r"embedding_multiplier=12\.0"),
        ({"sliding_window": 16}, "sliding_window=16"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ({"rope_interleaved": True}, "rope_interleaved=True"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"architectures": [["x"]]}, r"architectures is \[\['x'\]\]"),
        ({"rope_parameters": 2}, "rope_parameters must be an object"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0 must be .* above 0"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config='mxfp4'.*read for GptOssForCausalLM"),
    ],
)
def test_unsupported_computations_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        parsed(LLAMA | changes)


LEFT = dict(
    _model_name_or_path="x",
    _flash_attn_2_enabled=True,
    use_flash_attention_2=False,
    neftune_noise_alpha=5,
    _commit_hash="0a",
    is_decoder=True,
    is_llama_config=True,
    rope_interleaved=False,
    max_sequence_length=2048,
    unsloth_version="2025.1",
    unsloth_fixed=False,
    trust_remote_code=True,
    lora_alpha=16,
    peft_type="LORA",
    target_modules=["q_proj"],
    load_in_4bit=False,
    bf16=True,
    seed=42,
    padding_side="left",
    ignore_keys_at_rope_validation=["mrope_section"],
    num_experts=0,
    use_mrope=False,
    quantization_config=None,
    head_dim=16.0,
    sliding_window=0,
    max_position_embeddings=256.0,
    pad_token_id=-1,
    use_sliding_window=False,
    max_window_layers=28,
    output_router_logits=False,
    router_aux_loss_coef=0.001,
    ep_size=1,
    num_nextn_predict_layers=0,
    layer_types=["full_attention"] * 2,
    mlp_bias=False,
    tie_encoder_decoder=False,
    pruned_heads={},
    is_encoder_decoder=False,
    is_causal=True,
    lm_head_bias=False,
)
"""Attributes that tools write into the config.json of a Llama."""


def test_attributes_written_by_tools_are_ignored():
    assert parsed(LLAMA | LEFT) == parsed(LLAMA)


@pytest.mark.parametrize(
    ("position", "scaling", "length"),
    [
        (32, {"factor": 4.0, "original_max_position_embeddings": 32}, 128),
        (32, {"factor": 4.0}, 128),
        (128, {"factor": 4.0, "original_max_position_embeddings": 32}, 128),
        (40, {"factor": 4.0, "original_max_position_embeddings": 32}, 128),
    ],
)
def test_yarn_stretches_the_trained_length(position, scaling, length):
    for kind in ("type", "rope_type"):
        hf = LLAMA | {"max_position_embeddings": position, "rope_scaling": {kind: "yarn", **scaling}}
        assert parsed(hf).max_length == length


@pytest.mark.parametrize("family", ["deepseek_v3", "kimi_linear"])
def test_norms_of_latents_have_an_epsilon_of_their_own(family):
    found = parsed(tiny.config(family) | {"rms_norm_eps": 1e-3})
    assert (found.norm_eps, found.attention.norm_eps) == (1e-3, 1e-6)


@pytest.mark.parametrize(
    ("name", "content", "refused"),
    [
        ("hf_quant_config.json", {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "W4A8_AWQ"}}, True),
        ("hf_quant_config.json", {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}, False),
        ("quantize_config.json", {"bits": 5, "group_size": 128}, True),
        ("quant_config.json", {"w_bit": 3, "q_group_size": 128}, True),
    ],
)
def test_a_quantised_folder_is_refused_before_its_weights_are_read(tmp_path, name, content, refused):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / name).write_text(json.dumps(content))
    if not refused:
        assert read_config(tmp_path) == LLAMA
        return
    for opened in (LLM, sharding.plan):
        with pytest.raises(ConfigError, match=rf"{name}=.*formats that are read.*remove the file"):
            opened(tmp_path)


@pytest.mark.parametrize("where", [{}, {"text_config": None}])
def test_formats_inside_a_part_are_refused_as_well(where):
    part = {"quantization_config": {"quant_method": "hqq"}}
    hf = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": part}
    with pytest.raises(ConfigError, match=r"text_config.quantization_config='hqq'.*hf_overrides=\{'text_config'"):
        apply_overrides(hf)
    if where:
        assert apply_overrides(hf, {"text_config": {"quantization_config": None}})["text_config"] == {
            "quantization_config": None
        }


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_float16_is_refused_for_families_that_overflow(family, tmp_path):
    hf = tiny.config(family)
    model_family, _ = weights.parse(hf)
    folder = checkpoint.write(tmp_path, hf, with_tokenizer=False)
    for refused in (
        lambda: sharding.plan(hf, dtype="float16"),
        lambda: LLM(folder, dtype="float16", skip_tokenizer_init=True),
    ):
        with pytest.raises(ConfigError, match="dtype='float16' is not supported .* overflow.*'bfloat16' or 'float32'"):
            refused()
    assert weights.resolve_dtype("auto", "float16", "gpu", model_family) == jnp.bfloat16
    assert weights.resolve_dtype("auto", "float16", "cpu", model_family) == jnp.float32
    assert weights.resolve_dtype("float16", "float32", "gpu", weights.parse(LLAMA)[0]) == jnp.float16


def test_use_sliding_window_must_agree_with_the_layers_of_mistral():
    base = tiny.CONFIG | {"architectures": ["MistralForCausalLM"], "sliding_window": 8, "use_sliding_window": False}
    with pytest.raises(ConfigError, match="use_sliding_window=False is not supported.* for true only"):
        parsed(base)
    full = parsed(base | {"layer_types": ["full_attention"] * 2})
    assert not any(full.slides(layer) for layer in range(2))
    assert parsed(base | {"sliding_window": None, "use_sliding_window": True}) == parsed(
        base | {"sliding_window": None}
    )
    assert parsed(base | {"use_sliding_window": True}).slides(0)


def test_layers_of_exaone_4_have_a_rope_unless_they_are_full_beside_sliding_ones():
    base = tiny.CONFIG | {"architectures": ["Exaone4ForCausalLM"], "num_hidden_layers": 4}
    hybrid = parsed(base | {"sliding_window": 8})
    assert [hybrid.rope_of(layer) is not None for layer in range(4)] == [True, True, True, False]
    whole = parsed(base | {"sliding_window": None})
    assert all(whole.rope_of(layer) is not None and not whole.slides(layer) for layer in range(4))
    with pytest.raises(ConfigError, match="sliding_window_pattern is 'LLLG'"):
        parsed(base | {"sliding_window": 8, "sliding_window_pattern": "LLLG"})
    with pytest.raises(ConfigError, match="no_rope_layers is .1, 2.; it must be"):
        parsed(tiny.CONFIG | {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, 2]})


@pytest.mark.parametrize("named", ["FSDPQwen2ForCausalLM", "PeftModelForCausalLM"])
def test_the_class_around_a_model_is_not_its_architecture(named):
    hf = tiny.config("qwen2") | {"model_type": "qwen2"}
    assert parsed(hf | {"architectures": [named]}) == parsed(hf)
    with pytest.raises(ConfigError, match="architectures is .*FSDPZyx.*PeftModel"):
        parsed(hf | {"architectures": ["FSDPZyx", "PeftModel"]})


@pytest.mark.parametrize(
    ("named", "nearest"),
    [("Qwen4ForCausalLM", "Qwen"), ("Olmo4ForCausalLM", "Olmo"), ("Gemma9ForCausalLM", "Gemma")],
)
def test_an_unknown_architecture_names_the_nearest_by_name(named, nearest):
    with pytest.raises(ConfigError, match=f"{named}.*supported: .*LlamaForCausalLM.*Nearest by name: {nearest}"):
        parsed(LLAMA | {"architectures": [named]})
    with pytest.raises(ConfigError, match="WhisperForConditionalGeneration.*$") as error:
        parsed(LLAMA | {"architectures": ["Zyx"], "model_type": "zyx"})
    assert "Nearest" not in str(error.value)
