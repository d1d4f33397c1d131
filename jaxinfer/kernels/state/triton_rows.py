"""Launches of Triton kernels of recurrences, over the sequences of a step.

XLA runs a loop of data-dependent length by reading its condition back from the device before each iteration, twice for
every segment and chunk of every layer. Here the loops are inside programs, one for each sequence and part of a head,
over a grid of static size, so that the call is part of the step's command buffer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxinfer.kernels.state.slots import DecodeSlots, Segments
from jaxinfer.kernels.triton import triton_launch
from jaxinfer.kernels.triton.triton_launch import Options, Target
from jaxinfer.kernels.triton.triton_tiles import power

SIZE = 16
"""Tokens of a chunk: the fewest rows of a matrix product. Per token, `prepare` does work in proportion to it, and both
kernels hold arrays of this length; larger chunks shorten the sequence of products in `advance`. Estimated, not
measured."""
BLOCK_V = 32
"""Columns of a head's state per program: with 32 heads of 128 a sequence has 128 programs, for 132 multiprocessors of
an H100."""
PRECISION = "tf32x3"
"""Products of float32 in three products of TF32, whose error is that of float32, on tensor cores."""


@dataclass(frozen=True)
class Launcher:
    """Launcher of the kernels for a layer's sizes and a device."""

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

    @classmethod
    def of(cls, states: jax.Array, target: Target) -> "Launcher":
        """Return the launcher for states `[N, H, Dk, Dv]`."""
        slots, heads, key_dim, value_dim = states.shape
        return cls(heads, key_dim, value_dim, slots, target)

    def launch(
        self,
        kernel: Any,
        options: Options,
        operands: dict[str, Any],
        results: dict[str, Any],
        *,
        rows: int,
        **more: Any,
    ) -> dict[str, jax.Array]:
        """Launch a kernel for all heads and `rows` rows.

        With operands `states`, programs are for parts of a head, and `states` is updated in place as `new_states`.
        """
        keys, values, block = self.columns
        constants = dict(H=self.heads, DK=self.key_dim, DV=self.value_dim, K_COLUMNS=keys, V_COLUMNS=values)
        parts = 1
        if "states" in operands:
            parts = values // block
            constants |= dict(N=self.slots, BLOCK_V=block)
            results = results | {"new_states": like(operands["states"])}
        return triton_launch.launch(
            kernel,
            operands,
            results,
            aliases={"states": "new_states"} if "states" in operands else {},
            constants=constants | more,
            grid=(self.heads * parts, rows),
            target=self.target,
            options=options,
        )


Run: TypeAlias = Callable[[Any, jax.Array, jax.Array, Target], tuple[jax.Array, jax.Array]]
"""Run a kernel over tokens, states and `runs`: outputs and the updated states."""


def over_segments(
    run: Run, tokens: Any, states: jax.Array, segments: Segments, target: Target
) -> tuple[jax.Array, jax.Array]:
    """Run a kernel over runs of tokens of several sequences, as `loops.prefill`; outputs of padding are 0."""
    out, states = run(tokens, states, runs(segments, states.shape[0], jnp.zeros_like(segments.counts)), target)
    return within(out, segments), states


def over_rows(
    run: Run, tokens: Any, states: jax.Array, rows: DecodeSlots, target: Target
) -> tuple[jax.Array, jax.Array]:
    """Run a kernel over one token per sequence, as `loops.decode`; outputs of padding are 0."""
    sources, targets = rows
    live = (targets < states.shape[0]).astype(jnp.int32)
    at = jnp.arange(sources.shape[0], dtype=jnp.int32)
    out, states = run(tokens, states, jnp.stack([at, live, sources, targets, at, live], axis=1), target)
    return jnp.where(live[:, None, None] > 0, out, 0), states


def operands(tokens: Any) -> dict[str, jax.Array]:
    """Return a kernel's arguments of tokens, a named tuple."""
    return dict(zip(tokens._fields, (x.astype(jnp.float32) for x in tokens), strict=True))


def like(array: jax.Array) -> jax.ShapeDtypeStruct:
    """Return the shape of a float32 result like `array`."""
    return jax.ShapeDtypeStruct(array.shape, jnp.float32)


def runs(segments: Segments, slots: int, first_chunks: jax.Array) -> jax.Array:
    """Return the kernels' argument `segments`: a run is a segment with those that continue it, in one program."""
    at, heads = jnp.arange(segments.counts.shape[0]), segments.heads()
    members = heads == at[:, None]
    busy = jnp.sum(jnp.where(members, segments.counts, 0), axis=1) > 0
    targets = jnp.where(segments.counts > 0, segments.targets, slots)
    lengths = jnp.where(busy, jnp.sum(members, axis=1), 0)
    columns = segments.starts, segments.counts, segments.sources, targets, first_chunks, lengths
    return jnp.stack([column.astype(jnp.int32) for column in columns], axis=1)


def within(out: jax.Array, segments: Segments) -> jax.Array:
    """Set the outputs of tokens of no segment, which no program writes, to zero."""
    used = jnp.max(jnp.where(segments.counts > 0, segments.starts + segments.counts, 0))
    return jnp.where((jnp.arange(out.shape[0]) < used)[:, None, None], out, 0)
