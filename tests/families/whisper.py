"""Tests' data of `models/whisper/`."""

from support.families import FamilyData, Published

DATA = FamilyData(
    published={
        "whisper-large-v3": Published(
            "openai/whisper-large-v3", "a copy that transformers 5.5 saved, in a public GitHub repository"
        ),
        "whisper-tiny": Published(
            "openai/whisper-tiny", "from memory of the published values; not compared with the file"
        ),
    },
)
