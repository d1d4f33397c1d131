"""Tests' data of `models/qwen3_moe.py`."""

from support import reference_changes as ref
from support.families import Case, FamilyData, Published

DATA = FamilyData(
    architecture="Qwen3MoeForCausalLM",
    config=dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24, norm_topk_prob=True),
    published={
        "Qwen3-30B-A3B": Published("Qwen/Qwen3-30B-A3B", "NVIDIA aiconfigurator (GitHub), model_configs; verbatim"),
        "Qwen3-Coder-480B-A35B": Published(
            "Qwen/Qwen3-Coder-480B-A35B-Instruct", "NVIDIA aiconfigurator (GitHub), model_configs; verbatim"
        ),
    },
    cases={
        "qwen3_moe": Case(
            {},
            {
                "q and k norm": ref.with_attention(ref.without_qk_norm),
                "norm_topk_prob": ref.with_config(norm_topk_prob=False),
                "router": ref.with_weights("mlp.gate.weight", 0.0),
                "experts of a token": ref.with_config(num_experts_per_tok=2),
            },
        ),
        "qwen3_moe not renormalised, every expert": Case(
            {"norm_topk_prob": False, "num_experts_per_tok": 8, "attention_bias": True, "tie_word_embeddings": True},
        ),
        "qwen3_moe some layers": Case(
            {
                "num_hidden_layers": 4,
                "decoder_sparse_step": 2,
                "mlp_only_layers": [1],
                "norm_topk_prob": False,
                "intermediate_size": 40,
            },
            {"norm_topk_prob": ref.with_config(norm_topk_prob=True)},
        ),
    },
)
