"""Tests' data of `models/bart.py`."""

from support.families import FamilyData, Published

DATA = FamilyData(
    published={
        "bart-large-cnn": Published(
            "facebook/bart-large-cnn", "a copy of the Hub's file in a public GitHub repository; verbatim"
        ),
    },
)
