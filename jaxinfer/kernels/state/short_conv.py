"""Short causal convolution: a depthwise convolution over all columns, before a recurrence or by itself.

    y_t = sum_j w_j * x_(t - W + 1 + j),  j of [0, W)

Its state is the last W - 1 inputs of a sequence, `[N, W - 1, columns]`, initially zero; columns are last, so that a row
of the state is a row of the step. States have the inputs' dtype and store them unchanged; sums are float32.
"""

import jax
import jax.numpy as jnp

from jaxinfer.kernels.state.slots import DecodeSlots, FullSequences, Segments, read, write


def _weighted(inputs: list[jax.Array], weight: jax.Array) -> jax.Array:
    """Sum inputs `[..., columns]` (all W, or only the oldest) weighted by `[columns, W]`, in float32."""
    wide = weight.astype(jnp.float32)
    return sum((x.astype(jnp.float32) * wide[:, j] for j, x in enumerate(inputs)), start=jnp.float32(0))


def decode(x: jax.Array, weight: jax.Array, states: jax.Array, rows: DecodeSlots) -> tuple[jax.Array, jax.Array]:
    """Process one token per sequence.

    Args:
        x: `[B, columns]`, the tokens.
        weight: `[columns, W]`.
        states: `[N, W - 1, columns]`.
        rows: state slots of the sequences.

    Returns:
        float32 `[B, columns]` and the updated states.
    """
    # Clamp instead of filling with zeros: results for padding are dropped anyway.
    past = states.at[rows.sources].get(mode="clip")
    y = _weighted([*(past[:, j] for j in range(past.shape[1])), x], weight)
    new = jnp.concatenate([past[:, 1:], x[:, None].astype(past.dtype)], axis=1)
    # If XLA fuses the gather with the scatter it copies all states, to avoid overwriting values still to be read.
    return y, write(states, rows.targets, jax.lax.optimization_barrier(new))


def prefill(x: jax.Array, weight: jax.Array, states: jax.Array, segments: Segments) -> tuple[jax.Array, jax.Array]:
    """Process runs of tokens of several sequences, each after its own state.

    Args:
        x: `[T, columns]`, tokens of all segments, concatenated.
        weight: `[columns, W]`.
        states: `[N, W - 1, columns]`.
        segments: tokens and state slots of the segments.

    Returns:
        float32 `[T, columns]` and the updated states.
    """
    count, kept = x.shape[0], states.shape[1]
    heads = segments.heads()
    starts = segments.starts[heads]  # starts of the runs the segments belong to
    past = read(states, segments.sources[heads]).astype(x.dtype)
    owner = segments.owners(count)
    since = jnp.arange(count) - starts[owner]
    # Every token adds up its W inputs in one order, wherever its run begins.
    inputs = []
    for back in range(kept, 0, -1):
        before = past[owner, jnp.clip(kept + since - back, 0, kept - 1)]
        own = jnp.pad(x, ((back, 0), (0, 0)))[:count]
        inputs.append(jnp.where((since >= back)[:, None], own, before))
    y = _weighted([*inputs, x], weight)
    last = segments.starts + segments.counts - kept + jnp.arange(kept)[:, None]
    new = [_input(x, past, starts, place) for place in last]
    targets = jnp.where(segments.counts > 0, segments.targets, states.shape[0])
    return y, write(states, targets, jnp.stack(new, axis=1))


def full_sequences(
    x: jax.Array, weight: jax.Array, states: jax.Array, rows: FullSequences
) -> tuple[jax.Array, jax.Array]:
    """Process whole sequences, differentiably: `[T, columns]`, `[columns, W]` -> float32 `[T, columns]`, old states."""
    count, length = x.shape[0], rows.length
    kept = states.shape[1]
    padded = jnp.pad(x.reshape(-1, length, x.shape[1]), ((0, 0), (kept, 0), (0, 0)))
    y = _weighted([padded[:, back : back + length] for back in range(kept + 1)], weight)
    return y.reshape(count, -1), states


def _input(x: jax.Array, past: jax.Array, starts: jax.Array, place: jax.Array) -> jax.Array:
    """Return the inputs `[R, columns]` at indices `place` `[R]` of the step, or those of the state before a run."""
    kept = past.shape[1]
    old = jnp.take_along_axis(past, jnp.clip(kept + place - starts, 0, kept - 1)[:, None, None], axis=1)[:, 0]
    return jnp.where((place >= starts)[:, None], x.at[jnp.maximum(place, 0)].get(mode="clip"), old)
