"""Strict validation of user-supplied values: exact types, finite numbers, messages that name the field."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

MAX_INT32 = 2**31 - 1
"""Largest count, position or token id, which are int32 on the device."""
MAX_LOGPROBS = 20
"""Most alternatives per position of `logprobs` and `prompt_logprobs`."""
INT8, FP8, DEQUANTIZE = "int8", "fp8", "dequantize"
KEPT_QUANTIZATIONS = ("awq", "gptq", "compressed-tensors", "modelopt", "mxfp4")
"""Formats of checkpoints with weights in 4 bits or FP8 that are kept so. FP8 in the format of that name is, too; the
setting "fp8" quantises activations as well."""
QUANTIZATIONS = (INT8, FP8, DEQUANTIZE, *KEPT_QUANTIZATIONS)
"""Values of `EngineConfig.quantization`."""
KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3", "int8")
"""How keys and values may be stored (`EngineConfig.kv_cache_dtype`), named as in vLLM."""


def describe(value: Any) -> str:
    """Format a value for an error message: its type, and plain values themselves.

    Long values are truncated; reprs of arbitrary objects are omitted, as they may be huge and show addresses.
    """
    if value is None:
        return "None"
    kind = type(value).__name__
    if isinstance(value, (bool, float, str, np.number, np.bool_)):
        return f"{kind} {_cut(str(value) if isinstance(value, np.generic) else repr(value))}"
    return f"{kind} {show_int(value)}" if isinstance(value, int) else kind


def show_int(value: int) -> str:
    """Format an integer for an error message; Python refuses to print thousands of digits."""
    return str(value) if abs(value) < 10**40 else f"<{value.bit_length()}-bit integer>"


def is_array(value: Any) -> bool:
    """Tell arrays of NumPy and JAX from other values, without importing JAX."""
    jax = sys.modules.get("jax")
    return isinstance(value, np.ndarray) or (jax is not None and isinstance(value, jax.Array))


def plural(count: int, noun: str) -> str:
    """Write a count with its noun: "1 image", "2 images"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def as_int(name: str, value: Any) -> int:
    """Convert `value` to a Python int.

    Raises:
        TypeError: not a Python or NumPy integer, or a bool.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {describe(value)}.")
    return int(value)


def as_float(name: str, value: Any) -> float:
    """Convert `value` to a finite Python float.

    Raises:
        TypeError: not a Python or NumPy number, or a bool.
        ValueError: NaN or infinite.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, got {describe(value)}.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {number}.")
    return number


def as_strings(name: str, values: Any, *, most: int, longest: int) -> tuple[str, ...]:
    """Convert a list of non-empty strings to a tuple; None gives an empty one.

    Args:
        name: name of the field, for errors.
        values: the list.
        most: maximum number of strings.
        longest: maximum length, in characters.

    Raises:
        TypeError: not a list or tuple of strings.
        ValueError: too many strings, or one is too long or empty.
    """
    if values is None:
        return ()
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name} must be a list of strings, got {describe(values)}.")
    if len(values) > most:
        raise ValueError(f"{name} can have at most {most} strings, got {len(values)}.")
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise TypeError(f"{name}[{index}] must be a string, got {describe(value)}.")
        if not value:
            raise ValueError(f"{name} cannot contain an empty string.")
        if len(value) > longest:
            raise ValueError(f"{name}[{index}] can have at most {longest} characters, got {len(value)}.")
    return tuple(values)


def as_token_ids(name: str, values: Any) -> tuple[int, ...]:
    """Convert token ids to a tuple without duplicates, in order; None gives an empty one.

    The vocabulary size is checked elsewhere.

    Raises:
        TypeError: not a collection of integers.
        ValueError: an id outside [0, 2**31 - 1].
    """
    if values is None:
        return ()
    if isinstance(values, np.ndarray) and values.ndim == 1:
        values = list(values)
    if not isinstance(values, (list, tuple, set, frozenset, range)):
        raise TypeError(f"{name} must be a list of token ids, got {describe(values)}.")
    ids = dict.fromkeys(as_token_id(f"every id in {name}", value) for value in values)
    return tuple(ids)


def as_token_id(name: str, value: Any) -> int:
    """Convert a token id, in [0, 2**31 - 1], to an int.

    Raises:
        TypeError: not an integer.
        ValueError: out of range.
    """
    token = as_int(name, value)
    if not 0 <= token <= MAX_INT32:
        raise ValueError(f"{name} must be between 0 and {MAX_INT32}, got {show_int(token)}.")
    return token


def _cut(shown: str) -> str:
    return shown if len(shown) <= 48 else shown[:45] + "..."
