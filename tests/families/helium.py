"""Tests' data of `models/helium.py`."""

from support import reference_changes as ref
from support.families import Case, FamilyData, Published
from support.parity_options import GROUPS, NORMS

DATA = FamilyData(
    architecture="HeliumForCausalLM",
    variant=True,
    # transformers' o_proj is square, so that head_dim must be hidden_size / heads.
    config=dict(hidden_size=64),
    defaults={"num_attention_heads": 20},
    published={
        "helium-1-preview-2b": Published(
            "kyutai/helium-1-preview-2b",
            "the defaults of transformers' HeliumConfig, made for this model; not compared with the file",
        ),
    },
    cases={
        "helium": Case({}, {**GROUPS, **NORMS, "neighbouring columns": ref.with_attention(ref.rope_over_halves)}),
        "helium biases, tied": Case(
            {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
            {
                f"bias of {name}": ref.with_weights(f"{name}_proj.bias", 0.0)
                for name in ("q", "k", "v", "gate", "up", "down")
            },
            head=1.5,
        ),
    },
)
