"""Fused projections: one GEMM, several named outputs, each sharded or replicated.

A weight is stored shard-major, `[tp, columns, in]`: the columns that one device owns of every output lie
together, so that the split after the GEMM is local (a plain `[q | k | v]` on Auto axes compiles to 16 extra
collective-permutes a layer on eight devices). It is always multiplied as a matrix, `[tp * columns, in]`.
QKV, gate/up and the other fused projections are declarations of this mechanism, not classes of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.kernels import int8_matmul
from jaxinfer.kernels.matmul import XLA, matmul
from jaxinfer.layers.params import Build, constant, matrix
from jaxinfer.sharding import axes
from jaxinfer.sharding.collectives import ALL_REDUCE, Collective
from jaxinfer.sharding.rules import indivisible


class Piece(NamedTuple):
    """An interval of a checkpoint's rows and where it lies on a shard; columns that no piece fills are zero."""

    column: int
    """The first of the shard's columns of this output that it fills."""
    start: int
    stop: int
    """Half-open, in rows of the output's own weight."""


@dataclass(frozen=True)
class Output:
    """One named output of a fused projection: `units` things of `width` columns each."""

    name: str
    units: int
    """Heads, or columns where `width` is 1: what a device takes a whole number of."""
    width: int = 1
    """Columns a unit."""
    sharded: bool = True
    """Divided over the shards by units; False: every shard has all of it."""
    repeat: bool = False
    """Where there are more shards than units, each unit serves several shards (k and v heads)."""
    stored: tuple[int | None, ...] | None = None
    """The checkpoint's units in the order in which they are kept, None for one of zeroes (`layers.heads`); by default
    they are kept as they are."""

    @property
    def rows(self) -> int:
        """Rows of this output's own weight `[rows, in]` in a checkpoint."""
        return self.units * self.width

    @property
    def stored_units(self) -> int:
        """Units that are kept, those of zeroes included, each counted once."""
        return self.units if self.stored is None else len(self.stored)

    def columns(self, tp: int, where: str = "") -> int:
        """Columns of this output on one shard of `tp`.

        Raises:
            ConfigError: the units do not divide; names the module `where`, the axis, the sizes and the remedies.
        """
        if not self.sharded:
            return self.stored_units * self.width
        if self.stored_units % tp == 0:
            return self.stored_units // tp * self.width
        if self.repeat and tp % self.stored_units == 0:
            return self.width
        what = f"projection {self.name!r} of {self.stored_units} {'columns' if self.width == 1 else 'heads'}"
        raise indivisible(where or "a projection", what, tp, lambda count: self.stored_units % count == 0, module=where)

    def pieces(self, shard: int, tp: int) -> list[Piece]:
        """The checkpoint's rows that shard `shard` of `tp` holds, in the order of its columns.

        Raises:
            ConfigError: as `columns`.
        """
        count = self.columns(tp) // self.width
        first = shard * self.stored_units // tp if self.sharded else 0
        if self.stored is None:
            return [Piece(0, first * self.width, (first + count) * self.width)]
        own, found = enumerate(self.stored[first : first + count]), []
        # Units that follow each other here and there are one piece.
        for offset, run in groupby(own, lambda pair: None if pair[1] is None else pair[1] - pair[0]):
            if offset is not None:
                places = [at for at, _ in run]
                start, stop = places[0] + offset, places[-1] + 1 + offset
                found.append(Piece(places[0] * self.width, start * self.width, stop * self.width))
        return found


class Multiplying(nnx.Module):
    """A module that multiplies rows of activations with what `params.matrix` made."""

    kernel: str = XLA
    """The implementation (`kernels.matmul.choose`); `use_kernel` sets it."""

    def product(
        self, x: jax.Array, weight: nnx.Param, scales: nnx.Param | None, dtype: jax.typing.DTypeLike | None = None
    ) -> jax.Array:
        """`x W^T` in `dtype` or that of `x`.

        Args:
            x: `[T, in]`, or `[T, tp, in / tp]` where the columns are divided over shards.
            weight: `[..., in]`, the axes before the last taken as one.
            scales: `[...]` of an int8 weight; None: it is not quantised.

        Returns:
            `[T, out]`.
        """
        rows = weight[...].reshape(-1, weight.shape[-1])
        if scales is None:
            return matmul(x.reshape(x.shape[0], -1), rows, dtype, kernel=self.kernel)
        return int8_matmul.matmul(x, rows, scales[...].reshape(-1), dtype, kernel=self.kernel)


def use_kernel(module: nnx.Module, kernel: str) -> None:
    """Lets all of a module multiply with this implementation."""
    for _, part in nnx.iter_modules(module):
        if isinstance(part, Multiplying):
            part.kernel = kernel


class FusedLinear(Multiplying):
    """`y_i = x W_i^T (+ b_i)` for several outputs `i`, as one GEMM."""

    def __init__(self, build: Build, in_features: int, outputs: Sequence[Output], *, bias: bool = False):
        self.outputs = tuple(outputs)
        self.tp = build.tp
        columns = sum(output.columns(self.tp, build.path) for output in self.outputs)
        shape, names = (self.tp, columns, in_features), (axes.SHARD, axes.COLUMNS, axes.EMBED)
        self.weight, self.weight_scale = matrix(build, shape, names, in_features**-0.5, outputs=self.outputs)
        self.bias = constant(build, shape[:2], names[:2], 0.0, outputs=self.outputs) if bias else None

    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """`[T, in]` -> one `[T, tp, columns_i]` an output, in the order declared."""
        y = self.product(x, self.weight, self.weight_scale).reshape(x.shape[0], self.tp, -1)
        if self.bias is not None:
            y = y + self.bias[...]
        ends, end = [], 0
        for output in self.outputs[:-1]:
            end += output.columns(self.tp)
            ends.append(end)
        return tuple(jnp.split(y, ends, axis=-1))


class RowLinear(Multiplying):
    """`y = x W^T (+ b)` with the input divided over shards: the one all-reduce of a block.

    `inputs`: how many columns the input has, or the output of the projection before that they are: one that is kept with
    units of zeroes has as many columns of zeroes here.
    """

    def __init__(self, build: Build, in_axis: str, inputs: int | Output, out_features: int, *, bias: bool = False):
        inputs = Output(in_axis, inputs) if isinstance(inputs, int) else inputs
        self.tp = build.tp
        shape, names = (out_features, inputs.columns(build.tp, build.path) * build.tp), (axes.EMBED, in_axis)
        self.weight, self.weight_scale = matrix(
            build, shape, names, inputs.rows**-0.5, unpadded=(out_features, inputs.rows), inputs=inputs
        )
        self.bias = constant(build, (out_features,), (axes.EMBED,), 0.0) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[T, tp, in / tp]` -> `[T, out]`."""
        y = self.product(x, self.weight, self.weight_scale)
        return y if self.bias is None else y + self.bias[...]

    def collectives(self) -> list[Collective]:
        """The sum over shards of what each makes of its columns."""
        return [] if self.tp == 1 else [Collective(ALL_REDUCE, "partial sums", self.weight.shape[0])]
