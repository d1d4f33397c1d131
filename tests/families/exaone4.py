"""Tests' data of `models/exaone4.py`."""

from support import reference_changes as ref
from support.families import FULL, SLIDING, Case, FamilyData, Published
from support.parity_options import GROUPS, norms

DATA = FamilyData(
    architecture="Exaone4ForCausalLM",
    variant=True,
    config=dict(sliding_window=9, layer_types=[SLIDING, FULL]),
    published={
        "EXAONE-4.0-32B": Published(
            "LGAI-EXAONE/EXAONE-4.0-32B", "from memory of the published values; not compared with the file"
        ),
    },
    cases={
        "exaone4": Case(
            {},
            {
                **GROUPS,
                "q and k norm": ref.with_attention(ref.without_qk_norm),
                **norms(
                    1.0, "q_norm", "k_norm", "post_attention_layernorm", "post_feedforward_layernorm", "model.norm"
                ),
                "kinds of layers": ref.with_config(layer_types=[FULL, SLIDING]),
                "window": ref.with_config(sliding_window=30),
            },
            lengths=(8, 9, 10, 36),
        ),
    },
)
