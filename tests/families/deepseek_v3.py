"""Tests' data of `models/deepseek_v3.py`."""

from support import reference_changes as ref
from support.families import LATENT, Case, FamilyData, Published
from support.parity_options import PLAIN, rope, yarn

DATA = FamilyData(
    architecture="DeepseekV3ForCausalLM",
    config=LATENT
    | dict(
        n_routed_experts=8,
        n_group=4,
        topk_group=2,
        q_lora_rank=20,
        first_k_dense_replace=1,
        attention_bias=False,
    ),
    defaults={"n_routed_experts": 32, "moe_intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 4},
    published={
        "DeepSeek-V3": Published("deepseek-ai/DeepSeek-V3", "NVIDIA aiconfigurator (GitHub), model_configs; verbatim"),
    },
    cases={
        "deepseek_v3": Case(
            rope("default"),
            {
                "groups": ref.with_config(topk_group=4),
                "query latent's norm": ref.with_weights("q_a_layernorm.weight", 1.0),
                "latent's norm": ref.with_weights("kv_a_layernorm.weight", 1.0),
                "pairs": ref.with_config(rope_interleave=False),
                "scale": ref.with_config(routed_scaling_factor=1.0),
                "shared expert": ref.with_weights("shared_experts.down_proj.weight", 0.0),
                "renormalised": ref.with_config(norm_topk_prob=False),
            },
            head=0.3,
        ),
        "deepseek_v3 yarn, no query latent, biases": Case(
            {
                "q_lora_rank": None,
                "attention_bias": True,
                "rope_interleave": False,
                "n_group": 1,
                "topk_group": 1,
                **yarn(mscale=1.0, mscale_all_dim=0.8),
            },
            {"yarn": PLAIN, "scores": ref.with_config(**yarn(mscale=1.0, mscale_all_dim=0.1))},
            lengths=(15, 16, 17, 9),
            head=0.3,
        ),
    },
)
