"""Tests' data of `models/phi3.py`."""

from support import reference_changes as ref
from support.families import Case, FamilyData, Published
from support.parity_options import GROUPS, HEAD_DIM, LONG, NORMS, PHI3_HEADS, PLAIN, SHORT, longrope, rope

DATA = FamilyData(
    architecture="Phi3ForCausalLM",
    published={
        "Phi-3-mini-4k": Published(
            "microsoft/Phi-3-mini-4k-instruct",
            "from memory of the published values; not compared with the file",
        ),
        "Phi-4-mini": Published(
            "microsoft/Phi-4-mini-instruct", "a copy of the Hub's file in a public GitHub repository; verbatim"
        ),
    },
    cases={
        "phi3 window": Case({"sliding_window": 8}, {"window": ref.with_config(sliding_window=None)}),
        "phi3": Case({}, {**GROUPS, **HEAD_DIM, **NORMS}),
        "phi3 partial rotary": Case(rope("default", partial_rotary_factor=0.5), {"partial rotary": PLAIN}),
        # transformers discards Phi-3's cache when a sequence grows past the original length, and so does jaxinfer.
        "phi3 longrope across": Case(longrope(32) | PHI3_HEADS),
        "phi3 longrope short": Case(
            longrope(128) | PHI3_HEADS, {"short": ref.with_config(**longrope(128, short_factor=LONG))}
        ),
        "phi3 longrope long": Case(
            longrope(8) | PHI3_HEADS, {"long": ref.with_config(**longrope(8, long_factor=SHORT))}, (9, 17, 38)
        ),
    },
)
