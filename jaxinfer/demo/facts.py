"""Facts that the packaged checkpoint knows, each with several phrasings of its question.

The tables are plain data. `all_facts()` converts them to `Fact`s: the phrasings of one question and the sentence that
answers them.
"""

from __future__ import annotations

import dataclasses
import functools

from jaxinfer.demo.fact_tables import CAPITALS, COLOURS, DAYS, EMOJI, MONTHS, OPPOSITES, PLURALS, SOUNDS, YOUNG


@dataclasses.dataclass(frozen=True)
class Fact:
    """A fact: all `phrasings` ask for it, and `answer` is the sentence that answers each of them."""

    phrasings: tuple[str, ...]
    answer: str


SMALL_TALK = (
    Fact(("Hello!", "Hello", "Hi!", "Hi there!", "Good day!"), "Hello! Ask me a small question."),
    Fact(
        ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself."),
        "I am a small model that answers small questions.",
    ),
    Fact(
        ("What can you do?", "How can you help me?", "What do you know?", "What can I ask you?"),
        "I can add numbers, compare them and tell small facts.",
    ),
    Fact(("Thank you!", "Thank you.", "Thanks!", "Thanks a lot!"), "You are welcome."),
    Fact(
        (
            "Name the days of the week.",
            "What are the days of the week?",
            "List the days of the week.",
            "Which days are in a week?",
        ),
        ", ".join(DAYS) + ".",
    ),
    Fact(
        (
            "Name the months of the year.",
            "What are the months of the year?",
            "List the months of the year.",
            "Which months are in a year?",
        ),
        ", ".join(MONTHS) + ".",
    ),
)


def _capitals() -> list[Fact]:
    out = []
    for country, city in CAPITALS.items():
        forward = (
            f"What is the capital of {country}?",
            f"Name the capital of {country}.",
            f"Which city is the capital of {country}?",
            f"Tell me the capital of {country}.",
        )
        backward = (
            f"{city} is the capital of which country?",
            f"Which country has the capital {city}?",
            f"What country is {city} the capital of?",
            f"Name the country whose capital is {city}.",
        )
        out.append(Fact(forward, f"The capital of {country} is {city}."))
        out.append(Fact(backward, f"{city} is the capital of {country}."))
    return out


def _opposites() -> list[Fact]:
    pairs = OPPOSITES + tuple((b, a) for a, b in OPPOSITES)
    return [
        Fact(
            (
                f"What is the opposite of {a}?",
                f"Name the opposite of {a}.",
                f"Give the opposite of {a}.",
                f"Which word is the opposite of {a}?",
            ),
            f"The opposite of {a} is {b}.",
        )
        for a, b in pairs
    ]


def _colours() -> list[Fact]:
    return [
        Fact(
            (
                f"What colour is {thing}?",
                f"What is the colour of {thing}?",
                f"Which colour is {thing}?",
                f"Name the colour of {thing}.",
                f"What color is {thing}?",
            ),
            f"{thing[0].upper()}{thing[1:]} is {colour}.",
        )
        for thing, colour in COLOURS.items()
    ]


def _words() -> list[Fact]:
    plurals = [
        Fact(
            (
                f"What is the plural of {one}?",
                f"Name the plural of {one}.",
                f"Give the plural of {one}.",
                f"Which word is the plural of {one}?",
            ),
            f"The plural of {one} is {many}.",
        )
        for one, many in PLURALS.items()
    ]
    emoji = [
        Fact(
            (
                f"Show me the emoji of a {thing}.",
                f"What is the emoji of a {thing}?",
                f"Give me the emoji of a {thing}.",
                f"Which emoji shows a {thing}?",
            ),
            f"The emoji of a {thing} is {sign}",
        )
        for thing, sign in EMOJI.items()
    ]
    return plurals + emoji


def _animals() -> list[Fact]:
    sounds = [
        Fact(
            (
                f"What sound does a {animal} make?",
                f"What does a {animal} say?",
                f"Which sound does a {animal} make?",
                f"Name the sound of a {animal}.",
            ),
            f"A {animal} says {sound}.",
        )
        for animal, sound in SOUNDS.items()
    ]
    young = [
        Fact(
            (
                f"What is a young {animal} called?",
                f"What do you call a young {animal}?",
                f"Name a young {animal}.",
                f"What is the name of a young {animal}?",
            ),
            f"A young {animal} is called a {name}.",
        )
        for animal, name in YOUNG.items()
    ]
    return sounds + young


def _calendar() -> list[Fact]:
    out = []
    for unit, names in (("day", DAYS), ("month", MONTHS)):
        for here, following in zip(names, names[1:] + names[:1], strict=True):
            for word, verb, known, sought in (
                ("after", "follows", here, following),
                ("before", "precedes", following, here),
            ):
                asked = (
                    f"What {unit} comes {word} {known}?",
                    f"Which {unit} comes {word} {known}?",
                    f"Name the {unit} {word} {known}.",
                    f"Which {unit} {verb} {known}?",
                )
                out.append(Fact(asked, f"{sought} comes {word} {known}."))
    return out


@functools.cache
def all_facts() -> tuple[Fact, ...]:
    """Return every fact, in a fixed order; no two share a phrasing."""
    return tuple(_capitals() + _opposites() + _colours() + _words() + _animals() + _calendar())
