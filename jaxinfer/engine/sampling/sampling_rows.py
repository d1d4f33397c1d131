"""What each row of a step asks of the sampler: its settings, how much of the sampler they need, and how they travel."""

from enum import IntEnum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Level(IntEnum):
    """How much of the sampler a step needs; each level includes those below."""

    GREEDY = 0
    """The largest logit."""
    RANDOM = 1
    """Temperature and min-p."""
    TRUNCATED = 2
    """Top-k and top-p: searches the logits for thresholds."""
    EDITED = 3
    """Penalties, biases and masks: reads `Edits`."""


class SamplingRows(NamedTuple):
    """One entry a sampled sequence, `[B]` each unless said."""

    row: jax.Array
    """Its place in the sampler's state; R or more for padding."""
    position: jax.Array
    """The position that the new token will have: how many tokens precede it."""
    key: jax.Array
    """`[B, 2]` the 64 bits that the sample's seed and index were hashed to."""
    temperature: jax.Array
    """0 for greedy."""
    top_k: jax.Array
    """0 for no limit."""
    top_p: jax.Array
    min_p: jax.Array
    presence: jax.Array
    frequency: jax.Array
    repetition: jax.Array
    edited: jax.Array
    """1 where the row's `Edits` hold."""
    prompt_length: jax.Array
    """Tokens of the prompt, at the head of the history."""
    logprobs: jax.Array
    """1 where log-probabilities are asked for."""
    ngram: jax.Array
    """n where no n tokens may come twice; 0 for no such rule."""
    forced_first: jax.Array
    """1 + the token that comes first after the prompt; 0: any may."""
    forced_last: jax.Array
    """1 + the token that comes at `last_position`; 0: any may."""
    last_position: jax.Array
    """That of the last token there may be."""
    rule: jax.Array
    """What the model's rule over tokens is told; 0: it does not hold."""


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
"""Columns of the packed form: one a field, two for the key."""
ROW, POSITION, EDITED = 0, 1, SamplingRows._fields.index("edited") + 1
"""Of them, those that may change from step to step."""


def pack_rows(rows: SamplingRows) -> np.ndarray:
    """NumPy rows -> `[B, WIDTH]` int32, floats by their bits: one array is one transfer."""
    columns = []
    for name, value in zip(SamplingRows._fields, rows, strict=True):
        kind = np.uint32 if name == "key" else np.int32 if name in INTEGERS else np.float32
        bits = np.ascontiguousarray(value, kind).view(np.int32)
        columns.append(bits if bits.ndim == 2 else bits[:, None])
    return np.concatenate(columns, axis=1)


def unpack_rows(packed: jax.Array) -> SamplingRows:
    """The reverse of `pack_rows`, under jit."""
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
