"""Fused projections: one GEMM, several named outputs, each sharded or replicated.

A weight is stored shard-major, `[tp, columns, in]`: the columns that one device owns of every output lie
together, so that the split after the GEMM is local (a plain `[q | k | v]` on Auto axes compiles to 16 extra
collective-permutes a layer on eight devices). It is always multiplied as a matrix, `[tp * columns, in]`.
QKV, gate/up and the other fused projections are declarations of this mechanism, not classes of their own.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.kernels.matmul import int8_matmul
from jaxinfer.kernels.matmul.choose import NATIVE, XLA, matmul
from jaxinfer.layers.fusion import ALWAYS
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
        self,
        x: jax.Array,
        weight: nnx.Param | jax.Array,
        scales: nnx.Param | jax.Array | None,
        dtype: jax.typing.DTypeLike | None = None,
        part: tuple[int, int] | None = None,
    ) -> jax.Array:
        """`x W^T` in `dtype` or that of `x`.

        Args:
            x: `[T, in]`, or `[T, tp, in / tp]` where the columns are divided over shards.
            weight: `[..., in]`, the axes before the last taken as one.
            scales: `[...]` of an int8 weight; None: it is not quantised.
            part: the first and the end of the weight's rows, where it is not multiplied whole.

        Returns:
            `[T, out]`.
        """
        rows = weight[...].reshape(-1, weight.shape[-1])
        if scales is None:
            return matmul(x.reshape(x.shape[0], -1), rows, dtype, kernel=self.kernel, part=part)
        return int8_matmul.matmul(x, rows, scales[...].reshape(-1), dtype, kernel=self.kernel, part=part)


def use_kernel(module: nnx.Module, kernel: str) -> None:
    """Lets all of a module multiply with this implementation."""
    for _, part in nnx.iter_modules(module):
        if isinstance(part, Multiplying):
            part.kernel = kernel


def use_fusion(module: nnx.Module, rows: float) -> None:
    """Lets all of a module multiply as one GEMM up to so many rows (`layers.fusion.rows_fused`), as several above."""
    for _, part in nnx.iter_modules(module):
        if isinstance(part, FusedLinear | BatchedLinear):
            part.rows_fused = rows


class FusedLinear(Multiplying):
    """`y_i = x W_i^T (+ b_i)` for several outputs `i`, as one GEMM, or as one an output above `rows_fused` rows."""

    rows_fused: float = ALWAYS
    """`use_fusion` sets it."""

    def __init__(
        self, build: Build, in_features: int, outputs: Sequence[Output], *, bias: bool | Collection[str] = False
    ):
        """`bias`: whether there is one, or the names of the outputs that have one."""
        self.outputs = tuple(outputs)
        self.tp = build.tp
        columns = sum(output.columns(self.tp, build.path) for output in self.outputs)
        shape, names = (self.tp, columns, in_features), (axes.SHARD, axes.COLUMNS, axes.EMBED)
        self.weight, self.weight_scale = matrix(build, shape, names, in_features**-0.5, outputs=self.outputs)
        named = [output.name for output in self.outputs] if bias is True else bias or ()
        biased = tuple(output for output in self.outputs if output.name in named)
        sizes = [output.columns(self.tp) for output in biased]
        self.bias = constant(build, (self.tp, sum(sizes)), names[:2], 0.0, outputs=biased) if biased else None
        self.biased = tuple(output.name for output in biased)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """`[T, in]` -> one `[T, tp, columns_i]` an output, in the order declared."""
        if x.shape[0] > self.rows_fused:
            parts = self._apart(x)
        else:
            y = self.product(x, self.weight, self.weight_scale).reshape(x.shape[0], self.tp, -1)
            if self.bias is not None and len(self.biased) == len(self.outputs):
                return self._split(y + self.bias[...], self.outputs)
            parts = self._split(y, self.outputs)
        if self.bias is None:
            return parts
        having = [output for output in self.outputs if output.name in self.biased]
        biases = dict(zip(self.biased, self._split(self.bias[...], having), strict=True))
        parts = zip(self.outputs, parts, strict=True)
        return tuple(part + biases[output.name] if output.name in biases else part for output, part in parts)

    def _apart(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """A GEMM an output, by its own columns of the one weight."""
        parts = pairwise(accumulate((output.columns(self.tp) for output in self.outputs), initial=0))
        if self.tp == 1:
            return tuple(self.product(x, self.weight, self.weight_scale, part=part)[:, None] for part in parts)
        own = (
            [None if p is None else p[...][:, start:end] for p in (self.weight, self.weight_scale)]
            for start, end in parts
        )
        return tuple(self.product(x, *pair).reshape(x.shape[0], self.tp, -1) for pair in own)

    def _split(self, y: jax.Array, outputs: Sequence[Output]) -> tuple[jax.Array, ...]:
        """`[..., columns]` by outputs."""
        ends = list(accumulate(output.columns(self.tp) for output in outputs))
        return tuple(jnp.split(y, ends[:-1], axis=-1))


class BatchedLinear(Multiplying):
    """`y_i = x_i W_i^T` for several inputs of one width, as one batched GEMM, or one by one above `rows_fused` rows.

    The inputs are such outputs of a fused projection as every shard has all of; each shard uses its own copy.
    """

    rows_fused: float = ALWAYS
    """`use_fusion` sets it."""

    def __init__(self, build: Build, in_features: int, outputs: Sequence[Output]):
        self.outputs, self.tp = tuple(outputs), build.tp
        widths = {output.columns(self.tp, build.path) for output in self.outputs}
        if len(widths) > 1:
            raise ValueError(f"{build.path}: the outputs of a batched GEMM are of one width, got {sorted(widths)}")
        shape, names = (self.tp, len(self.outputs) * widths.pop(), in_features), (axes.SHARD, axes.COLUMNS, axes.EMBED)
        self.weight, self.weight_scale = matrix(build, shape, names, in_features**-0.5, outputs=self.outputs)

    def __call__(self, *inputs: jax.Array) -> tuple[jax.Array, ...]:
        """`[T, tp, in]` each -> `[T, tp, columns]` each."""
        if self.kernel == NATIVE:  # of one shard, as XLA cannot divide it; it has no batches, and gains nothing by them
            width = self.weight.shape[1] // len(self.outputs)
            parts = ((i * width, (i + 1) * width) for i in range(len(inputs)))
            made = (
                self.product(x[:, 0], self.weight, self.weight_scale, part=p)
                for x, p in zip(inputs, parts, strict=True)
            )
            return tuple(y[:, None] for y in made)
        shape = self.tp, len(self.outputs), -1
        weight = self.weight[...].reshape(*shape, self.weight.shape[-1])
        operands = (weight,) if self.weight_scale is None else (weight, self.weight_scale[...].reshape(shape))
        if inputs[0].shape[0] > self.rows_fused or len(inputs) == 1:
            return tuple(self._shards(x, *(own[:, i] for own in operands)) for i, x in enumerate(inputs))
        batched = jax.vmap(self._shards, in_axes=(2, *[1] * len(operands)), out_axes=2)
        return tuple(jnp.unstack(batched(jnp.stack(inputs, axis=2), *operands), axis=2))

    def _shards(self, x: jax.Array, *operands: jax.Array) -> jax.Array:
        """`[T, tp, in]` by `[tp, columns, in]`, and scales `[tp, columns]` of int8 -> `[T, tp, columns]`."""
        multiply = matmul if len(operands) == 1 else int8_matmul.matmul
        return jax.vmap(multiply, in_axes=(1, *[0] * len(operands)), out_axes=1)(x, *operands)


class RowLinear(Multiplying):
    """`y = x W^T (+ b)` with the input divided over shards: the one all-reduce of a block.

    `inputs`: how many columns the input has, or the output of the projection before that they are: one that is kept
        with
    units of zeroes has as many columns of zeroes here.
    `summed`: whether a call gives the sum over shards; if not, the caller takes `product` of what a shard has, and
        sums.
    """

    def __init__(
        self,
        build: Build,
        in_axis: str,
        inputs: int | Output,
        out_features: int,
        *,
        bias: bool = False,
        summed: bool = True,
    ):
        inputs = Output(in_axis, inputs) if isinstance(inputs, int) else inputs
        self.tp, self.summed = build.tp, summed
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
        return [Collective(ALL_REDUCE, "partial sums", self.weight.shape[0])] if self.tp > 1 and self.summed else []
