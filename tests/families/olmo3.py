"""Tests' data of `models/olmo3.py`."""

from support import reference_changes as ref
from support.families import FULL, SLIDING, Case, FamilyData, Published
from support.parity_options import BIASES, GROUPS, LOCAL, norms, ropes, yarn

DATA = FamilyData(
    architecture="Olmo3ForCausalLM",
    config=dict(sliding_window=9, layer_types=[SLIDING, FULL]),
    published={
        "Olmo-3-7B": Published("allenai/Olmo-3-1025-7B", "the Hub's file, as earlier tests of this repository had it"),
    },
    cases={
        "olmo3": Case(
            {},
            {
                **GROUPS,
                "q and k norm": ref.with_attention(ref.without_qk_norm),
                **norms(
                    1.0, "q_norm", "k_norm", "post_attention_layernorm", "post_feedforward_layernorm", "model.norm"
                ),
                **{
                    f"no {name}": ref.without(name)
                    for name in ("post_attention_layernorm", "post_feedforward_layernorm")
                },
                "kinds of layers": ref.with_config(layer_types=[FULL, SLIDING]),
                "window": ref.with_config(layer_types=[FULL] * 2),
            },
            lengths=(8, 9, 10, 36),
        ),
        "olmo3 three to one, yarn, biases, mha": Case(
            {
                "num_hidden_layers": 4,
                "layer_types": None,
                "attention_bias": True,
                "num_key_value_heads": 4,
                **ropes(yarn(), LOCAL),
            },
            {
                **BIASES,
                "yarn": ref.with_config(**ropes(LOCAL, LOCAL)),
                "of full layers": ref.with_config(**ropes(yarn(), yarn())),
            },
            lengths=(15, 16, 17, 9),
        ),
    },
)
