"""The gated delta rule on NVIDIA GPUs: prefill, prefill token by token and decode as Triton kernels.

XLA runs a loop whose length is data by asking the device before each iteration: two for every segment and chunk of
every layer. Here the loops are inside programs, one for each sequence and part of a head, over a grid of static size,
so that the call is part of the step's command buffer. The kernels are in `kernels/triton/triton_recurrence.py`.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.kernels.state.delta import Tokens
from jaxinfer.kernels.state.slots import DecodeSlots, Segments
from jaxinfer.kernels.triton import triton_launch
from jaxinfer.kernels.triton.triton_launch import Options, Target
from jaxinfer.kernels.triton.triton_tiles import power

SIZE = 16
"""Tokens of a chunk: the fewest rows of a matrix product. Per token, `prepare` does work in proportion to it, and both
kernels hold arrays of it; larger chunks shorten the sequence of products in `advance`. Estimated, not measured."""
BLOCK_V = 32
"""Columns of a head's state per program: with 32 heads of 128 a sequence has 128 programs, for 132 multiprocessors of
an H100."""
PRECISION = "tf32x3"
"""Products of float32 in three products of TF32, whose error is that of float32, on tensor cores."""


@dataclass(frozen=True)
class Launcher:
    """Sizes of a layer and the device, and launches with them."""

    heads: int
    key_dim: int
    value_dim: int
    slots: int
    target: Target

    @property
    def columns(self) -> tuple[int, int, int]:
        """Key columns, value columns, and the value columns of a program; powers of two of 16 or more."""
        values = power(self.value_dim)
        return power(self.key_dim, 32), values, min(values, BLOCK_V)

    def launch(self, name: str, operands: dict[str, Any], results: dict[str, Any], *, rows: int, **more: Any) -> Any:
        """Launch a kernel for all heads and `rows` rows; `states` is updated in place as `new_states`."""
        from jaxinfer.kernels.triton import triton_recurrence  # imports triton

        keys, values, block = self.columns
        parts = 1 if name == "prepare" else values // block
        constants = dict(H=self.heads, DK=self.key_dim, DV=self.value_dim, K_COLUMNS=keys, V_COLUMNS=values)
        if "states" in operands:
            constants |= dict(N=self.slots, BLOCK_V=block)
            states = operands["states"]
            results = results | {"new_states": jax.ShapeDtypeStruct(states.shape, states.dtype)}
        return triton_launch.launch(
            getattr(triton_recurrence, name),
            operands,
            results,
            aliases={"states": "new_states"} if "states" in operands else {},
            constants=constants | more,
            grid=(self.heads * parts, rows),
            target=self.target,
            options=OPTIONS[name],
        )


OPTIONS = {"prepare": Options(4, 1), "advance": Options(4, 3), "step": Options(4, 2)}
"""Warps and pipeline stages by kernel; estimated, not measured."""


def prefill(tokens: Tokens, states: jax.Array, segments: Segments, target: Target) -> tuple[jax.Array, jax.Array]:
    """Process runs of tokens of several sequences as `delta_chunks.prefill`; outputs of padding are 0."""
    launcher, count = _launcher(tokens, states, target), tokens.v.shape[0]
    chunks = -(-segments.counts // SIZE)
    ends = jnp.cumsum(chunks)
    room = count // SIZE + chunks.shape[0]
    work = _chunks(segments, chunks, ends, room)
    keys, values, _ = launcher.columns
    shape = lambda *sizes: jax.ShapeDtypeStruct((room, launcher.heads, *sizes), jnp.float32)  # noqa: E731
    made = launcher.launch(
        "prepare",
        dict(chunks=work, **_operands(tokens)),
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
    runs = _runs(segments, states.shape[0], ends - chunks)
    found = launcher.launch(
        "advance",
        dict(segments=runs, **made, states=states),
        dict(out=_like(tokens.v)),
        rows=runs.shape[0],
        SIZE=SIZE,
        PRECISION=PRECISION,
    )
    return _within(found["out"], segments), found["new_states"]


def prefill_steps(tokens: Tokens, states: jax.Array, segments: Segments, target: Target) -> tuple[jax.Array, jax.Array]:
    """Process runs of tokens one token at a time, as `delta.prefill_steps`; outputs of padding are 0."""
    runs = _runs(segments, states.shape[0], jnp.zeros_like(segments.counts))
    out, states = _steps(tokens, states, runs, target)
    return _within(out, segments), states


def decode(tokens: Tokens, states: jax.Array, rows: DecodeSlots, target: Target) -> tuple[jax.Array, jax.Array]:
    """Process one token per sequence, as `delta.decode`; outputs of padding are 0."""
    sources, targets = rows
    live = (targets < states.shape[0]).astype(jnp.int32)
    at = jnp.arange(sources.shape[0], dtype=jnp.int32)
    runs = jnp.stack([at, live, sources, targets, at, live], axis=1)
    out, states = _steps(tokens, states, runs, target)
    return jnp.where(live[:, None, None] > 0, out, 0), states


def _steps(tokens: Tokens, states: jax.Array, runs: jax.Array, target: Target) -> tuple[jax.Array, jax.Array]:
    found = _launcher(tokens, states, target).launch(
        "step",
        dict(segments=runs, **_operands(tokens), states=states),
        dict(out=_like(tokens.v)),
        rows=runs.shape[0],
        DECAYS=tokens.g.shape[-1],
    )
    return found["out"], found["new_states"]


def _launcher(tokens: Tokens, states: jax.Array, target: Target) -> Launcher:
    slots, heads, key_dim, value_dim = states.shape
    return Launcher(heads, key_dim, value_dim, slots, target)


def _operands(tokens: Tokens) -> dict[str, jax.Array]:
    return dict(zip(Tokens._fields, (x.astype(jnp.float32) for x in tokens), strict=True))


def _like(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, jnp.float32)


def _chunks(segments: Segments, chunks: jax.Array, ends: jax.Array, room: int) -> jax.Array:
    """Return the first token and the number of tokens of each chunk, `[room, 2]`; chunks begin where segments do."""
    at = jnp.arange(room)
    owner = jnp.minimum(jnp.sum(ends <= at[:, None], axis=1), chunks.shape[0] - 1)
    first = (at - (ends - chunks)[owner]) * SIZE
    live = jnp.clip(segments.counts[owner] - first, 0, SIZE)
    return jnp.stack([segments.starts[owner] + first, live], axis=1).astype(jnp.int32)


def _runs(segments: Segments, slots: int, first_chunks: jax.Array) -> jax.Array:
    """Return the kernels' argument `segments`: a run is a segment with those that continue it, in one program."""
    at, heads = jnp.arange(segments.counts.shape[0]), segments.heads()
    members = heads == at[:, None]
    busy = jnp.sum(jnp.where(members, segments.counts, 0), axis=1) > 0
    targets = jnp.where(segments.counts > 0, segments.targets, slots)
    runs = jnp.where(busy, jnp.sum(members, axis=1), 0)
    columns = segments.starts, segments.counts, segments.sources, targets, first_chunks, runs
    return jnp.stack([column.astype(jnp.int32) for column in columns], axis=1)


def _within(out: jax.Array, segments: Segments) -> jax.Array:
    """Return zeros for tokens of no segment, which no program writes."""
    used = jnp.max(jnp.where(segments.counts > 0, segments.starts + segments.counts, 0))
    return jnp.where((jnp.arange(out.shape[0]) < used)[:, None, None], out, 0)
