"""Fused projections: one GEMM, several named outputs, each sharded or replicated.

A weight is stored shard-major, `[tp, columns, in]`: the columns that one device owns of every output lie
together, so that the split after the GEMM is local (a plain `[q | k | v]` on Auto axes compiles to 16 extra
collective-permutes a layer on eight devices). It is always multiplied as a matrix, `[tp * columns, in]`.
QKV, gate/up and the other fused projections are declarations of this mechanism, not classes of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.errors import ConfigError
from jaxinfer.kernels import int8_matmul
from jaxinfer.kernels.matmul import XLA, matmul
from jaxinfer.layers.params import Build, constant, matrix
from jaxinfer.sharding import axes


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

    @property
    def rows(self) -> int:
        """Rows of this output's own weight `[rows, in]` in a checkpoint."""
        return self.units * self.width

    def shard_rows(self, shard: int, tp: int) -> slice:
        """The half-open interval of checkpoint rows that shard `shard` of `tp` holds.

        Raises:
            ConfigError: `units` and `tp` do not divide; names both and the remedy.
        """
        if not self.sharded:
            return slice(0, self.rows)
        if self.units % tp == 0:
            span = self.units // tp * self.width
            return slice(shard * span, (shard + 1) * span)
        if self.repeat and tp % self.units == 0:
            unit = shard * self.units // tp
            return slice(unit * self.width, (unit + 1) * self.width)
        raise ConfigError(
            f"projection {self.name!r} has {self.units} units, which {tp} shards do not divide; choose a "
            f"tensor_parallel_size that divides {self.units}"
        )

    def columns(self, tp: int) -> int:
        """Columns of this output on one shard."""
        rows = self.shard_rows(0, tp)
        return rows.stop - rows.start


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
        columns = sum(output.columns(self.tp) for output in self.outputs)
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
    """`y = x W^T (+ b)` with the input divided over shards: the one all-reduce of a block."""

    def __init__(self, build: Build, in_axis: str, in_features: int, out_features: int, *, bias: bool = False):
        shape, names = (out_features, in_features), (axes.EMBED, in_axis)
        self.weight, self.weight_scale = matrix(build, shape, names, in_features**-0.5)
        self.bias = constant(build, (out_features,), (axes.EMBED,), 0.0) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[T, tp, in / tp]` -> `[T, out]`."""
        y = self.product(x, self.weight, self.weight_scale)
        return y if self.bias is None else y + self.bias[...]
