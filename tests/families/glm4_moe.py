"""Tests' data of `models/glm4_moe.py`."""

from support import reference_changes as ref
from support.families import Case, FamilyData, Published
from support.parity_options import GROUPS, HEAD_DIM, NORMS, norms, rope

ALL_COLUMNS = rope("default", partial_rotary_factor=1.0)

DATA = FamilyData(
    architecture="Glm4MoeForCausalLM",
    variant=True,
    config=dict(
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        attention_bias=True,
        routed_scaling_factor=1.5,
    ),
    defaults={"moe_intermediate_size": 24, "head_dim": 16},
    published={
        "GLM-4.5-Air": Published(
            "zai-org/GLM-4.5-Air",
            "from memory of the published values; not compared with the file",
            config={
                "architectures": ["Glm4MoeForCausalLM"],
                "attention_bias": True,
                "attention_dropout": 0.0,
                "eos_token_id": [151329, 151336, 151338],
                "first_k_dense_replace": 1,
                "head_dim": 128,
                "hidden_act": "silu",
                "hidden_size": 4096,
                "initializer_range": 0.02,
                "intermediate_size": 10944,
                "max_position_embeddings": 131072,
                "model_type": "glm4_moe",
                "moe_intermediate_size": 1408,
                "n_group": 1,
                "n_routed_experts": 128,
                "n_shared_experts": 1,
                "norm_topk_prob": True,
                "num_attention_heads": 96,
                "num_experts_per_tok": 8,
                "num_hidden_layers": 46,
                "num_key_value_heads": 8,
                "num_nextn_predict_layers": 1,
                "pad_token_id": 151329,
                "partial_rotary_factor": 0.5,
                "rms_norm_eps": 1e-05,
                "rope_scaling": None,
                "rope_theta": 1000000,
                "routed_scaling_factor": 1.0,
                "tie_word_embeddings": False,
                "topk_group": 1,
                "torch_dtype": "bfloat16",
                "transformers_version": "4.54.0",
                "use_cache": True,
                "use_qk_norm": False,
                "vocab_size": 151552,
            },
        ),
    },
    cases={
        "glm4_moe": Case(
            {},
            {
                **GROUPS,
                **HEAD_DIM,
                **NORMS,
                **{f"bias of {name}": ref.with_weights(f"{name}_proj.bias", 0.0) for name in "qkv"},
                "rotated columns": ref.with_config(**ALL_COLUMNS),
                "scale": ref.with_config(routed_scaling_factor=1.0),
                "shared expert": ref.with_weights("shared_experts.down_proj.weight", 0.0),
                "renormalised": ref.with_config(norm_topk_prob=False),
            },
            head=0.3,
        ),
        "glm4_moe norms, groups, all columns": Case(
            {"use_qk_norm": True, "n_group": 4, "topk_group": 2, "attention_bias": False, **ALL_COLUMNS},
            {**norms(1.0, "q_norm", "k_norm"), "groups": ref.with_config(topk_group=4)},
            head=0.3,
        ),
    },
)
