"""Prompts of random English words, for servers, whose tokenizers a client does not have."""

import random
from collections.abc import Iterator

WORDS = (
    "time,year,people,way,day,man,thing,woman,life,child,world,school,state,family,student,group,country,problem,"
    "hand,part,place,case,week,company,system,program,question,work,government,number,night,point,home,water,room,"
    "mother,area,money,story,fact,month,lot,right,study,book,eye,job,word,business,issue,side,kind,head,house"
)
"""Words that are one token each in most vocabularies."""


def texts(words: int, seed: int | None) -> Iterator[str]:
    """Yield prompts of a number of words, no two of which share a prefix of more than a few tokens.

    Args:
        words: words of a prompt.
        seed: seed of the words; None draws new ones, which no earlier run has left in a prefix cache.
    """
    rng, vocabulary = random.Random(seed), WORDS.split(",")
    while True:
        yield f"{rng.randrange(10**9, 10**10)} " + " ".join(rng.choices(vocabulary, k=words))
