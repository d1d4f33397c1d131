"""Tests' data of `models/kimi_linear.py`."""

from support import reference_changes as ref
from support.families import FULL, LATENT, LINEAR_LAYER, Case, FamilyData, Published

DATA = FamilyData(
    architecture="KimiLinearForCausalLM",
    config=LATENT
    | dict(
        num_local_experts=6,
        linear_num_heads=4,
        linear_head_dim=8,
        layer_types=[LINEAR_LAYER, FULL],
    ),
    defaults={"moe_intermediate_size": 24, "num_attention_heads": 32},
    published={
        "Kimi-Linear-48B-A3B": Published(
            "moonshotai/Kimi-Linear-48B-A3B-Instruct",
            "the Hub's file, as earlier tests of this repository had it",
        ),
    },
    cases={
        "kimi_linear": Case(
            {},
            {
                "decay": ref.with_weights("A_log", -4.0),
                "bias of the decay": ref.with_weights("dt_bias", 0.0),
                "convolution": ref.with_weights("conv1d.weight", 0.3),
                "gated norm": ref.with_weights("o_norm.weight", 1.0),
                "gate": ref.with_weights("g_b_proj.weight", 0.0),
                "strength": ref.with_weights("b_proj.weight", 0.0),
            },
            lengths=(15, 16, 17, 16),
            tolerance=5e-4,
        ),
    },
)
