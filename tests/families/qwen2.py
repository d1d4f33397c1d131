"""Tests' data of `models/qwen2.py`."""

from support import reference_changes as ref
from support.families import SLIDING, Case, FamilyData, Published
from support.parity_options import GROUPS, HEAD_DIM, no_window, windowed

DATA = FamilyData(
    architecture="Qwen2ForCausalLM",
    published={
        "Qwen2.5-7B": Published("Qwen/Qwen2.5-7B", "from memory of the published values; not compared with the file"),
    },
    cases={
        "qwen2": Case(
            {}, {**GROUPS, **HEAD_DIM, **{f"bias of {n}": ref.with_weights(f"{n}_proj.bias", 0.0) for n in "qkv"}}
        ),
        "qwen2 tied": Case({"tie_word_embeddings": True, "head_dim": None}),
        "qwen2 windows from layer 1": Case(
            windowed(7, num_hidden_layers=3, max_window_layers=1),
            {
                "window": no_window(3),
                "layers": ref.with_config(layer_types=[SLIDING] * 3),
                "its last position": ref.with_config(sliding_window=6),
            },
            lengths=(6, 7, 8, 42),
        ),
        "qwen2 use_sliding_window off": Case({"sliding_window": 4, "use_sliding_window": False}),
    },
)
