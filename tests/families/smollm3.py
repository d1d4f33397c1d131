"""Tests' data of `models/smollm3.py`."""

from support import reference_changes as ref
from support.families import FULL, Case, FamilyData, Published
from support.parity_options import BIASES, GROUPS, HEAD_DIM

DATA = FamilyData(
    architecture="SmolLM3ForCausalLM",
    variant=True,
    config=dict(no_rope_layers=[1, 0], tie_word_embeddings=False),
    published={
        "SmolLM3-3B": Published(
            "HuggingFaceTB/SmolLM3-3B", "from memory of the published values; not compared with the file"
        ),
    },
    cases={
        "smollm3": Case({}, {**GROUPS, **HEAD_DIM, "layers without rope": ref.with_config(no_rope_layers=[1, 1])}),
        "smollm3 window, biases": Case(
            {
                "num_hidden_layers": 4,
                "no_rope_layers": None,
                "use_sliding_window": True,
                "sliding_window": 9,
                "attention_bias": True,
                "mlp_bias": True,
            },
            {**BIASES, "window": ref.with_config(layer_types=[FULL] * 4)},
            lengths=(8, 9, 10, 37),
            head=1.5,
        ),
    },
)
