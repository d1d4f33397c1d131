"""Vectors that steer the sequences of a step, as part of its packed inputs.

They come with each step in place of a table on the device: a step sends each distinct vector once, and rows may be
preempted, forked and moved without anything to update.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.engine.request import Sequence as Sample
from jaxinfer.errors import ConfigError
from jaxinfer.functional.taps import LAST
from jaxinfer.steering import Steering

NONE = -1
"""Place of a token that is not steered."""


def check(runner: Any, steering: Steering) -> None:
    """Check vectors against the model.

    Raises:
        ConfigError: a path is no module of the model, or none that gives hidden states.
        ValueError: a vector has another length than the model's hidden states, or the engine is deterministic.
    """
    if runner.program.deterministic:
        raise ValueError(
            "steering is not available with deterministic=True, whose one program adds no vectors; make another LLM "
            "without it"
        )
    width = runner.programs.captured((LAST,))[LAST].shape[-1]
    for path, output in runner.programs.captured(sorted(steering.vectors)).items():
        if len(output.shape) != 2 or output.shape[1] != width:
            raise ConfigError(f"steering: {path} gives {list(output.shape[1:])} a token, not hidden states [{width}]")
        if len(steering.vectors[path]) != width:
            raise ValueError(
                f"steering[{path!r}] has {len(steering.vectors[path])} entries; the model's hidden states have {width}"
            )


def fields(sequences: Sequence[Sample]) -> dict[str, Any]:
    """Return the fields of a `Bucket` for the steering of its sequences; none if no sequence is steered."""
    found = _distinct(sequences)
    if not found:
        return {}
    paths = sorted({path for steering in found for path in steering.vectors})
    slots = 1 << (len(found) - 1).bit_length()  # few programs
    [width] = {len(vector) for steering in found for vector in steering.vectors.values()}
    return {"steer": tuple(paths), "steers": slots, "steer_width": width}


def shapes(bucket: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parts of a bucket's packed vector: each token's place, and the vectors by path."""
    if not bucket.steer:
        return {}
    return {"steer_at": (bucket.tokens,), "steer": (len(bucket.steer), bucket.steers, bucket.steer_width)}


def parts(bucket: Any, sequences: Sequence[Sample], tokens: Sequence[slice | int]) -> dict[str, np.ndarray]:
    """Build these parts for sequences and the places of their tokens in the step."""
    if not bucket.steer:
        return {}
    found = _distinct(sequences)
    vectors = np.zeros((len(bucket.steer), bucket.steers, bucket.steer_width), np.float32)
    at = np.full(bucket.tokens, NONE, np.int32)
    for slot, steering in enumerate(found):
        for path, vector in steering.vectors.items():
            vectors[bucket.steer.index(path), slot] = vector
    for sequence, places in zip(sequences, tokens, strict=True):
        if sequence.request.steering is not None:
            at[places] = found.index(sequence.request.steering)
    return {"steer_at": at, "steer": vectors.view(np.int32)}


def added(bucket: Any, parts: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return what is added to each module's output, float32 `[T, M]` by path, and remove the parts."""
    if not bucket.steer:
        return {}
    at, vectors = parts.pop("steer_at"), jax.lax.bitcast_convert_type(parts.pop("steer"), jnp.float32)
    own = jnp.where((at >= 0)[:, None], vectors[:, jnp.maximum(at, 0)], 0.0)
    return dict(zip(bucket.steer, own, strict=True))


def _distinct(sequences: Sequence[Sample]) -> list[Steering]:
    """Return the different steerings of sequences, in order."""
    return list(dict.fromkeys(s.request.steering for s in sequences if s.request.steering is not None))
