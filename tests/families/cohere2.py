"""Tests' data of `models/cohere2.py`."""

from support import reference_changes as ref
from support.families import FULL, SLIDING, Case, FamilyData, Published
from support.parity_options import BIASES, GROUPS, norms, rope

DATA = FamilyData(
    architecture="Cohere2ForCausalLM",
    config=dict(
        sliding_window=9,
        layer_types=[SLIDING, FULL],
        logit_scale=0.5,
        head_dim=None,
        hidden_size=64,
        tie_word_embeddings=False,
        layer_norm_eps=1e-3,
        rms_norm_eps=None,
    ),
    published={
        "command-r7b": Published(
            "CohereLabs/c4ai-command-r7b-12-2024",
            "from memory of the published values; not compared with the file",
        ),
    },
    cases={
        "cohere2": Case(
            {},
            {
                **GROUPS,
                **norms(1.0, "input_layernorm", "model.norm"),
                "logit_scale": ref.with_config(logit_scale=1.0),
                "layer_norm_eps": ref.with_config(layer_norm_eps=0.3),
                "kinds of layers": ref.with_config(layer_types=[FULL, SLIDING]),
                "window": ref.with_config(sliding_window=40),
                "rope of sliding layers": ref.with_config(**rope("default", rope_theta=50.0)),
            },
            lengths=(8, 9, 10, 36),
        ),
        "cohere2 three to one, biases, tied": Case(
            {
                "num_hidden_layers": 4,
                "layer_types": None,
                "attention_bias": True,
                "tie_word_embeddings": True,
                "logit_scale": 2.0,
            },
            BIASES,
            lengths=(15, 16, 17, 9),
        ),
    },
)
