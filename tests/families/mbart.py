"""Tests' data of `models/mbart.py`."""

from support.families import FamilyData, Published

DATA = FamilyData(
    published={
        "mbart-large-50": Published(
            "facebook/mbart-large-50-many-to-many-mmt",
            "a copy of the Hub's file in a public GitHub repository; verbatim but for a path in _name_or_path",
        ),
    },
)
