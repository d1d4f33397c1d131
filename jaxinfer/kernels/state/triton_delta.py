"""The gated delta rule on NVIDIA GPUs: prefill, prefill token by token and decode as Triton kernels.

The kernels are in `kernels/triton/triton_recurrence.py`; `triton_rows` says why the loops are inside of them.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxinfer.kernels.state.delta import Tokens
from jaxinfer.kernels.state.slots import Segments
from jaxinfer.kernels.state.triton_rows import (
    PRECISION,
    SIZE,
    Launcher,
    like,
    operands,
    over_rows,
    over_segments,
    runs,
    within,
)
from jaxinfer.kernels.triton.triton_launch import Options, Target

PREPARE, ADVANCE, STEP = Options(4, 1), Options(4, 3), Options(4, 2)
"""Warps and pipeline stages of each kernel; estimated, not measured."""


def prefill(tokens: Tokens, states: jax.Array, segments: Segments, target: Target) -> tuple[jax.Array, jax.Array]:
    """Process runs of tokens of several sequences as `delta_chunks.prefill`; outputs of padding are 0."""
    from jaxinfer.kernels.triton import triton_recurrence  # imports triton

    launcher, count = Launcher.of(states, target), tokens.v.shape[0]
    chunks = -(-segments.counts // SIZE)
    ends = jnp.cumsum(chunks)
    room = count // SIZE + chunks.shape[0]
    work = _chunks(segments, chunks, ends, room)
    keys, values, _ = launcher.columns
    shape = lambda *sizes: jax.ShapeDtypeStruct((room, launcher.heads, *sizes), jnp.float32)  # noqa: E731
    made = launcher.launch(
        triton_recurrence.prepare,
        PREPARE,
        dict(chunks=work, **operands(tokens)),
        dict(
            reads=shape(SIZE, keys),
            queries=shape(SIZE, keys),
            keys=shape(SIZE, keys),
            values=shape(SIZE, values),
            local=shape(SIZE, values),
            decay=shape(keys),
        ),
        rows=room,
        DECAYS=tokens.g.shape[-1],
        SIZE=SIZE,
        PRECISION=PRECISION,
    )
    found = launcher.launch(
        triton_recurrence.advance,
        ADVANCE,
        dict(segments=runs(segments, states.shape[0], ends - chunks), **made, states=states),
        dict(out=like(tokens.v)),
        rows=segments.counts.shape[0],
        SIZE=SIZE,
        PRECISION=PRECISION,
    )
    return within(found["out"], segments), found["new_states"]


def _steps(tokens: Tokens, states: jax.Array, runs: jax.Array, target: Target) -> tuple[jax.Array, jax.Array]:
    from jaxinfer.kernels.triton import triton_recurrence  # imports triton

    found = Launcher.of(states, target).launch(
        triton_recurrence.step,
        STEP,
        dict(segments=runs, **operands(tokens), states=states),
        dict(out=like(tokens.v)),
        rows=runs.shape[0],
        DECAYS=tokens.g.shape[-1],
    )
    return found["out"], found["new_states"]


prefill_steps = partial(over_segments, _steps)
"""Runs of tokens, one at a time, as `delta.prefill_steps`."""
decode = partial(over_rows, _steps)
"""One token per sequence, as `delta.decode`."""


def _chunks(segments: Segments, chunks: jax.Array, ends: jax.Array, room: int) -> jax.Array:
    """Return the first token and the number of tokens of each chunk, `[room, 2]`; chunks begin where segments do."""
    at = jnp.arange(room)
    owner = jnp.minimum(jnp.sum(ends <= at[:, None], axis=1), chunks.shape[0] - 1)
    first = (at - (ends - chunks)[owner]) * SIZE
    live = jnp.clip(segments.counts[owner] - first, 0, SIZE)
    return jnp.stack([segments.starts[owner] + first, live], axis=1).astype(jnp.int32)
