"""Tests' data of `models/gemma3.py`."""

from support import reference_changes as ref
from support.families import FULL, SLIDING, Case, FamilyData, Published
from support.parity_options import GEMMA, GLOBAL, GROUPS, LOCAL, norms, rope, ropes

DATA = FamilyData(
    architecture="Gemma3ForCausalLM",
    config=dict(sliding_window=7, query_pre_attn_scalar=8, layer_types=[SLIDING, FULL]),
    published={
        "gemma-3-1b": Published("google/gemma-3-1b-it", "the Hub's file, as earlier tests of this repository had it"),
        "gemma-3-270m": Published(
            "google/gemma-3-270m", "from memory of the published values; not compared with the file"
        ),
        "gemma-3-4b": Published("google/gemma-3-4b-it", "the Hub's file, as earlier tests of this repository had it"),
    },
    cases={
        "gemma3": Case(
            ropes(GLOBAL, LOCAL),
            {
                **GROUPS,
                **GEMMA,
                "q and k norm": ref.with_attention(ref.without_qk_norm),
                **norms(0.0, "q_norm", "k_norm"),
                "local rope": ref.with_config(**ropes(GLOBAL, GLOBAL)),
                "global rope": ref.with_config(**ropes(LOCAL, LOCAL)),
            },
            lengths=(6, 7, 8, 41),
        ),
        "gemma3 five to one, linear, logit softcap": Case(
            {
                "num_hidden_layers": 6,
                "layer_types": None,
                "sliding_window": 4,
                "final_logit_softcapping": 3.0,
                **ropes(rope("linear", rope_theta=1e6, factor=8.0), LOCAL),
            },
            {
                "linear": ref.with_config(**ropes(GLOBAL, LOCAL)),
                "logit softcap": ref.with_config(final_logit_softcapping=None),
            },
            lengths=(3, 4, 5, 50),
        ),
    },
)
