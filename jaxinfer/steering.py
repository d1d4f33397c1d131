"""Steering: vectors that are added to the outputs of modules while a request's tokens are computed."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxinfer._utils.checks import as_float, describe, is_array

MAX_SCALE = 1e6
"""Maximum magnitude of `Steering.scale`."""


class Steering:
    """Vectors to add to the outputs of modules, for each token of a request's prompt and output.

        llm.generate(prompts, steering=Steering({"layers.11": vector}, scale=4.0))

    Args:
        vectors: a mapping from paths of modules (`functional.taps`) to vectors `[M]`, each a list or an array; M is the
            model's width.
        scale: multiplier of all vectors.

    Raises:
        TypeError, ValueError: a path or vector is invalid; the error names it.
    """

    def __init__(self, vectors: Any, *, scale: float = 1.0):
        if not isinstance(vectors, Mapping) or not vectors:
            raise TypeError(
                f"steering must be a mapping from paths such as 'layers.11' to vectors, got {_show(vectors)}"
            )
        factor = as_float("scale", scale)
        if abs(factor) > MAX_SCALE:
            raise ValueError(f"scale must be between {-MAX_SCALE:g} and {MAX_SCALE:g}, got {factor:g}")
        self.vectors = {_path(path): _vector(path, value) * np.float32(factor) for path, value in vectors.items()}
        """Scaled vectors, float32 `[M]`, by path."""
        content = hashlib.sha256()
        for path, vector in sorted(self.vectors.items()):
            content.update(f"{path} {len(vector)} ".encode() + vector.tobytes())
        self.digest = content.digest()
        """Hash of paths and vectors: prompts share cached prefixes if it is equal."""

    @classmethod
    def of(cls, value: Any) -> "Steering | None":
        """Convert a value to a `Steering`: a mapping from paths to vectors, or None for no steering."""
        return value if value is None or isinstance(value, cls) else cls(value)


def _path(path: Any) -> str:
    if not isinstance(path, str) or not path:
        raise TypeError(f"steering: a path must be a string such as 'layers.11', got {describe(path)}")
    return path.removeprefix("model.")


def _vector(path: str, value: Any) -> np.ndarray:
    if not is_array(value) and not isinstance(value, list | tuple):
        raise TypeError(f"steering[{path!r}] must be a list or an array of numbers, got {describe(value)}")
    vector = np.asarray(value).astype(np.float32)
    if vector.ndim != 1 or not vector.size:
        raise ValueError(f"steering[{path!r}] must have one axis, got shape {list(vector.shape)}")
    if not np.isfinite(vector).all():
        raise ValueError(f"steering[{path!r}] must be finite: entry {int(np.argmin(np.isfinite(vector)))} is not")
    return vector


def _show(value: Any) -> str:
    return "an empty one" if isinstance(value, Mapping) else describe(value)
