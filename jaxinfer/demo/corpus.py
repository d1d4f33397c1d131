"""Questions with known answers, for training and evaluating the packaged checkpoint.

Everything is generated deterministically and without torch, so that the training script, the tests and the command line
use the same questions.

Held-out data: a sum or comparison is held out by its unordered pair of numbers, in every phrasing and order, so a
held-out sum has to be computed. A fact cannot be computed, so exactly one phrasing of each fact is held out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable
from typing import Literal

from jaxinfer.demo import facts

Split = Literal["train", "heldout"]

LARGEST = 99
"""Largest number in a question; sums reach twice that."""

_HELD_OUT_IN = 10  # one pair of numbers in ten is held out

_SUM_PHRASINGS = (
    "What is {a} plus {b}?",
    "What is {a} + {b}?",
    "How much is {a} plus {b}?",
    "What is the sum of {a} and {b}?",
    "Add {a} and {b}.",
    "Can you add {a} and {b}?",
)
_COMPARE_PHRASINGS = (
    "Which is {word}, {a} or {b}?",
    "Which number is {word}, {a} or {b}?",
    "What is {word}, {a} or {b}?",
    "Is {a} or {b} {word}?",
)
_NEIGHBOUR_PHRASINGS = (
    "What number comes {word} {a}?",
    "Which number comes {word} {a}?",
    "Name the number {word} {a}.",
    "What comes {word} {a}?",
)
_COUNT_PHRASINGS = (
    "Count from {a} to {b}.",
    "Please count from {a} to {b}.",
    "Name the numbers from {a} to {b}.",
    "Can you count from {a} to {b}?",
)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question and the only sentence accepted as its answer."""

    text: str
    """The question as a person asks it: `What is 17 plus 25?`"""
    answer: str
    """The whole expected answer: `17 plus 25 is 42.`"""
    kind: str
    """`sum`, `compare`, `neighbour`, `count`, `fact` or `talk`."""

    @property
    def prompt(self) -> str:
        """Completion prompt, to be continued by the answer."""
        return f"Question: {self.text}\nAnswer:"

    @property
    def chat_messages(self) -> list[dict[str, str]]:
        """The question as a chat of one user message."""
        return [{"role": "user", "content": self.text}]

    def is_correct(self, text: str) -> bool:
        """Return whether `text`, decoded without special tokens, is the answer and nothing else.

        The model must also have stopped: an answer followed by anything but white space is wrong.
        """
        return text.strip() == self.answer


def _bucket(key: str, buckets: int) -> int:
    """Hash `key` to [0, buckets), identically in every process, unlike `hash()`."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % buckets


def is_pair_held_out(kind: str, a: int, b: int) -> bool:
    """Return whether training texts of this kind must not use the numbers a and b together, in either order."""
    return _bucket(f"{kind}:{min(a, b)}:{max(a, b)}", _HELD_OUT_IN) == 0


def held_out_phrasing(kind: str, key: str, phrasings: int) -> int:
    """Return the index of the phrasing of this fact that is held out from training."""
    return _bucket(f"{kind}:{key}", phrasings)


def _pick(rng: random.Random, phrasings: tuple[str, ...], split: Split, kind: str, key: str) -> str:
    held = held_out_phrasing(kind, key, len(phrasings))
    if split == "heldout":
        return phrasings[held]
    return rng.choice(phrasings[:held] + phrasings[held + 1 :])


def _pair(rng: random.Random, split: Split, kind: str) -> tuple[int, int]:
    """Draw two numbers of this split, possibly equal; one draw in six is of small numbers."""
    while True:
        top = 12 if rng.random() < 1 / 6 else LARGEST
        a, b = rng.randint(0, top), rng.randint(0, top)
        if is_pair_held_out(kind, a, b) == (split == "heldout"):
            return a, b


def _sum(rng: random.Random, split: Split) -> Question:
    a, b = _pair(rng, split, "sum")
    return Question(rng.choice(_SUM_PHRASINGS).format(a=a, b=b), f"{a} plus {b} is {a + b}.", "sum")


def _compare(rng: random.Random, split: Split) -> Question:
    a, b = _pair(rng, split, "compare")
    while a == b:
        a, b = _pair(rng, split, "compare")
    asked, said, best = rng.choice((("larger", "larger", max), ("bigger", "larger", max), ("smaller", "smaller", min)))
    first = best(a, b)
    text = rng.choice(_COMPARE_PHRASINGS).format(word=asked, a=a, b=b)
    return Question(text, f"{first} is {said} than {a + b - first}.", "compare")


def _neighbour(rng: random.Random, split: Split) -> Question:
    word, shift = rng.choice((("after", 1), ("before", -1)))
    a = rng.randint(max(0, -shift), LARGEST)
    text = _pick(rng, _NEIGHBOUR_PHRASINGS, split, "neighbour", f"{word} {a}").format(word=word, a=a)
    return Question(text, f"{a + shift} comes {word} {a}.", "neighbour")


def _count(rng: random.Random, split: Split) -> Question:
    a, b = sorted(_pair(rng, split, "count"))
    while not 1 <= b - a <= 40:
        a, b = sorted(_pair(rng, split, "count"))
    text = rng.choice(_COUNT_PHRASINGS).format(a=a, b=b)
    return Question(text, ", ".join(map(str, range(a, b + 1))) + ".", "count")


def _fact(rng: random.Random, split: Split) -> Question:
    fact = rng.choice(facts.all_facts())
    return Question(_pick(rng, fact.phrasings, split, "fact", fact.answer), fact.answer, "fact")


def _talk(rng: random.Random, split: Split) -> Question:
    fact = rng.choice(facts.SMALL_TALK)
    return Question(_pick(rng, fact.phrasings, split, "talk", fact.answer), fact.answer, "talk")


_KINDS: dict[str, Callable[[random.Random, Split], Question]] = {
    "sum": _sum,
    "compare": _compare,
    "neighbour": _neighbour,
    "count": _count,
    "fact": _fact,
    "talk": _talk,
}
# Counting is not in the held-out share: its answers take up to 160 tokens, all others less than 32.
_SHARES: dict[Split, dict[str, float]] = {
    "train": {"sum": 0.46, "compare": 0.13, "neighbour": 0.05, "count": 0.015, "fact": 0.32, "talk": 0.025},
    "heldout": {"sum": 0.5, "compare": 0.2, "neighbour": 0.05, "fact": 0.25},
}


def draw(rng: random.Random, split: Split) -> Question:
    """Draw a random question of the split, of a kind drawn by the split's shares."""
    shares = _SHARES[split]
    return _KINDS[rng.choices(list(shares), list(shares.values()))[0]](rng, split)


def questions(split: Split, n: int, seed: int = 0) -> list[Question]:
    """Return the first `n` distinct questions of a split for this seed; deterministic.

    Raises:
        ValueError: `n` is negative or above 5000, more than the smaller kinds can provide.
    """
    if not 0 <= n <= 5000:
        raise ValueError(f"n must be from 0 to 5000, got {n}.")
    rng = random.Random(f"{split}:{seed}")
    found: dict[str, Question] = {}
    while len(found) < n:
        question = draw(rng, split)
        found.setdefault(question.text, question)
    return list(found.values())


def heldout_questions(n: int = 200, seed: int = 0) -> list[Question]:
    """Return `n` distinct questions held out from training; every answer is shorter than 32 tokens."""
    return questions("heldout", n, seed)
