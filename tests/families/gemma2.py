"""Tests' data of `models/gemma2.py`."""

from support import reference_changes as ref
from support.families import Case, FamilyData, Published
from support.parity_options import BIASES, GEMMA, GROUPS

DATA = FamilyData(
    architecture="Gemma2ForCausalLM",
    # A sliding-window layer and a full-attention layer: two groups on one cache array.
    config=dict(sliding_window=10, query_pre_attn_scalar=8, attn_logit_softcapping=2.0, final_logit_softcapping=4.0),
    published={
        "gemma-2-2b": Published("google/gemma-2-2b", "the Hub's file, as earlier tests of this repository had it"),
        "gemma-2-9b": Published(
            "google/gemma-2-9b-it", "a copy of the Hub's file in a public GitHub repository; verbatim"
        ),
    },
    cases={
        "gemma2": Case(
            {},
            {
                **GROUPS,
                **GEMMA,
                "attention softcap": ref.with_config(attn_logit_softcapping=None),
                "logit softcap": ref.with_config(final_logit_softcapping=None),
            },
            lengths=(9, 10, 11, 33),
        ),
        "gemma2 no caps, biases, window of a chunk": Case(
            {
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
                "attention_bias": True,
                "sliding_window": 16,
                "tie_word_embeddings": False,
            },
            BIASES,
            lengths=(15, 16, 17, 1),
        ),
    },
)
