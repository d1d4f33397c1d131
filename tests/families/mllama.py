"""Tests' data of `models/mllama/`."""

from support.families import FamilyData, Published

DATA = FamilyData(
    published={
        "Llama-3.2-11B-Vision": Published(
            "meta-llama/Llama-3.2-11B-Vision", "from memory of the published values; not compared with the file"
        ),
    },
)
