"""Tests' data of `models/seed_oss.py`."""

from support import reference_changes as ref
from support.families import Case, FamilyData, Published
from support.parity_options import GROUPS

DATA = FamilyData(
    architecture="SeedOssForCausalLM",
    variant=True,
    published={
        "Seed-OSS-36B": Published(
            "ByteDance-Seed/Seed-OSS-36B-Instruct",
            "from memory of the published values; not compared with the file",
        ),
    },
    cases={
        "seed_oss": Case(
            {"attention_out_bias": True, "mlp_bias": True},
            {
                **GROUPS,
                **{
                    f"bias of {n}": ref.with_weights(f"{n}_proj.bias", 0.0)
                    for n in ("q", "k", "v", "o", "gate", "up", "down")
                },
            },
            head=1.5,
        ),
    },
)
