"""Training texts: questions and answers formatted the way people prompt a model.

A document is a list of chat messages or plain pieces, each with a loss weight for its tokens. Forms: a bare question,
`Question:`/`Answer:` pairs, a statement to complete, and a chat of up to five turns; each with or without an
instruction in front.
"""

from __future__ import annotations

import dataclasses
import random

from jaxinfer.demo.corpus import Question, draw

PROMPT_WEIGHT = 0.05
"""Loss weight of user text: enough for the model to learn it, too little to compete with the answers."""

_OPENINGS = (
    "You are a helpful assistant who answers small questions in one sentence.",
    "You are a careful helper who answers every question with one short sentence.",
    "This is a list of questions, each with a short answer.",
    "Answer the question below in one short sentence.",
    "You are a friendly teacher and you answer small questions of children.",
)
_RULES = (
    "Use plain words and do not add anything else.",
    "When you are asked for a sum, name both numbers and then the result.",
    "When you are asked to compare two numbers, say which one is larger or smaller.",
    "When you are asked for a fact, tell it in a whole sentence.",
    "Do not explain how you found the answer.",
    "If you are greeted, be kind.",
    "Write in English and end the sentence with a full stop.",
    "Think before you answer, and be exact with numbers.",
)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A run of text in a document."""

    text: str
    weight: float
    """Loss weight of these tokens."""
    closed: bool = False
    """Whether the end token follows, with loss weight 1."""


@dataclasses.dataclass(frozen=True)
class Document:
    """A training text; `roles` has one role per piece for a chat and is empty for plain text."""

    pieces: tuple[Piece, ...]
    roles: tuple[str, ...] = ()


def shared_prefix() -> str:
    """Return the instruction that `scripts/generate.py --add-prefix` puts before each question.

    It has about 60 tokens, so several cache blocks are shared by all questions, and ends with a blank line.
    """
    return " ".join((_OPENINGS[0], _RULES[0], _RULES[1], _RULES[3])) + "\n\n"


def instruction(rng: random.Random) -> str:
    """Draw a random instruction: an opening sentence and up to four rules in random order."""
    return " ".join([rng.choice(_OPENINGS), *rng.sample(_RULES, rng.randint(0, 4))])


def _as_typed(rng: random.Random, question: Question) -> str:
    """Return the question as typed in a hurry, now and then: without capital or final punctuation."""
    text = question.text
    if rng.random() < 0.06:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.06:
        text = text.rstrip("?.!")
    return text


def _plain(rng: random.Random, front: str) -> Document:
    form = rng.choices(("pairs", "bare", "statement"), (0.5, 0.33, 0.17))[0]
    if form == "statement":
        return Document((Piece(front, PROMPT_WEIGHT), Piece(draw(rng, "train").answer, 0.5, closed=True)))
    shots = rng.choice((1, 1, 2, 3)) if form == "pairs" else 1
    pieces = []
    for shot in range(shots):
        question = draw(rng, "train")
        asked = _as_typed(rng, question)
        asked = f"Question: {asked}\nAnswer:" if form == "pairs" else asked
        lead = front if shot == 0 else "\n\n"
        # Text after an earlier answer has no weight: the model must learn to stop after an answer.
        pieces += [Piece(lead + asked, PROMPT_WEIGHT if shot == 0 else 0.0)]
        pieces += [Piece(" " + question.answer, 1.0, closed=shot == shots - 1)]
    return Document(tuple(pieces))


def _chat(rng: random.Random, system: str) -> Document:
    pieces, roles = [], []
    if system:
        pieces.append(Piece(system, PROMPT_WEIGHT))
        roles.append("system")
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4, 5))):
        question = draw(rng, "train")
        pieces += [Piece(_as_typed(rng, question), PROMPT_WEIGHT), Piece(question.answer, 1.0, closed=True)]
        roles += ["user", "assistant"]
    return Document(tuple(pieces), tuple(roles))


def training_document(rng: random.Random) -> Document:
    """Draw a random training text; it never contains a held-out question."""
    front = instruction(rng) if rng.random() < 0.3 else ""
    if rng.random() < 0.5:
        return _chat(rng, front)
    return _plain(rng, front + rng.choice((" ", "\n", "\n\n")) if front else "")
