"""Per-row sampling parameters of a step, and their packed form."""

from enum import IntEnum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Level(IntEnum):
    """Sampler features needed by a step; each level includes those below."""

    GREEDY = 0
    """Argmax of the logits."""
    RANDOM = 1
    """Temperature and min-p."""
    TRUNCATED = 2
    """Top-k and top-p, which search the logits for thresholds."""
    EDITED = 3
    """Penalties, biases and masks, which read `Edits`."""


class SamplingRows(NamedTuple):
    """Sampling parameters of a step's sequences, `[B]` each unless stated otherwise."""

    row: jax.Array
    """Row in the sampler state; R or more for padding."""
    position: jax.Array
    """Position of the token to sample: the number of tokens before it."""
    key: jax.Array
    """64 bits hashed from seed and sample index, `[B, 2]`."""
    temperature: jax.Array
    """Temperature; 0 for greedy."""
    top_k: jax.Array
    """Top-k; 0 for no limit."""
    top_p: jax.Array
    min_p: jax.Array
    presence: jax.Array
    frequency: jax.Array
    repetition: jax.Array
    edited: jax.Array
    """1 if the row's `Edits` apply."""
    prompt_length: jax.Array
    """Number of prompt tokens, which come first in the history."""
    logprobs: jax.Array
    """1 if log-probabilities are requested."""
    ngram: jax.Array
    """Size n of n-grams that must not repeat; 0 for no such rule."""
    forced_first: jax.Array
    """1 + the token id forced right after the prompt; 0 for none."""
    forced_last: jax.Array
    """1 + the token id forced at `last_position`; 0 for none."""
    last_position: jax.Array
    """Last position that the sequence may have."""
    rule: jax.Array
    """Parameter of the model's token rule; 0 if it does not apply."""


INTEGERS = (
    "row",
    "position",
    "key",
    "top_k",
    "edited",
    "prompt_length",
    "logprobs",
    "ngram",
    "forced_first",
    "forced_last",
    "last_position",
    "rule",
)
WIDTH = len(SamplingRows._fields) + 1
"""Number of columns of the packed form: one per field, two for the key."""
ROW, POSITION, EDITED = 0, 1, SamplingRows._fields.index("edited") + 1
"""Packed columns that may change from step to step."""


def pack_rows(rows: SamplingRows) -> np.ndarray:
    """Pack NumPy rows into `[B, WIDTH]` int32, floats as their bits, so that one transfer suffices."""
    columns = []
    for name, value in zip(SamplingRows._fields, rows, strict=True):
        kind = np.uint32 if name == "key" else np.int32 if name in INTEGERS else np.float32
        bits = np.ascontiguousarray(value, kind).view(np.int32)
        columns.append(bits if bits.ndim == 2 else bits[:, None])
    return np.concatenate(columns, axis=1)


def unpack_rows(packed: jax.Array) -> SamplingRows:
    """Unpack rows under jit; the inverse of `pack_rows`."""
    fields, column = {}, 0
    for name in SamplingRows._fields:
        width = 2 if name == "key" else 1
        bits = packed[:, column : column + width]
        column += width
        if name == "key":
            fields[name] = jax.lax.bitcast_convert_type(bits, jnp.uint32)
        else:
            kind = jnp.int32 if name in INTEGERS else jnp.float32
            fields[name] = jax.lax.bitcast_convert_type(bits[:, 0], kind)
    return SamplingRows(**fields)
