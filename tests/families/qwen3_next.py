"""Tests' data of `models/qwen3_next.py`."""

from support import reference_changes as ref
from support.families import FULL, LINEAR_LAYER, Case, FamilyData, Published
from support.parity_options import rope

DATA = FamilyData(
    architecture="Qwen3NextForCausalLM",
    config=dict(
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=20,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_num_value_heads=4,
        linear_value_head_dim=12,
        layer_types=[LINEAR_LAYER, FULL],
    ),
    defaults={"moe_intermediate_size": 24},
    published={
        "Qwen3-Next-80B-A3B": Published(
            "Qwen/Qwen3-Next-80B-A3B-Instruct",
            "from memory of the published values; not compared with the file",
        ),
    },
    cases={
        "qwen3_next": Case(
            rope("default", partial_rotary_factor=0.5),
            {
                "decay": ref.with_weights("A_log", -4.0),
                "bias of the decay": ref.with_weights("dt_bias", 0.0),
                "convolution": ref.with_weights("conv1d.weight", 0.3),
                "rotated columns": ref.with_config(**rope("default", partial_rotary_factor=1.0)),
                "shared gate": ref.with_weights("shared_expert_gate.weight", 0.0),
                "renormalised": ref.with_config(norm_topk_prob=False),
                "one more than the weight": ref.norms_as_kept,
            },
            lengths=(1, 23, 24, 7),
            tolerance=5e-4,
        ),
    },
)
