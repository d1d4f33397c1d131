"""Images passed by users: validation and conversion to RGB; validation of preprocessed pixel values."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from jaxinfer._utils.checks import describe, is_array

MAX_PIXELS = 2**27
"""Maximum number of pixels of an image: 128 megapixels take 400 MB as RGB."""
MIN_PIXELS = 2
"""Minimum number of pixels of an image: for a single pixel, processors disagree about which axis is the channels."""
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
"""Supported modes of PIL images: 8 bits per channel with a unique meaning as RGB. Alpha is dropped, as in
transformers.
"""


def as_rgb(image: Any, where: str) -> np.ndarray:
    """Convert a PIL image or an array to uint8 `[height, width, 3]`.

    Arrays are `[height, width]`, `[height, width, C]` or `[C, height, width]` with C of 1, 3 or 4 (channels last if
    ambiguous), with integers from 0 to 255 or floats from 0 to 1.

    Args:
        image: the user's value.
        where: name for messages, such as "prompt 0, image 0".

    Raises:
        TypeError: something else, such as a path or the bytes of a file.
        ValueError: the image cannot be decoded, has too few or too many pixels, or an unsupported mode, shape or range.
    """
    if _is_pil(image):
        return _decode(image, where)
    if is_array(image):
        return _channels_last(np.asarray(image), where)
    if isinstance(image, (bytes, bytearray, memoryview)):
        hint = "; open it: PIL.Image.open(io.BytesIO(data))"
    elif isinstance(image, str) or hasattr(image, "__fspath__"):
        hint = "; paths and URLs are not read: use PIL.Image.open(path)"
    else:
        hint = "; pass the tensor's .numpy()" if hasattr(image, "numpy") else ""
    kind = type(image).__name__ if isinstance(image, str) else describe(image)
    raise TypeError(f"{where} must be a PIL image or a NumPy array, got {kind}{hint}.")


def as_values(values: Any, shape: tuple[int, ...], where: str) -> np.ndarray:
    """Validate preprocessed tiles; return them as float32 `[n, *shape]`.

    Raises:
        TypeError: not an array of floats.
        ValueError: the shape is wrong, there is no tile, or a value is not finite.
    """
    if not is_array(values):
        raise TypeError(f"{where} must be a NumPy array of pixel values, got {describe(values)}.")
    made, expected = np.asarray(values), f"[n, {', '.join(map(str, shape))}]"
    if made.dtype.kind != "f" and made.dtype.name != "bfloat16":
        raise TypeError(f"{where} must have floats, as the model's processor makes them, got {made.dtype}.")
    if made.shape[1:] != shape or not len(made):
        raise ValueError(
            f"{where} has shape {list(made.shape)}; this model takes tiles {expected} with n of 1 or more."
        )
    made = made.astype(np.float32)
    _check_finite(made, where)
    return made


def _is_pil(value: Any) -> bool:
    """Return whether a value is a PIL image, without importing Pillow: if it is one, Pillow is imported."""
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(value, module.Image)


def _decode(image: Any, where: str) -> np.ndarray:
    if image.mode not in MODES:
        raise ValueError(
            f"{where} has mode {image.mode!r}; supported: {', '.join(MODES)}. Scale it to 8 bits a channel "
            "and convert it to RGB."
        )
    _check_pixels(image.height, image.width, where)
    try:
        return np.asarray(image.convert("RGB"))
    except Exception as error:  # of many kinds: PIL decodes a file when its pixels are accessed
        raise ValueError(
            f"{where} cannot be decoded, it is truncated or corrupt: {str(error) or type(error).__name__}."
        ) from error


def _channels_last(array: np.ndarray, where: str) -> np.ndarray:
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"{where} has shape {list(array.shape)}; an array must be [height, width], "
            "[height, width, C] or [C, height, width] with C of 1, 3 or 4."
        )
    _check_pixels(*array.shape[:2], where)
    whole = _as_bytes(array[..., :3], where)
    return np.broadcast_to(whole, (*whole.shape[:2], 3))


def _as_bytes(array: np.ndarray, where: str) -> np.ndarray:
    given, most = array.dtype, 255
    if given == np.uint8:
        return array
    if given.kind not in "iuf" and given.name != "bfloat16":
        raise TypeError(f"{where} has dtype {given}; it must be integers from 0 to 255 or floats from 0 to 1.")
    if given.kind not in "iu":
        array, most = array.astype(np.float32), 1
        _check_finite(array, where)
    low, high = array.min(), array.max()
    if low < 0 or high > most:
        raise ValueError(
            f"{where} has values from {low} to {high}; values of {given} arrays must be from 0 to {most}. Pass "
            "normalised values as pixel_values."
        )
    return array.astype(np.uint8) if most == 255 else np.rint(array * 255).astype(np.uint8)


def _check_finite(array: np.ndarray, where: str) -> None:
    if not np.isfinite(array).all():
        count = int((~np.isfinite(array)).sum())
        raise ValueError(f"{where}: {count} of {array.size} values are NaN or infinite.")


def _check_pixels(height: int, width: int, where: str) -> None:
    if not height or not width:
        raise ValueError(f"{where} has no pixels: it is {height} high and {width} wide.")
    if height * width < MIN_PIXELS:
        raise ValueError(
            f"{where} has {height} x {width} pixels; the minimum is {MIN_PIXELS}, as a single one is a placeholder "
            "or a failed download. Pass the whole image, or none."
        )
    if height * width > MAX_PIXELS:
        raise ValueError(f"{where} has {height} x {width} pixels; the maximum is {MAX_PIXELS}. Scale it down.")
