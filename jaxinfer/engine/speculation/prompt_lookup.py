"""Draft tokens by prompt lookup: what followed the last tokens where they occurred before.

Saxena, "Prompt lookup decoding", 2023 (https://github.com/apoorvumang/prompt-lookup-decoding); "ngram" in vLLM.
"""

import numpy as np


def find_draft(tokens: np.ndarray, count: int, longest: int, shortest: int) -> np.ndarray:
    """Return up to `count` tokens that are likely to follow, `[n]` int32; none if the end occurs nowhere before.

    The end of `tokens` with the most tokens, at most `longest`, that also occurs before it is looked up; of several
    places the last one is taken. If the tokens that followed there reach the end, the draft repeats them.

    Args:
        tokens: prompt and output, `[T]` int32.
        count: maximum number of tokens.
        longest: most tokens of the end that are compared.
        shortest: fewest tokens of the end that must be equal.
    """
    length, best = len(tokens), -1
    places = np.flatnonzero(tokens[:-1] == tokens[-1])  # of the last token of each occurrence
    for size in range(1, longest + 1):
        if not len(places):
            break
        if size >= shortest:
            best = int(places[-1])
        places = places[places >= size]
        places = places[tokens[places - size] == tokens[length - 1 - size]]
    if best < 0 or count < 1:
        return np.empty(0, np.int32)
    followed = tokens[best + 1 :]
    return np.resize(followed, count).astype(np.int32, copy=False)
