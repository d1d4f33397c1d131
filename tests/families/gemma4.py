"""Tests' data of `models/gemma4.py`."""

from typing import Any

from support import reference_changes as ref
from support.families import FULL, SLIDING, Case, FamilyData, Published
from support.parity_options import norms

PROPORTIONAL = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e3}
ROPES = {FULL: PROPORTIONAL, SLIDING: {"rope_type": "default", "rope_theta": 1e4}}
EXPERTS = dict(enable_moe_block=True, num_experts=6, top_k_experts=2, moe_intermediate_size=24)
PLAIN = dict(
    num_kv_shared_layers=0,
    use_double_wide_mlp=False,
    hidden_size_per_layer_input=0,
    attention_k_eq_v=False,
    enable_moe_block=False,
)
"""Changes of the tiny model: one without what only some of the published models have."""


def rope_of(kind: str, **changes: Any) -> ref.Change:
    """Return the reference with other parameters of the rope of a kind of layers."""
    return ref.with_config(rope_parameters={**ROPES, kind: {**ROPES[kind], **changes}})


def own_values(attention: Any) -> None:
    """Do not normalise values."""
    import torch

    if hasattr(attention, "v_norm"):
        attention.v_norm = torch.nn.Identity()


def first_lender(reference: Any) -> Any:
    """Let sliding layers without keys attend to those of the first sliding layer instead of the last one."""
    made = ref.copy.deepcopy(reference)
    first, last = (made.model.layers[number].self_attn for number in (0, 1))
    first.store_full_length_kv, last.store_full_length_kv = True, False
    return made


def without_inputs(reference: Any) -> Any:
    """Give layers no inputs of their own."""
    made = ref.copy.deepcopy(reference)
    for layer in made.model.layers:
        layer.post_per_layer_input_norm.weight.data.zero_()
    return made


def scaled(name: str, value: float) -> ref.Change:
    """Multiply the weights and buffers whose names end in `name`."""

    def change(reference: Any) -> Any:
        made = ref.copy.deepcopy(reference)
        found = [own for path, own in made.state_dict().items() if path.endswith(name)]
        assert found, name
        for own in found:
            own.mul_(value)
        return made

    return change


def hub_file(text: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return a published file: the text model's attributes within those of the model that reads images."""
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "dtype": "bfloat16",
        "audio_token_id": 258_881,
        "boa_token_id": 256_000,
        "boi_token_id": 255_999,
        "eoa_token_index": 258_883,
        "eoi_token_id": 258_882,
        "eos_token_id": [1, 106],
        "image_token_id": 258_880,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "video_token_id": 258_884,
        "vision_soft_tokens_per_image": 280,
        "vision_config": {"model_type": "gemma4_vision"},
        **more,
        "text_config": {
            "model_type": "gemma4_text",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 2,
            "eos_token_id": 1,
            "final_logit_softcapping": 30.0,
            "global_head_dim": 512,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "initializer_range": 0.02,
            "pad_token_id": 0,
            "rms_norm_eps": 1e-06,
            "rope_parameters": {
                FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0, "rope_type": "proportional"},
                SLIDING: {"rope_theta": 10_000.0, "rope_type": "default"},
            },
            "tie_word_embeddings": True,
            "use_cache": True,
            "vocab_size": 262_144,
            "vocab_size_per_layer_input": 262_144,
            **text,
        },
    }


def kinds(layers: int, each: int) -> list[str]:
    """Return kinds of layers, each `each`-th of them full."""
    return [SLIDING if number % each else FULL for number in range(1, layers + 1)]


MEMORY = "from memory of the published values; not compared with the file"
E2B = dict(
    hidden_size=1536,
    intermediate_size=6144,
    num_hidden_layers=35,
    num_attention_heads=8,
    num_key_value_heads=1,
    layer_types=kinds(35, 5),
    sliding_window=512,
    max_position_embeddings=131_072,
    num_kv_shared_layers=20,
    use_double_wide_mlp=True,
    hidden_size_per_layer_input=256,
    attention_k_eq_v=False,
    enable_moe_block=False,
)
E4B = {
    **E2B,
    **dict(
        hidden_size=2560,
        intermediate_size=10_240,
        num_hidden_layers=42,
        num_key_value_heads=2,
        layer_types=kinds(42, 6),
        num_kv_shared_layers=18,
        use_double_wide_mlp=False,
    ),
}
LARGE = dict(
    layer_types=kinds(60, 6),
    hidden_size=5376,
    intermediate_size=21_504,
    num_hidden_layers=60,
    num_attention_heads=32,
    num_key_value_heads=16,
    num_global_key_value_heads=4,
    sliding_window=1024,
    max_position_embeddings=262_144,
    num_kv_shared_layers=0,
    use_double_wide_mlp=False,
    hidden_size_per_layer_input=0,
    attention_k_eq_v=True,
    enable_moe_block=False,
    use_bidirectional_attention="vision",
)
SPARSE = {
    **LARGE,
    **dict(
        layer_types=kinds(30, 6),
        hidden_size=2816,
        intermediate_size=2112,
        num_hidden_layers=30,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_global_key_value_heads=2,
        enable_moe_block=True,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
    ),
}

DATA = FamilyData(
    architecture="Gemma4ForCausalLM",
    config=dict(
        num_hidden_layers=5,
        layer_types=[SLIDING, SLIDING, FULL, SLIDING, FULL],
        sliding_window=7,
        num_key_value_heads=4,
        global_head_dim=64,
        num_global_key_value_heads=2,
        attention_k_eq_v=True,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=97,
        rope_parameters=ROPES,
        tie_word_embeddings=False,
        **EXPERTS,
    ),
    published={
        "gemma4-e2b": Published(
            "google/gemma-4-E2B-it", MEMORY, hub_file(E2B, audio_config={"model_type": "gemma4_audio"})
        ),
        "gemma4-e4b": Published(
            "google/gemma-4-E4B-it", MEMORY, hub_file(E4B, audio_config={"model_type": "gemma4_audio"})
        ),
        "gemma4-31b": Published("google/gemma-4-31B-it", MEMORY, hub_file(LARGE)),
        "gemma4-26b-a4b": Published("google/gemma-4-26B-A4B-it", MEMORY, hub_file(SPARSE)),
        "gemma4-text": Published(
            "google/gemma-4-E2B-it",
            "the text model of gemma4-e2b as transformers' Gemma4ForCausalLM saves it; not compared with a file",
            {**hub_file(E2B)["text_config"], "architectures": ["Gemma4ForCausalLM"], "dtype": "bfloat16"},
        ),
    },
    cases={
        "gemma4": Case(
            {},
            {
                **norms(1.0, "input_layernorm", "q_norm", "k_norm", "pre_feedforward_layernorm", "model.norm"),
                **norms(1.0, "post_attention_layernorm", "post_feedforward_layernorm", "post_feedforward_layernorm_1"),
                **norms(1.0, "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2"),
                **norms(1.0, "post_per_layer_input_norm", "per_layer_projection_norm"),
                "norm of values": ref.with_attention(own_values),
                "embedding scale": ref.without_embedding_scale,
                "window": ref.with_config(sliding_window=64),
                "part of the rope": rope_of(FULL, partial_rotary_factor=1.0),
                "global rope": rope_of(FULL, rope_theta=1e4),
                "local rope": rope_of(SLIDING, rope_theta=1e2),
                "layers that lend": first_lender,
                "inputs of layers": without_inputs,
                "looked up inputs": scaled("embed_tokens_per_layer.weight", 0.0),
                "projected inputs": scaled("per_layer_model_projection.weight", 0.01),
                "scale of layers": scaled("layer_scalar", 1.5),
                "scale of the router": ref.with_weights("router.scale", 1.0),
                "scale of experts": ref.with_weights("per_expert_scale", 1.0),
                "experts": ref.with_weights("post_feedforward_layernorm_2.weight", 0.0),
                "hidden_activation": ref.with_config(hidden_activation="silu"),
            },
            lengths=(6, 7, 8, 41),
        ),
        "gemma4 plain": Case(
            {**PLAIN, "final_logit_softcapping": 3.0, "attention_bias": True},
            {
                "logit softcap": ref.with_config(final_logit_softcapping=None),
                **{f"bias of {n}": ref.with_weights(f"{n}_proj.bias", 0.0) for n in "qkvo"},
            },
            lengths=(6, 7, 8, 41),
        ),
    },
)
