"""Tests' data of `models/internvl/`."""

from support.families import FamilyData, Published

DATA = FamilyData(
    published={
        "InternVL3-1B": Published("OpenGVLab/InternVL3-1B", "printed in a public GitHub repository; verbatim"),
        "InternVL3-8B-hf": Published(
            "OpenGVLab/InternVL3-8B-hf", "from memory of the published values; not compared with the file"
        ),
    },
)
