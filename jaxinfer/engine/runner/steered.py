"""Steering vectors of a step's sequences, packed with its inputs.

They are sent with each step, each distinct vector once, instead of being kept in a table on the device, which
preemption, forks and moved rows would have to update.
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
"""Index for tokens that are not steered (`steer_at`)."""


def check(runner: Any, steering: Steering) -> None:
    """Check vectors against the model.

    Raises:
        ConfigError: a path is no module of the model, or none that gives hidden states.
        ValueError: a vector has another length than the model's hidden states, or the engine is deterministic.
    """
    if runner.program.deterministic:
        raise ValueError(
            "steering is not available with deterministic=True, whose step program adds no vectors; create an LLM with "
            "deterministic=False"
        )
    width = runner.programs.captured((LAST,))[LAST].shape[-1]
    for path, output in runner.programs.captured(sorted(steering.vectors)).items():
        if len(output.shape) != 2 or output.shape[1] != width:
            raise ConfigError(
                f"steering: {path} has outputs of shape {list(output.shape[1:])} per token, but vectors can only be "
                f"added to hidden states, [{width}]; name another module"
            )
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
    count = 1 << (len(found) - 1).bit_length()  # few programs
    [width] = {len(vector) for steering in found for vector in steering.vectors.values()}
    return {"steer": tuple(paths), "steers": count, "steer_width": width}


def shapes(bucket: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parts of a bucket's packed vector: each token's index of its vector, and the vectors."""
    if not bucket.steer:
        return {}
    return {"steer_at": (bucket.tokens,), "steer": (len(bucket.steer), bucket.steers, bucket.steer_width)}


def parts(bucket: Any, sequences: Sequence[Sample], tokens: Sequence[slice | int]) -> dict[str, np.ndarray]:
    """Build the steering parts of a packed step.

    Args:
        bucket: the step's bucket.
        sequences: the step's sequences.
        tokens: indices of each sequence's tokens in the step.
    """
    if not bucket.steer:
        return {}
    found = _distinct(sequences)
    vectors = np.zeros((len(bucket.steer), bucket.steers, bucket.steer_width), np.float32)
    at = np.full(bucket.tokens, NONE, np.int32)
    for number, steering in enumerate(found):
        for path, vector in steering.vectors.items():
            vectors[bucket.steer.index(path), number] = vector
    for sequence, places in zip(sequences, tokens, strict=True):
        if sequence.request.steering is not None:
            at[places] = found.index(sequence.request.steering)
    return {"steer_at": at, "steer": vectors.view(np.int32)}


def added(bucket: Any, parts: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return the vectors that are added to each module's output, float32 `[T, M]` by path.

    Removes the steering parts from `parts`.
    """
    if not bucket.steer:
        return {}
    at, vectors = parts.pop("steer_at"), jax.lax.bitcast_convert_type(parts.pop("steer"), jnp.float32)
    own = jnp.where((at >= 0)[:, None], vectors[:, jnp.maximum(at, 0)], 0.0)
    return dict(zip(bucket.steer, own, strict=True))


def _distinct(sequences: Sequence[Sample]) -> list[Steering]:
    """Return the different steerings of sequences, in order."""
    return list(dict.fromkeys(s.request.steering for s in sequences if s.request.steering is not None))
