"""Sizes of the Mosaic GPU kernel for decode attention; this module imports no compiler."""

import math
from typing import NamedTuple

ROWS, KEYS, STAGES = 64, 64, 2
"""Rows of a product of the tensor cores; keys of a tile; tiles that are in shared memory at a time."""
HEADS = 8
"""Query heads of a kv head are padded to a multiple of this, the rows of an element of shared memory's layout."""
DIMS = 64, 128
"""Widths of keys and values. Sums of 256 columns would not fit into registers twice."""
HOPPER = 90
"""Compute capability of the only GPUs with these instructions (`wgmma`)."""
PROGRAMS = 2
"""Programs that one multiprocessor runs at a time."""
LOG2E = math.log2(math.e)
LEAST = -1e30
"""Initial value of running maxima, in powers of two. Finite, so that a tile without a visible key gives 0, not NaN."""


class Shape(NamedTuple):
    """Static shape of a call."""

    block: int
    """P: positions in a block."""
    dim: int
    """D: width of a key."""
    value_dim: int
    """Dv: width of a value."""
    group: int
    """G: query heads per kv head, padded."""
    blocks: int
    """N: blocks in the cache."""
    width: int
    """W: columns of a block table."""
