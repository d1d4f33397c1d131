"""Tests' data of `models/olmo2.py`."""

from support import reference_changes as ref
from support.families import Case, FamilyData, Published
from support.parity_options import BIASES, GROUPS, norms

DATA = FamilyData(
    architecture="Olmo2ForCausalLM",
    variant=True,
    published={
        "OLMo-2-1B": Published(
            "allenai/OLMo-2-0425-1B", "sizes as printed in a public GitHub repository; the rest from memory"
        ),
    },
    cases={
        "olmo2": Case(
            {"attention_bias": True},
            {
                **GROUPS,
                **BIASES,
                "q and k norm": ref.with_attention(ref.without_qk_norm),
                **norms(
                    1.0, "q_norm", "k_norm", "post_attention_layernorm", "post_feedforward_layernorm", "model.norm"
                ),
            },
        ),
    },
)
