"""Tests' data of `models/mixtral.py`."""

from support import reference_changes as ref
from support.families import Case, FamilyData, Published
from support.parity_options import GROUPS, activation

DATA = FamilyData(
    architecture="MixtralForCausalLM",
    config=dict(num_local_experts=6, num_experts_per_tok=2),
    published={
        "Mixtral-8x7B-v0.1": Published(
            "mistralai/Mixtral-8x7B-v0.1", "NVIDIA aiconfigurator (GitHub), model_configs; verbatim"
        ),
    },
    cases={
        "mixtral": Case(
            {},
            {
                **GROUPS,
                "router": ref.with_weights("mlp.gate.weight", 0.0),
                "experts of a token": ref.with_config(num_experts_per_tok=1),
                "gelu": activation("gelu"),
            },
        ),
        "mixtral window, gelu, one of its experts": Case(
            {"sliding_window": 12, "hidden_act": "gelu", "num_experts_per_tok": 1},
            {"window": ref.with_config(sliding_window=None), "gelu": activation("silu")},
            lengths=(11, 12, 13, 28),
        ),
    },
)
