"""Parsing of the published config.json of Gemma 2, Gemma 3, Olmo 3 and gpt-oss."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxinfer.checkpoint.hf import apply_overrides
from jaxinfer.errors import ConfigError
from jaxinfer.kv.groups import layout
from jaxinfer.kv.spec import Full, Sliding
from jaxinfer.layers.embedding import Embedding
from jaxinfer.layers.moe import ClampedSwiGLU
from jaxinfer.layers.params import Build
from jaxinfer.loading import weights
from jaxinfer.models.decoder_config import AFTER, BEFORE, FULL, SLIDING, DecoderConfig
from jaxinfer.sharding import make_mesh

GEMMA_2_2B: dict[str, Any] = dict(
    architectures=["Gemma2ForCausalLM"],
    attention_bias=False,
    attention_dropout=0.0,
    attn_logit_softcapping=50.0,
    bos_token_id=2,
    cache_implementation="hybrid",
    eos_token_id=1,
    final_logit_softcapping=30.0,
    head_dim=256,
    hidden_act="gelu_pytorch_tanh",
    hidden_activation="gelu_pytorch_tanh",
    hidden_size=2304,
    initializer_range=0.02,
    intermediate_size=9216,
    max_position_embeddings=8192,
    model_type="gemma2",
    num_attention_heads=8,
    num_hidden_layers=26,
    num_key_value_heads=4,
    pad_token_id=0,
    query_pre_attn_scalar=256,
    rms_norm_eps=1e-06,
    rope_theta=10000.0,
    sliding_window=4096,
    torch_dtype="float32",
    transformers_version="4.42.4",
    use_cache=True,
    vocab_size=256000,
)

GEMMA_3_1B: dict[str, Any] = dict(
    architectures=["Gemma3ForCausalLM"],
    attention_bias=False,
    attention_dropout=0.0,
    attn_logit_softcapping=None,
    bos_token_id=2,
    cache_implementation="hybrid",
    eos_token_id=[1, 106],
    final_logit_softcapping=None,
    head_dim=256,
    hidden_activation="gelu_pytorch_tanh",
    hidden_size=1152,
    initializer_range=0.02,
    intermediate_size=6912,
    max_position_embeddings=32768,
    model_type="gemma3_text",
    num_attention_heads=4,
    num_hidden_layers=26,
    num_key_value_heads=1,
    pad_token_id=0,
    query_pre_attn_scalar=256,
    rms_norm_eps=1e-06,
    rope_local_base_freq=10000,
    rope_scaling=None,
    rope_theta=1000000,
    sliding_window=512,
    sliding_window_pattern=6,
    torch_dtype="bfloat16",
    transformers_version="4.50.0.dev0",
    use_cache=True,
    vocab_size=262144,
)

GEMMA_3_4B: dict[str, Any] = dict(
    architectures=["Gemma3ForConditionalGeneration"],
    boi_token_index=255999,
    eoi_token_index=256000,
    eos_token_id=[1, 106],
    image_token_index=262144,
    initializer_range=0.02,
    mm_tokens_per_image=256,
    model_type="gemma3",
    torch_dtype="bfloat16",
    transformers_version="4.50.0.dev0",
    text_config=dict(
        hidden_size=2560,
        intermediate_size=10240,
        model_type="gemma3_text",
        num_hidden_layers=34,
        rope_scaling=dict(factor=8.0, rope_type="linear"),
        sliding_window=1024,
    ),
    vision_config=dict(
        hidden_size=1152,
        image_size=896,
        intermediate_size=4304,
        model_type="siglip_vision_model",
        num_attention_heads=16,
        num_hidden_layers=27,
        patch_size=14,
        vision_use_head=False,
    ),
)

OLMO_3_7B: dict[str, Any] = dict(
    architectures=["Olmo3ForCausalLM"],
    attention_bias=False,
    attention_dropout=0.0,
    dtype="bfloat16",
    eos_token_id=100257,
    hidden_act="silu",
    hidden_size=4096,
    initializer_range=0.02,
    intermediate_size=11008,
    layer_types=[SLIDING, SLIDING, SLIDING, FULL] * 8,
    max_position_embeddings=65536,
    model_type="olmo3",
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=32,
    pad_token_id=100277,
    rms_norm_eps=1e-06,
    rope_scaling=dict(
        attention_factor=1.2079441541679836,
        beta_fast=32.0,
        beta_slow=1.0,
        factor=8.0,
        original_max_position_embeddings=8192,
        rope_type="yarn",
    ),
    rope_theta=500000,
    sliding_window=4096,
    tie_word_embeddings=False,
    transformers_version="4.57.0",
    use_cache=False,
    vocab_size=100278,
)

GPT_OSS_20B: dict[str, Any] = dict(
    architectures=["GptOssForCausalLM"],
    attention_bias=True,
    attention_dropout=0.0,
    eos_token_id=200002,
    experts_per_token=4,
    head_dim=64,
    hidden_act="silu",
    hidden_size=2880,
    initial_context_length=4096,
    initializer_range=0.02,
    intermediate_size=2880,
    layer_types=[SLIDING, FULL] * 12,
    max_position_embeddings=131072,
    model_type="gpt_oss",
    num_attention_heads=64,
    num_experts_per_tok=4,
    num_hidden_layers=24,
    num_key_value_heads=8,
    num_local_experts=32,
    output_router_logits=False,
    pad_token_id=199999,
    quantization_config=dict(
        modules_to_not_convert=[
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        quant_method="mxfp4",
    ),
    rms_norm_eps=1e-05,
    rope_scaling=dict(
        beta_fast=32.0,
        beta_slow=1.0,
        factor=32.0,
        original_max_position_embeddings=4096,
        rope_type="yarn",
        truncate=False,
    ),
    rope_theta=150000,
    router_aux_loss_coef=0.9,
    sliding_window=128,
    swiglu_limit=7.0,
    tie_word_embeddings=False,
    transformers_version="4.55.0.dev0",
    use_cache=True,
    vocab_size=201088,
)

ALL = {
    "gemma-2-2b": GEMMA_2_2B,
    "gemma-3-1b": GEMMA_3_1B,
    "gemma-3-4b": GEMMA_3_4B,
    "Olmo-3-7B": OLMO_3_7B,
    "gpt-oss-20b": GPT_OSS_20B,
}


def parsed(hf: dict[str, Any], **changes: Any) -> DecoderConfig:
    return weights.parse(apply_overrides(hf, changes))[1]


def test_gemma_2():
    found = parsed(GEMMA_2_2B)
    spec = found.attention
    assert (spec.scale, spec.softcap, spec.norm_eps, spec.qkv_bias, spec.sinks) == (1 / 16, 50.0, None, False, False)
    assert (found.embedding_scale, found.logit_softcap, found.tied, found.activation) == (
        48.0,
        30.0,
        True,
        "gelu_pytorch_tanh",
    )
    assert (found.norms, found.norm_scaling.offset, found.norm_scaling.wide) == ((BEFORE, AFTER), 1.0, True)
    assert (found.window, found.kinds, found.max_length) == (4096, (SLIDING, FULL) * 13, 8192)
    assert found.local_rope is None and found.rope.theta == 10000.0


def test_gemma_3():
    found = parsed(GEMMA_3_1B)
    spec = found.attention
    assert (spec.softcap, spec.norm_eps, spec.norm_whole, spec.norm_scaling.offset) == (None, 1e-6, False, 1.0)
    assert found.embedding_scale == 1152**0.5 and found.logit_softcap is None and found.tied
    assert found.kinds == ((SLIDING,) * 5 + (FULL,)) * 4 + (SLIDING,) * 2
    assert (found.rope_of(5).theta, found.rope_of(0).theta, found.max_length) == (1e6, 1e4, 32768)


def test_the_text_model_of_gemma_3_with_images():
    """With the attributes that its config.json omits; the stated length is the stretched one."""
    found = parsed(GEMMA_3_4B)
    spec = found.attention
    assert (found.vocab_size, spec.width, spec.heads, spec.kv_heads, spec.head_dim) == (262208, 2560, 8, 4, 256)
    assert (found.rope.kind, found.rope.factor, found.rope.theta) == ("linear", 8.0, 1e6)
    assert (found.local_rope.kind, found.local_rope.theta) == ("default", 1e4)
    assert (found.window, found.num_layers, found.max_length, found.tied) == (1024, 34, 131072, True)
    assert not parsed(GEMMA_3_4B, tie_word_embeddings=False).tied
    with pytest.raises(ConfigError, match="text_config.*what"):
        parsed(GEMMA_3_4B, text_config={"what": 3})


def test_olmo_3():
    found = parsed(OLMO_3_7B)
    spec = found.attention
    assert (spec.norm_eps, spec.norm_whole, spec.scoring.scale) == (1e-6, True, 128**-0.5)
    assert (found.norms, found.norm_scaling.offset, found.tied) == ((AFTER,), 0.0, False)
    assert (found.rope.kind, found.rope.attention_factor, found.local_rope.kind) == (
        "yarn",
        1.2079441541679836,
        "default",
    )
    assert (found.local_rope.theta, found.rope.theta, found.max_length) == (5e5, 5e5, 65536)


def test_gpt_oss():
    found = parsed(GPT_OSS_20B)
    spec, moe = found.attention, found.moe
    assert (spec.sinks, spec.qkv_bias, spec.out_bias, spec.head_dim) == (True, True, True, 64)
    assert (found.rope.kind, found.rope.truncate, found.local_rope, found.window) == ("yarn", False, None, 128)
    assert (moe.experts, moe.per_token, moe.ffn, moe.bias, moe.router.bias) == (32, 4, 2880, True, True)
    assert moe.activation == ClampedSwiGLU(1.702, 7.0)


@pytest.mark.parametrize("name", ALL)
def test_rope_parameters_of_each_kind_as_transformers_5_writes_them(name):
    """Equivalent to the older attributes."""
    hf = dict(ALL[name])
    own = dict(hf["text_config"]) if "text_config" in hf else hf
    found, scaling = parsed(hf), own.pop("rope_scaling", None)
    full = {"rope_type": "default", "rope_theta": found.rope.theta, **(scaling or {})}
    nested = found.local_rope is not None
    own.pop("rope_theta", None)
    own.pop("rope_local_base_freq", None)
    own["rope_parameters"] = full
    if nested:
        sliding = {"rope_type": "default", "rope_theta": found.local_rope.theta}
        own["rope_parameters"] = {FULL: full, SLIDING: sliding}
    again = parsed({**hf, "text_config": own} if own is not hf else own)
    assert again == found
    if nested:
        own["rope_parameters"]["chunked_attention"] = full
        with pytest.raises(ConfigError, match="rope_parameters has unknown keys chunked_attention"):
            parsed({**hf, "text_config": own} if own is not hf else own)


KINDS = {
    FULL: {"rope_type": "default", "rope_theta": 1e6},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}
V5 = {"rope_parameters": KINDS, "rope_theta": None, "rope_local_base_freq": None}


def test_rope_scaling_beside_ropes_of_each_kind_is_of_full_layers():
    """As in transformers 5; what people lay over a folder that it wrote."""
    scaling = {"rope_type": "linear", "factor": 4.0}
    found = parsed(GEMMA_3_1B, **V5, rope_scaling=scaling)
    assert found == parsed(GEMMA_3_1B, rope_scaling=scaling)
    assert (found.rope.kind, found.local_rope.kind) == ("linear", "default")
    assert parsed(GEMMA_3_1B, **V5, rope_scaling={"type": "linear", "factor": 4.0}) == found


@pytest.mark.parametrize("kind", [FULL, SLIDING])
def test_a_kind_of_layer_without_a_rope_has_the_default_one(kind):
    expected = parsed(GEMMA_3_1B, **V5)
    for nothing in ({}, {kind: None}, {kind: {}}):
        left = {name: value for name, value in KINDS.items() if name != kind}
        assert parsed(GEMMA_3_1B, **{**V5, "rope_parameters": {**left, **nothing}}) == expected
    olmo = parsed(OLMO_3_7B, rope_scaling=None, rope_parameters={FULL: {"rope_type": "linear", "factor": 2.0}})
    assert (olmo.rope.kind, olmo.local_rope.kind, olmo.local_rope.theta) == ("linear", "default", 500_000)


def test_null_is_as_if_a_part_were_not_there():
    assert parsed(GEMMA_3_1B, text_config=None) == parsed(GEMMA_3_1B)


@pytest.mark.parametrize(
    ("hf", "changes", "message"),
    [
        (GEMMA_3_1B, V5 | {"rope_theta": 5e5}, "rope_theta=500000.0 contradicts rope_parameters.full_attention"),
        (GEMMA_3_1B, V5 | {"rope_local_base_freq": 5e5}, "contradicts rope_parameters.sliding_attention.rope_theta"),
        (GEMMA_3_1B, V5 | {"rope_scaling": 2}, "rope_scaling is 2"),
        (GEMMA_3_1B, {"rope_parameters": {"rope_type": "default"}}, "has a rope per kind of layer: put them in"),
        (OLMO_3_7B, {"rope_parameters": {"rope_theta": 5e4}}, "has a rope per kind of layer: put them in"),
        (
            GEMMA_2_2B,
            {"sliding_window": 0},
            "layer_types names sliding_attention, but no sliding_window is set",
        ),
        (GEMMA_2_2B, {"sliding_window": -1}, "sliding_window=-1"),
        (GEMMA_2_2B, {"sliding_window": 4.5}, "sliding_window=4.5"),
        (GPT_OSS_20B, {"layer_types": [SLIDING, FULL]}, "num_hidden_layers = 24"),
        (OLMO_3_7B, {"layer_types": [FULL] * 31 + ["chunked_attention"]}, r"layer_types\[31\] is 'chunked_attention'"),
        (GEMMA_3_1B, {"sliding_window_pattern": 0}, "sliding_window_pattern=0"),
        (GEMMA_3_1B, {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        (GEMMA_3_1B, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        (GEMMA_3_1B, {"hidden_activation": "mish"}, "hidden_activation is 'mish'"),
        (GPT_OSS_20B, {"num_experts_per_tok": 33}, r"33 experts per token .*; with 32 experts .* choose 1 to 32"),
        (GPT_OSS_20B, {"quantization_config": {"quant_method": "gptq"}}, "bits=None is not one of 2, 3, 4, 8"),
        (GEMMA_2_2B, {"quantization_config": {"quant_method": "mxfp4"}}, "read for GptOssForCausalLM alone"),
    ],
)
def test_unsupported_values_are_refused(hf, changes, message):
    with pytest.raises(ConfigError, match=message):
        parsed(hf, **changes)


def test_a_null_window_with_sliding_layers_is_refused():
    hf = {name: value for name, value in OLMO_3_7B.items() if name != "sliding_window"} | {"sliding_window": None}
    with pytest.raises(ConfigError, match="layer_types names sliding_attention, but no sliding_window"):
        parsed(hf)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arrays", "groups"),
    [
        ("gemma-2-2b", 13, 2),
        ("gemma-3-1b", 2, 13),
        ("gemma-3-4b", 5, 7),
        ("Olmo-3-7B", 8, 4),
        ("gpt-oss-20b", 12, 2),
    ],
)
def test_cache_arrays_and_groups_of_the_real_shapes(name, arrays, groups):
    config = parsed(ALL[name])
    model_family, _ = weights.parse(apply_overrides(ALL[name]))
    module = weights.abstract(model_family, config, np.dtype("float32"), make_mesh(1))
    found = layout(tuple(module.cache_specs()))
    assert (len(found.array_specs), found.groups) == (arrays, groups)
    assert {type(spec) for spec in module.cache_specs()} == {Full, Sliding}


def test_the_scale_of_embeddings_is_rounded_to_their_dtype():
    """33.94 is 34 in bfloat16, which transformers multiplies by."""
    build = Build(nnx.Rngs(0), jnp.dtype("bfloat16"), make_mesh(1))
    made = Embedding(build, 8, 1152, scale=parsed(GEMMA_3_1B).embedding_scale)
    np.testing.assert_array_equal(made(jnp.arange(8)), np.asarray(made.weight[...] * jnp.bfloat16(34.0)))
