"""The small trained checkpoint that ships with the package, and questions it can answer."""

from __future__ import annotations

import pathlib

from jaxinfer.demo.corpus import Question as Question
from jaxinfer.demo.corpus import heldout_questions as heldout_questions
from jaxinfer.demo.documents import shared_prefix as shared_prefix

_SAMPLES = (
    ("What is 17 plus 25?", "is 42"),
    ("What is the capital of France?", "Paris"),
    ("Which is larger, 38 or 83?", "83 is larger"),
    ("What is the opposite of hot?", "cold"),
    ("What is 8 + 9?", "is 17"),
    ("What colour is grass?", "green"),
    ("What day comes after Monday?", "Tuesday"),
    ("What is the sum of 64 and 36?", "is 100"),
    ("What is the plural of mouse?", "mice"),
    ("What sound does a cow make?", "moo"),
    ("Which is smaller, 71 or 17?", "17 is smaller"),
    ("Tell me the capital of Japan.", "Tokyo"),
    ("How much is 99 plus 99?", "is 198"),
    ("What is a young dog called?", "puppy"),
    ("Which month comes before May?", "April"),
    ("What number comes after 41?", "42"),
    ("Oslo is the capital of which country?", "Norway"),
    ("Add 50 and 7.", "is 57"),
    ("What is the emoji of a cat?", "🐱"),
    ("What is the opposite of early?", "late"),
)


def path() -> pathlib.Path:
    """Return the directory of the packaged checkpoint, to pass to `LLM` as the model."""
    return pathlib.Path(__file__).parent / "checkpoint"


def sample_questions() -> list[tuple[str, str]]:
    """Return the 20 built-in questions, each with a text that a correct answer contains."""
    return list(_SAMPLES)
