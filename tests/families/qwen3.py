"""Tests' data of `models/qwen3.py`."""

from support import reference_changes as ref
from support.families import FULL, SLIDING, Case, FamilyData, Published
from support.parity_options import GROUPS, no_window, windowed

DATA = FamilyData(
    architecture="Qwen3ForCausalLM",
    published={
        "Qwen3-8B": Published("Qwen/Qwen3-8B", "NVIDIA aiconfigurator (GitHub), model_configs; verbatim"),
    },
    cases={
        "qwen3": Case(
            {},
            {
                **GROUPS,
                "q and k norm": ref.with_attention(ref.without_qk_norm),
                **{f"weight of {n}_norm": ref.with_weights(f"{n}_norm.weight", 1.0) for n in "qk"},
            },
        ),
        "qwen3 attention_bias, tied": Case(
            {"attention_bias": True, "tie_word_embeddings": True},
            {f"bias of {n}": ref.with_weights(f"{n}_proj.bias", 0.0) for n in "qkvo"},
        ),
        "qwen3 alternating": Case(
            windowed(9, num_hidden_layers=4, layer_types=[SLIDING, FULL] * 2),
            {"window": no_window(4), "layers": ref.with_config(layer_types=[FULL, SLIDING] * 2)},
            lengths=(8, 9, 10, 37),
        ),
        "qwen3 five to one": Case(
            windowed(5, num_hidden_layers=6, layer_types=[SLIDING] * 5 + [FULL]),
            {"window": no_window(6)},
            lengths=(4, 5, 6, 49),
        ),
    },
)
