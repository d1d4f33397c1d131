"""Fused projections: one GEMM with several named outputs, each sharded or replicated.

Weights are stored shard-major, `[tp, columns, in]`: the columns of all outputs that a device owns are contiguous, so
the split after the GEMM is local (a plain `[q | k | v]` under Auto axes compiles to 16 extra collective-permutes per
layer on eight devices). They are always multiplied as a matrix, `[tp * columns, in]`. QKV, gate/up and other fused
projections are declarations of outputs, not classes.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, groupby, pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.kernels.matmul import int8_matmul, packed_matmul
from jaxinfer.kernels.matmul.choose import NATIVES, XLA, matmul
from jaxinfer.kernels.matmul.packed_matmul import Packed
from jaxinfer.kernels.triton.triton_launch import Target
from jaxinfer.layers.norms import RMSNorm
from jaxinfer.layers.params import Build, constant, matrix
from jaxinfer.sharding import axes
from jaxinfer.sharding.collectives import ALL_REDUCE, Collective
from jaxinfer.sharding.rules import indivisible


class Piece(NamedTuple):
    """Interval of a checkpoint's rows and its place on a shard; columns not covered by a piece are zero."""

    column: int
    """First column of this output on the shard that it fills."""
    start: int
    stop: int
    """Half-open interval, in rows of the output's own weight."""


@dataclass(frozen=True)
class Output:
    """Named output of a fused projection: `units` heads (or columns) of `width` columns each."""

    name: str
    units: int
    """Heads, or columns if `width` is 1; a unit is never split across devices."""
    width: int = 1
    """Columns per unit."""
    sharded: bool = True
    """Whether units are divided over the shards; False: every shard computes the whole output."""
    repeat: bool = False
    """Whether units are repeated if there are more shards than units (k and v heads)."""
    stored: tuple[int | None, ...] | None = None
    """The checkpoint's units in stored order, None for a zero padding unit (`layers.heads`); by default all units in
    checkpoint order."""

    @property
    def rows(self) -> int:
        """Rows of this output's own weight `[rows, in]` in a checkpoint."""
        return self.units * self.width

    @property
    def stored_units(self) -> int:
        """Stored units, padding included; repeated units count once."""
        return self.units if self.stored is None else len(self.stored)

    def divided(self, count: int) -> "Output":
        """Return the output with `count` columns taken as one, which must not cross units where these are reordered."""
        if self.width % count == 0:
            return replace(self, width=self.width // count)
        if self.stored is not None or self.rows % count:
            raise ValueError(f"{count} columns cross the units of {self}")
        return Output(self.name, self.rows // count, sharded=self.sharded)

    def columns(self, tp: int, where: str = "") -> int:
        """Return the columns of this output on one shard of `tp`.

        Raises:
            ConfigError: the units do not divide over the shards; names the module `where`, axis, sizes and remedies.
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
        """Return the checkpoint rows that shard `shard` of `tp` holds, in the order of its columns.

        Raises:
            ConfigError: see `columns`.
        """
        count = self.columns(tp) // self.width
        first = shard * self.stored_units // tp if self.sharded else 0
        if self.stored is None:
            return [Piece(0, first * self.width, (first + count) * self.width)]
        own, found = enumerate(self.stored[first : first + count]), []
        # Merge units that are adjacent both in the checkpoint and in storage.
        for offset, run in groupby(own, lambda pair: None if pair[1] is None else pair[1] - pair[0]):
            if offset is not None:
                places = [at for at, _ in run]
                start, stop = places[0] + offset, places[-1] + 1 + offset
                found.append(Piece(places[0] * self.width, start * self.width, stop * self.width))
        return found


def by_columns(build: Build, outputs: Sequence[Output], value: float) -> nnx.Param:
    """Make a parameter `[tp, columns]` with one value per column of these outputs, sharded like them."""
    shape = build.tp, sum(output.columns(build.tp) for output in outputs)
    return constant(build, shape, (axes.SHARD, axes.COLUMNS), value, outputs=tuple(outputs))


class Weights(NamedTuple):
    """Arrays of a weight `[..., in]` made by `params.matrix`; leading axes are flattened in products."""

    values: jax.Array
    """The weight, its int8 values, or its codes (`packed_matmul.Packed`)."""
    scales: jax.Array | None = None
    """`[...]` of the rows of an int8 weight, or `[..., groups]` of codes."""
    zeros: jax.Array | None = None
    """`[..., groups]` zero points of codes."""

    @classmethod
    def of(cls, arrays: Mapping[str, jax.Array]) -> "Weights":
        """Return those among the arrays of a `MatmulModule` by name."""
        return cls(arrays["weight"], arrays.get("weight_scale"), arrays.get("weight_zero"))


class MatmulModule(nnx.Module):
    """Base of modules that multiply activations with weights made by `params.matrix`."""

    kernel: str = XLA
    """Implementation of matmul (`kernels.matmul.choose`); set by `use_kernel`."""
    target: Target | None = None
    """GPU that kernels of dense products are compiled for, if weights are not divided; set by `use_kernel`."""
    block: int = 1
    """Columns per block that int8 matmuls rotate (`int8_matmul.rotation`)."""
    activations: bool = False
    """Whether products with codes quantise activations, too; set by `layers.packing.pack`."""
    weight: nnx.Param
    weight_scale: nnx.Param | None = None
    weight_zero: nnx.Param | None = None

    @property
    def weights(self) -> Weights:
        """The module's own weight."""
        return Weights(*(None if p is None else p[...] for p in (self.weight, self.weight_scale, self.weight_zero)))

    def product(
        self,
        x: jax.Array,
        weights: Weights,
        dtype: jax.typing.DTypeLike | None = None,
        part: tuple[int, int] | None = None,
    ) -> jax.Array:
        """Compute `x W^T`.

        Args:
            x: `[T, in]`, or `[T, tp, in / tp]` if the columns are divided over shards.
            weights: the weight, `[..., in]`.
            dtype: of the result; None for that of `x`.
            part: start and end of the weight's rows to use; None for all.

        Returns:
            `[T, out]`.
        """
        lead = weights.values.ndim - 1
        rows, scales, zeros = (None if one is None else one.reshape(-1, *one.shape[lead:]) for one in weights)
        how = {"kernel": self.kernel, "part": part}
        if scales is None:
            return matmul(x.reshape(x.shape[0], -1), rows, dtype, **how)
        if rows.dtype == jnp.int8:
            return int8_matmul.matmul(x, rows, scales, dtype, block=self.block, **how)
        own = Packed(rows, scales, zeros)
        return packed_matmul.matmul(x, own, dtype, target=self.target, activations=self.activations, **how)


def use_kernel(module: nnx.Module, kernel: str, target: Target | None = None) -> None:
    """Set the matmul implementation of all parts of a module, and the GPU it is for where weights are not divided.

    Norms, and activations beside projections, have native kernels where products do.
    """
    for _, part in nnx.iter_modules(module):
        if isinstance(part, MatmulModule):
            part.kernel, part.target = kernel, target
        elif isinstance(part, RMSNorm):
            part.kernel = kernel


def use_fusion(module: nnx.Module, fused: bool) -> None:
    """Set whether the fused projections in all parts of a module run as one GEMM, or as one per output."""
    for _, part in nnx.iter_modules(module):
        if isinstance(part, FusedLinear | BatchedLinear):
            part.fused = fused


class FusedLinear(MatmulModule):
    """`y_i = x W_i^T (+ b_i)` for several outputs `i`, as one GEMM, or one per output unless `fused`.

    Args:
        build: how parameters are made.
        in_features: width of the input.
        outputs: the outputs.
        bias: whether outputs have a bias, or the names of those that do.
    """

    fused: bool = True
    """Set by `use_fusion`."""
    adapters: Any = None
    """LoRA adapters of the outputs (`layers.adapters.FusedAdapters`); None without."""

    def __init__(
        self, build: Build, in_features: int, outputs: Sequence[Output], *, bias: bool | Collection[str] = False
    ):
        self.outputs, self.in_features = tuple(outputs), in_features
        self.tp = build.tp
        columns = sum(output.columns(self.tp, build.path) for output in self.outputs)
        shape, names = (self.tp, columns, in_features), (axes.SHARD, axes.COLUMNS, axes.EMBED)
        self.block = int8_matmul.rotation(in_features)
        self.weight, self.weight_scale = matrix(
            build, shape, names, in_features**-0.5, block=self.block, outputs=self.outputs
        )
        named = [output.name for output in self.outputs] if bias is True else bias or ()
        biased = tuple(output for output in self.outputs if output.name in named)
        sizes = [output.columns(self.tp) for output in biased]
        self.bias = constant(build, (self.tp, sum(sizes)), names[:2], 0.0, outputs=biased) if biased else None
        self.biased = tuple(output.name for output in biased)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Map `[T, in]` to one `[T, tp, columns_i]` per output, in the declared order."""
        parts = self._outputs(x)
        return parts if self.adapters is None else self.adapters.add(x, parts)

    def _outputs(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Compute the outputs without adapters."""
        if not self.fused:
            parts = self._apart(x)
        else:
            parts = self._split(self._whole(x), self.outputs)
        if self.bias is None or self.fused and self._all_biased:
            return parts
        having = [output for output in self.outputs if output.name in self.biased]
        biases = dict(zip(self.biased, self._split(self.bias[...], having), strict=True))
        parts = zip(self.outputs, parts, strict=True)
        return tuple(part + biases[output.name] if output.name in biases else part for output, part in parts)

    @property
    def _all_biased(self) -> bool:
        return self.bias is not None and len(self.biased) == len(self.outputs)

    def _whole(self, x: jax.Array) -> jax.Array:
        """Run one GEMM, `[T, tp, columns]`, and add the bias if all outputs have one."""
        y = self.product(x, self.weights).reshape(x.shape[0], self.tp, -1)
        return y + self.bias[...] if self._all_biased else y

    @property
    def is_whole(self) -> bool:
        """Whether all outputs are made as one array on one device, which nothing reads or changes apart (`whole`)."""
        alone = self.fused and self.tp == 1 and self.adapters is None and (self.bias is None or self._all_biased)
        return alone and type(self).__call__ is FusedLinear.__call__  # not tapped (`functional.taps`)

    def whole(self, x: jax.Array) -> jax.Array:
        """Map `[T, in]` to all outputs side by side, `[T, columns]`; for projections that are `is_whole`."""
        return self._whole(x)[:, 0]

    def _apart(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Run one GEMM per output on its columns of the fused weight."""
        parts = pairwise(accumulate((output.columns(self.tp) for output in self.outputs), initial=0))
        if self.tp == 1:
            return tuple(self.product(x, self.weights, part=part)[:, None] for part in parts)
        own = (Weights(*(None if one is None else one[:, start:end] for one in self.weights)) for start, end in parts)
        return tuple(self.product(x, part).reshape(x.shape[0], self.tp, -1) for part in own)

    def _split(self, y: jax.Array, outputs: Sequence[Output]) -> tuple[jax.Array, ...]:
        """Split `[..., columns]` by outputs."""
        ends = list(accumulate(output.columns(self.tp) for output in outputs))
        return tuple(jnp.split(y, ends[:-1], axis=-1))


class BatchedLinear(MatmulModule):
    """`y_i = x_i W_i^T` for several inputs of equal width, as one batched GEMM, or one by one unless `fused`.

    The inputs are replicated outputs of a fused projection; each shard uses its own copy.
    """

    fused: bool = True
    """Set by `use_fusion`."""

    def __init__(self, build: Build, in_features: int, outputs: Sequence[Output]):
        self.outputs, self.tp = tuple(outputs), build.tp
        widths = {output.columns(self.tp, build.path) for output in self.outputs}
        if len(widths) > 1:
            raise ValueError(f"{build.path}: outputs of a batched GEMM must have equal widths, got {sorted(widths)}")
        shape, names = (self.tp, len(self.outputs) * widths.pop(), in_features), (axes.SHARD, axes.COLUMNS, axes.EMBED)
        self.block = int8_matmul.rotation(in_features)
        self.weight, self.weight_scale = matrix(
            build, shape, names, in_features**-0.5, block=self.block, outputs=self.outputs
        )

    def __call__(self, *inputs: jax.Array) -> tuple[jax.Array, ...]:
        """Map inputs `[T, tp, in]` to outputs `[T, tp, columns]`."""
        if (
            self.kernel in NATIVES
        ):  # single shard only (XLA cannot partition it); no batched form, which would gain nothing
            width = self.weight.shape[1] // len(self.outputs)
            parts = ((i * width, (i + 1) * width) for i in range(len(inputs)))
            made = (self.product(x[:, 0], self.weights, part=p) for x, p in zip(inputs, parts, strict=True))
            return tuple(y[:, None] for y in made)
        shape = self.tp, len(self.outputs), -1
        weight = self.weight[...].reshape(*shape, self.weight.shape[-1])
        operands = (weight,) if self.weight_scale is None else (weight, self.weight_scale[...].reshape(shape))
        if not self.fused or len(inputs) == 1:
            return tuple(self._shards(x, *(own[:, i] for own in operands)) for i, x in enumerate(inputs))
        batched = jax.vmap(self._shards, in_axes=(2, *[1] * len(operands)), out_axes=2)
        return tuple(jnp.unstack(batched(jnp.stack(inputs, axis=2), *operands), axis=2))

    def _shards(self, x: jax.Array, *operands: jax.Array) -> jax.Array:
        """Multiply `[T, tp, in]` with `[tp, columns, in]` and, for int8, scales `[tp, columns]`: `[T, tp, columns]`."""
        multiply = matmul if len(operands) == 1 else partial(int8_matmul.matmul, block=self.block)
        return jax.vmap(multiply, in_axes=(1, *[0] * len(operands)), out_axes=1)(x, *operands)


class RowLinear(MatmulModule):
    """Row-parallel `y = x W^T (+ b)`: the input is sharded, and an all-reduce sums the output over the devices.

    Args:
        build: how parameters are made.
        in_axis: logical axis of the input columns.
        inputs: number of input columns, or the projection output that produces them, whose zero padding units get zero
            columns here.
        out_features: width of the output.
        bias: whether there is a bias.
        summed: whether a call returns the sum over shards; otherwise callers use `product` on local shards and sum
            themselves.
    """

    adapters: Any = None
    """LoRA adapters (`layers.adapters.RowAdapters`); None without."""

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
        self.tp, self.summed, self.inputs = build.tp, summed, inputs
        shape, names = (out_features, inputs.columns(build.tp, build.path) * build.tp), (axes.EMBED, in_axis)
        self.in_features = shape[1]
        # Shards hold whole units, so blocks within a unit fit every number of shards.
        self.block = int8_matmul.rotation(*(inputs.rows, build.tp) if inputs.width == 1 else (inputs.width,))
        self.weight, self.weight_scale = matrix(
            build,
            shape,
            names,
            inputs.rows**-0.5,
            block=self.block,
            unpadded=(out_features, inputs.rows),
            inputs=inputs,
        )
        self.bias = constant(build, (out_features,), (axes.EMBED,), 0.0) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[T, tp, in / tp]` to `[T, out]`."""
        y = self.product(x, self.weights)
        y = y if self.adapters is None else self.adapters.add(x, y)
        return y if self.bias is None else y + self.bias[...]

    def collectives(self) -> list[Collective]:
        """Return the all-reduce of partial sums."""
        return [Collective(ALL_REDUCE, "partial sums", self.weight.shape[0])] if self.tp > 1 and self.summed else []


class WholeLinear(MatmulModule):
    """`y = x W^T`, computed whole on every device: for narrow products, whose all-reduce would take longer."""

    def __init__(self, build: Build, in_features: int, out_features: int):
        self.block = int8_matmul.rotation(in_features)
        shape, names = (out_features, in_features), (None, axes.EMBED)
        self.weight, self.weight_scale = matrix(build, shape, names, in_features**-0.5, block=self.block)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[T, in]` to `[T, out]`."""
        return self.product(x, self.weights)
