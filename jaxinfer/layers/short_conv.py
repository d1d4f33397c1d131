"""Gated short convolution of LFM2 (arXiv:2511.23404): `out(c * conv(b * x))`, with b, c and x projections of the input.

Its state is the convolution's last inputs. Columns are sharded; the only collective is the output's all-reduce.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.kv.spec import State, StateArray
from jaxinfer.layers.attending import AttentionModule
from jaxinfer.layers.linear import FusedLinear, Output, RowLinear, by_columns
from jaxinfer.layers.params import Build
from jaxinfer.layers.recurrent import Rows, Way, convolution, convolve, run_on_shards
from jaxinfer.sharding import axes


class ShortConvState(NamedTuple):
    """State of one layer by slot, or its shape (`kv.spec.State`) or partition spec."""

    conv: Any
    """Last convolution inputs `[N, W - 1, M]`, sharded on M."""


@dataclass(frozen=True)
class ShortConvSpec:
    """Configuration of a gated short convolution."""

    width: int
    """M."""
    taps: int
    """W: positions that a token sees, itself included; at least 2."""
    bias: bool = False
    """Whether both projections and the convolution have biases."""


class ShortConv(AttentionModule):
    """Gated short convolution."""

    no_split = True
    """A placement shards or replicates all parts together (`loading.weights.placeable`)."""

    def __init__(self, build: Build, spec: ShortConvSpec):
        """Create the layer.

        Raises:
            ConfigError: the columns do not divide over the shards.
        """
        self.spec, self.mesh, self.dtype, self.replicated = spec, build.mesh, build.dtype, build.replicated
        b, c, x = (Output(name, spec.width) for name in "bcx")
        self.projection = FusedLinear(build, spec.width, (b, c, x), bias=spec.bias)
        self.conv = convolution(build, (x,), spec.taps)
        self.conv_bias = by_columns(build, (x,), 0.0) if spec.bias else None
        self.out = RowLinear(build, axes.HEADS, x, spec.width, bias=spec.bias)

    @property
    def cache_spec(self) -> State:
        """Cache spec of the layer."""
        shape, names = (self.spec.taps - 1, self.spec.width), (None, axes.HEADS)
        return State(ShortConvState(StateArray(shape, names, jnp.dtype(self.dtype))), self.replicated)

    def __call__(self, x: jax.Array, state: ShortConvState, rows: Rows) -> tuple[jax.Array, ShortConvState]:
        """Map `[T, M]` to `[T, M]` and the state after the step's tokens."""
        by_token = self.projection(x)
        bias = () if self.conv_bias is None else (self.conv_bias[...],)
        by_shard = self.conv[...][:, :, 0], *bias
        y, state = run_on_shards(
            _local, self.mesh, self.attention_kernel, self.cache_spec, by_token, by_shard, None, state, rows
        )
        return self.out(y), state


def _local(
    by_token: tuple[jax.Array, ...],
    by_shard: tuple[jax.Array, ...],
    _whole: None,
    state: ShortConvState,
    rows: Rows,
    _way: Way,
) -> tuple[jax.Array, ShortConvState]:
    """Compute `[T, 1, columns]` of the local columns."""
    (b, c, x), (weight, *bias) = by_token, by_shard
    y, conv = convolve(b * x, weight, state.conv, rows)
    y = y + bias[0].astype(y.dtype) if bias else y
    return (c * y.astype(c.dtype))[:, None], ShortConvState(conv)
