"""Keys and values of one byte an element: codes in int8 or FP8 (e4m3), with a scale for each position and head.

x = code * scale, where the largest |x| of a position's head has the largest code. A position's codes depend on nothing
but its own keys and values, so they are the same in whichever step it is computed, and stay what they are when later
positions of its block are written.

Kernels multiply codes in the model's dtype, which holds them exactly, and apply scales to scores and to attention
weights: a scale costs one multiplication a query and position, not one an element.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

INT8, FP8 = np.dtype(np.int8), np.dtype(np.uint8)
"""Dtypes of codes. Those in FP8 are kept as their bits: XLA on CPUs would convert a whole cache array of float8 to
float16 and back to move a few of its elements."""
LARGEST = {INT8: 127.0, FP8: 448.0}
"""Largest code of each format."""
FORMATS = {"int8": INT8, "fp8": FP8, "fp8_e4m3": FP8}
"""Formats by their names in settings, which are vLLM's."""
AUTO = "auto"
"""Setting for keys and values in the model's dtype."""
SCALE = np.dtype(jnp.bfloat16)
"""Dtype of scales. Codes are rounded with the rounded scale, so its few digits cost nothing: a value of 127 or 448
scales may become one of 127.25 or 449.75, which rounds to the largest code."""
FLOAT32 = np.dtype(np.float32)
LEAST = 1e-30
"""Smallest scale, so that zeros are not divided by zero."""


class Codes(NamedTuple):
    """Quantised arrays."""

    codes: jax.Array
    """`[..., D]`."""
    scales: jax.Array
    """`[..., 1]`."""


def format_of(setting: str) -> np.dtype | None:
    """Return the dtype of codes for a value of `kv_cache_dtype`; None for "auto"."""
    return None if setting == AUTO else FORMATS[setting]


def quantise(x: jax.Array, to: np.dtype) -> Codes:
    """Quantise `[..., D]` with a scale for each vector of D elements; NaN gives a scale of NaN."""
    wide = x.astype(jnp.float32)
    top = jnp.abs(wide).max(axis=-1, keepdims=True)
    # Rounded to bfloat16 by an operation of its own: XLA on a GPU removes a conversion there and back.
    rounded = jax.lax.reduce_precision(jnp.maximum(top * np.float32(1 / LARGEST[to]), LEAST), 8, 7)
    scaled, scales = wide / rounded, rounded.astype(SCALE)
    if to == INT8:
        return Codes(jnp.round(scaled).astype(to), scales)
    return Codes(jax.lax.bitcast_convert_type(scaled.astype(jnp.float8_e4m3fn), to), scales)


def widen(codes: jax.Array, dtype: np.dtype) -> jax.Array:
    """Convert codes to a floating dtype, which holds them exactly; keys and values that are no codes are cast."""
    if codes.dtype == FP8:
        codes = jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)
    return codes.astype(dtype)


def dequantise(codes: jax.Array, scales: jax.Array | None, dtype: np.dtype = FLOAT32) -> jax.Array:
    """Return codes * scales, exact in float32; keys and values that are no codes have no scales and are cast."""
    if scales is None:
        return codes.astype(dtype)
    return (widen(codes, FLOAT32) * scales.astype(jnp.float32)).astype(dtype)
