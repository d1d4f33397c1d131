"""Tests' data of `models/ernie4_5.py`."""

from support import reference_changes as ref
from support.families import Case, FamilyData, Published
from support.parity_options import GROUPS, HEAD_DIM

DATA = FamilyData(
    architecture="Ernie4_5ForCausalLM",
    variant=True,
    config=dict(tie_word_embeddings=False),
    published={
        "ERNIE-4.5-0.3B": Published(
            "baidu/ERNIE-4.5-0.3B-PT", "from memory of the published values; not compared with the file"
        ),
    },
    cases={
        "ernie4_5": Case(
            {"use_bias": True},
            {
                **GROUPS,
                **HEAD_DIM,
                "rope over neighbouring columns": ref.with_attention(ref.rope_over_halves),
                **{
                    f"bias of {n}": ref.with_weights(f"{n}_proj.bias", 0.0)
                    for n in ("q", "k", "v", "o", "gate", "up", "down")
                },
            },
        ),
    },
)
