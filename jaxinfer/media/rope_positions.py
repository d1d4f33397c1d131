"""Positions of M-RoPE (arXiv:2409.12191): three a token, which an image's tokens take from its grid.

A token of text has its position three times. Tokens of an image that begins at position p have p, p + row and
p + column; text goes on after the largest of them. So a token after images has a smaller position in rope than in the
cache, by the same number for all tokens of a sequence after its last image.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class RopePositions:
    """Rope's positions of a sequence with images, those of generated tokens included."""

    known: np.ndarray
    """Positions of the tokens up to the last image's end, `[n, 3]` int32."""
    shift: int
    """Position of a later token, less its position in the sequence."""

    def at(self, start: int, count: int) -> np.ndarray:
        """Return the positions of `count` tokens from position `start` in the sequence on, `[count, 3]` int32."""
        known = self.known[start : start + count]
        later = plain(start + len(known), count - len(known)) + np.int32(self.shift)
        return np.concatenate([known, later])


def plain(start: int, count: int) -> np.ndarray:
    """Return the positions of text without images, `[count, 3]` int32."""
    return np.repeat(np.arange(start, start + count, dtype=np.int32)[:, None], 3, axis=1)


def with_grids(images: Iterable[tuple[np.ndarray, np.ndarray]]) -> RopePositions:
    """Return the positions of a prompt with images.

    Args:
        images: for each image in order the positions of its tokens in the prompt, `[n]`, which follow each other, and
            their row and column in its grid, the grid's rows and columns, `[n, 4]`.
    """
    parts, end, after = [], 0, 0
    for places, grid in images:
        first = int(places[0])
        parts.append(plain(after, first - end))
        after += first - end
        parts.append(after + np.pad(grid[:, :2], ((0, 0), (1, 0))))
        after, end = after + int(grid[0, 2:].max()), first + len(places)
    return RopePositions(np.concatenate(parts).astype(np.int32), after - end)
