"""Tests' data of `models/granite.py`."""

from support import reference_changes as ref
from support.families import Case, FamilyData, Published
from support.parity_options import BIASES, GROUPS, NORMS

DATA = FamilyData(
    architecture="GraniteForCausalLM",
    config=dict(embedding_multiplier=1.5, attention_multiplier=0.4, residual_multiplier=0.5, logits_scaling=0.8),
    published={
        "granite-3.1-8b": Published(
            "ibm-granite/granite-3.1-8b-instruct",
            "from memory of the published values; not compared with the file",
        ),
    },
    cases={
        "granite": Case(
            {},
            {
                **GROUPS,
                **NORMS,
                **{
                    name: ref.with_config(**{name: 1.0})
                    for name in (
                        "embedding_multiplier",
                        "attention_multiplier",
                        "residual_multiplier",
                        "logits_scaling",
                    )
                },
            },
        ),
        "granite biases, tied": Case(
            {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, BIASES, head=1.5
        ),
    },
)
