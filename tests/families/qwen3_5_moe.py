"""Tests' data of `models/qwen3_5_moe.py`."""

from support import reference_changes as ref
from support.families import FULL, LINEAR_LAYER, Case, FamilyData, Published

from families.qwen3_5 import HYBRID, LINEAR_ATTENTION, MEMORY, MULTIMODAL, TEXT, WHOLE

EXPERTS = {
    "hidden_size": 2048,
    "layer_types": [*[LINEAR_LAYER] * 3, FULL] * 10,
    "linear_num_value_heads": 32,
    "model_type": "qwen3_5_moe_text",
    "moe_intermediate_size": 512,
    "num_attention_heads": 16,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
}

DATA = FamilyData(
    architecture="Qwen3_5MoeForCausalLM",
    variant=True,
    config=dict(
        **LINEAR_ATTENTION,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=20,
        intermediate_size=None,
    ),
    defaults={"moe_intermediate_size": 24},
    published={
        "Qwen3.5-35B-A3B": Published(
            "Qwen/Qwen3.5-35B-A3B",
            MEMORY,
            config={
                **WHOLE,
                "architectures": ["Qwen3_5MoeForConditionalGeneration"],
                "model_type": "qwen3_5_moe",
                "text_config": TEXT | EXPERTS,
            },
        ),
        "Qwen3.5-MoE text": Published(
            "none: what transformers writes of the text model",
            "the defaults of transformers' Qwen3_5MoeTextConfig",
            config={**TEXT, **EXPERTS, "architectures": ["Qwen3_5MoeForCausalLM"]},
        ),
    },
    cases={
        "qwen3_5_moe": Case(
            MULTIMODAL,
            {**HYBRID, "shared gate": ref.with_weights("shared_expert_gate.weight", 0.0)},
            lengths=(1, 23, 24, 7),
            tolerance=5e-4,
        ),
    },
)
