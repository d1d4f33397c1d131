"""Tests' data of `models/llama4.py`."""

from typing import Any

from support import reference_changes as ref
from support.families import FULL, Case, FamilyData, Published
from support.parity_options import BIASES, GROUPS, HEAD_DIM, LLAMA3, PLAIN, norms

CHUNKED = "chunked_attention"


def turned_by_halves(reference: Any) -> Any:
    """Rotate columns i and i + D / 2 against each other instead of neighbouring ones."""
    made = ref.copy.deepcopy(reference)
    for layer in made.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            weight = projection.weight.data
            heads = weight.reshape(-1, layer.self_attn.head_dim // 2, 2, weight.shape[1])
            projection.weight.data = heads.transpose(1, 2).reshape(weight.shape).contiguous()
    return made


def weighed_outputs(reference: Any) -> Any:
    """Multiply the outputs of experts by their weights, and not the inputs."""
    made = ref.copy.deepcopy(reference)
    for layer in made.model.layers:
        if not layer.is_moe_layer:
            continue
        moe = layer.feed_forward

        def forward(hidden: Any, moe: Any = moe) -> Any:
            hidden = hidden.reshape(-1, moe.hidden_dim)
            scores, logits = moe.router(hidden)
            out = moe.experts(hidden.repeat(scores.shape[1], 1)) * scores.transpose(0, 1).reshape(-1, 1)
            return moe.shared_expert(hidden) + out.reshape(scores.shape[1], *hidden.shape).sum(0), logits

        moe.forward = forward
    return made


def scout(**text: Any) -> dict[str, Any]:
    """Return the published file of a model that reads images."""
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "torch_dtype": "bfloat16",
        "boi_token_index": 200_080,
        "eoi_token_index": 200_081,
        "image_token_index": 200_092,
        "tie_word_embeddings": False,
        "vision_config": {"model_type": "llama4_vision_model"},
        "text_config": {
            "model_type": "llama4_text",
            "attention_bias": False,
            "attention_chunk_size": 8192,
            "attention_dropout": 0.0,
            "bos_token_id": 200_000,
            "eos_token_id": [200_001, 200_007, 200_008],
            "for_llm_compressor": False,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 5120,
            "initializer_range": 0.02,
            "interleave_moe_layer_step": 1,
            "intermediate_size": 8192,
            "intermediate_size_mlp": 16_384,
            "max_position_embeddings": 10_485_760,
            "no_rope_layers": [],
            "num_attention_heads": 40,
            "num_experts_per_tok": 1,
            "num_hidden_layers": 48,
            "num_key_value_heads": 8,
            "num_local_experts": 16,
            "output_router_logits": False,
            "pad_token_id": 200_018,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 16.0,
                "high_freq_factor": 1.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500_000.0,
            "router_aux_loss_coef": 0.001,
            "router_jitter_noise": 0.0,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_qk_norm": True,
            "vocab_size": 202_048,
            "attn_temperature_tuning": 4,
            "attn_scale": 0.1,
            "floor_scale": 8192,
            **text,
        },
    }


TUNED = {"attn_temperature_tuning": True, "floor_scale": 5, "attn_scale": 0.5}
DATA = FamilyData(
    architecture="Llama4ForCausalLM",
    config=dict(
        num_hidden_layers=3,
        attention_chunk_size=6,
        no_rope_layers=[1, 0, 1],
        interleave_moe_layer_step=2,
        intermediate_size=24,
        intermediate_size_mlp=48,
        num_local_experts=6,
        num_experts_per_tok=1,
        **TUNED,
    ),
    published={
        "llama4-scout": Published(
            "meta-llama/Llama-4-Scout-17B-16E-Instruct",
            "the defaults of transformers' Llama4TextConfig, with rope_scaling, lengths and ids as quoted in tests of "
            "other projects on GitHub; not compared with the file",
            scout(),
        ),
        "llama4-maverick": Published(
            "meta-llama/Llama-4-Maverick-17B-128E-Instruct",
            "as quoted in a test of NVIDIA TensorRT-LLM (GitHub); not compared with the file",
            scout(
                interleave_moe_layer_step=2,
                max_position_embeddings=1_048_576,
                num_local_experts=128,
                rope_scaling=None,
                use_qk_norm=False,
            ),
        ),
        "llama4-text": Published(
            "meta-llama/Llama-4-Scout-17B-16E-Instruct",
            "the text model of llama4-scout as transformers' Llama4ForCausalLM saves it; not compared with a file",
            {**scout()["text_config"], "architectures": ["Llama4ForCausalLM"]},
        ),
    },
    cases={
        "llama4": Case(
            LLAMA3,
            {
                **GROUPS,
                **HEAD_DIM,
                **norms(1.0, "input_layernorm", "post_attention_layernorm", "model.norm"),
                "llama3": PLAIN,
                "neighbouring columns": turned_by_halves,
                "norm of queries and keys": ref.with_config(use_qk_norm=False),
                "chunks": ref.with_config(layer_types=[FULL] * 3),
                "size of chunks": ref.with_config(attention_chunk_size=7),
                "layers without rope": ref.with_config(no_rope_layers=[1, 1, 1], layer_types=[CHUNKED, FULL, CHUNKED]),
                "growth of queries": ref.with_config(attn_temperature_tuning=False),
                "its length": ref.with_config(floor_scale=6),
                "its weight": ref.with_config(attn_scale=0.25),
                "weights of inputs": weighed_outputs,
                "shared expert": ref.with_weights("shared_expert.down_proj.weight", 0.0),
                "router": ref.with_weights("router.weight", 0.0),
                "experts": ref.with_weights("experts.down_proj", 0.0),
            },
            lengths=(6, 7, 11, 40),
        ),
        "llama4 two experts, biases, chunks of a block, no norm": Case(
            {
                "num_experts_per_tok": 2,
                "attention_bias": True,
                "attention_chunk_size": 4,
                "use_qk_norm": False,
                "attn_temperature_tuning": False,
                "moe_layers": [0, 2],
                "tie_word_embeddings": True,
            },
            {**BIASES, "experts of a token": ref.with_config(num_experts_per_tok=1)},
            lengths=(3, 4, 5, 17),
        ),
    },
)
