"""Tests' data of `models/lfm2_moe.py`."""

from support import reference_changes as ref
from support.families import FULL, Case, FamilyData, Published

from families.lfm2 import CONV

DATA = FamilyData(
    architecture="Lfm2MoeForCausalLM",
    variant=True,
    config=dict(
        rms_norm_eps=None,
        norm_eps=1e-5,
        head_dim=None,
        hidden_size=64,
        conv_L_cache=4,
        num_hidden_layers=3,
        layer_types=[CONV, FULL, CONV],
        tie_word_embeddings=False,
        num_dense_layers=1,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        routed_scaling_factor=1.5,
    ),
    defaults={"layer_types": [CONV, FULL, CONV, FULL]},
    published={
        "LFM2-8B-A1B": Published(
            "LiquidAI/LFM2-8B-A1B",
            "from memory of the published values; not compared with the file",
            dict(
                architectures=["Lfm2MoeForCausalLM"],
                bos_token_id=1,
                conv_L_cache=3,
                conv_bias=False,
                dtype="bfloat16",
                eos_token_id=7,
                hidden_size=2048,
                initializer_range=0.02,
                intermediate_size=7168,
                layer_types=[FULL if i in (2, 6, 10, 14, 18, 21) else CONV for i in range(24)],
                max_position_embeddings=128000,
                model_type="lfm2_moe",
                moe_intermediate_size=1792,
                norm_eps=1e-05,
                norm_topk_prob=True,
                num_attention_heads=32,
                num_dense_layers=2,
                num_experts=32,
                num_experts_per_tok=4,
                num_hidden_layers=24,
                num_key_value_heads=8,
                pad_token_id=0,
                rope_theta=1000000.0,
                routed_scaling_factor=1.0,
                transformers_version="4.57.0.dev0",
                use_cache=True,
                use_expert_bias=True,
                vocab_size=65536,
            ),
        ),
    },
    cases={
        "lfm2_moe": Case(
            {},
            {
                "renormalised": ref.with_config(norm_topk_prob=False),
                "scale of the experts": ref.with_config(routed_scaling_factor=1.0),
                "bias of the experts' choice": ref.with_config(use_expert_bias=False),
                "experts": ref.with_weights("experts.down_proj", 0.0),
            },
        ),
    },
)
