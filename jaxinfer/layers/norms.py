"""Normalization layers and scaling of activations."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.kernels import rowwise
from jaxinfer.kernels.matmul.choose import XLA
from jaxinfer.layers.params import Build, constant


class Scaling(NamedTuple):
    """How an RMSNorm's scale is stored and applied; defaults are Llama's."""

    offset: float = 0.0
    """Added to the checkpoint's scale: 1 for Gemma, which stores scale - 1."""
    wide: bool = False
    """Whether to multiply in float32, before rounding to the activations' dtype; False: after rounding."""

    def __call__(self, wide: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Scale the normalized float32 input `wide` and return it in `dtype`."""
        if self.wide:
            return (wide * (self.offset + scale.astype(jnp.float32))).astype(dtype)
        return (self.offset + scale if self.offset else scale) * wide.astype(dtype)


def scale_by(x: jax.Array, factor: float) -> jax.Array:
    """Multiply by a Python number in float32 and round once to the dtype of `x`, as torch does."""
    return (x.astype(jnp.float32) * jnp.float32(factor)).astype(x.dtype)


def normalise(x: jax.Array, eps: float) -> jax.Array:
    """Return `x / sqrt(mean(x^2) + eps)` over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, in float32 (arXiv:1910.07467)."""

    kernel: str = XLA
    """Implementation, as that of products; set by `layers.linear.use_kernel`."""

    def __init__(self, build: Build, size: int, eps: float, axis: str | None, scaling: Scaling = Scaling()):
        self.scale = constant(build, (size,), (axis,), 1.0 - scaling.offset)
        self.eps, self.scaling = eps, scaling

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize `[..., size]` in the dtype of `x`."""
        scale = self.scale[...]
        if rowwise.serves(self.kernel, x, scale):
            return rowwise.rms_norm(x, scale, self.how)
        return self.scaling(normalise(x, self.eps), scale, x.dtype)

    def of_sum(self, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return `x + y` and that sum normalized."""
        scale = self.scale[...]
        if rowwise.serves(self.kernel, x, y, scale):
            total, normed = rowwise.add_rms_norm(x, y, scale, self.how)
            return total, self(total) if self.tapped else normed
        x = x + y
        return x, self(x)

    @property
    def how(self) -> rowwise.RmsScaling:
        """The norm as kernels take it."""
        return rowwise.RmsScaling(self.eps, *self.scaling)

    @property
    def tapped(self) -> bool:
        """Whether the output of calls is read or changed (`functional.taps`)."""
        return type(self).__call__ is not RMSNorm.__call__


def normalise_together(
    parts: Sequence[jax.Array],
    scale: jax.Array,
    widths: Sequence[int],
    eps: float,
    *,
    over: str | None,
    scaling: Scaling = Scaling(),
) -> tuple[jax.Array, ...]:
    """Apply an RMSNorm to each of several arrays over its whole width, which may be sharded over a mesh axis.

    The sums of squares take one all-reduce. Padding columns are zero and add nothing.

    Args:
        parts: local columns of each array, `[..., columns]`; inside `jax.shard_map` unless `over` is None.
        scale: scales of all parts, concatenated, `[..., all columns]`.
        widths: divisor of each sum of squares.
        eps: added to the mean.
        over: mesh axis of the columns; None if the parts are not sharded.
        scaling: how the scale is applied.
    """
    wide = [part.astype(jnp.float32) for part in parts]
    squares = jnp.stack([jnp.sum(part * part, axis=-1) for part in wide], axis=-1)
    squares = squares if over is None else jax.lax.psum(squares, over)
    inverse = jnp.split(jax.lax.rsqrt(squares / jnp.array(widths, jnp.float32) + eps), len(parts), axis=-1)
    ends = [sum(part.shape[-1] for part in parts[:count]) for count in range(1, len(parts))]
    own = jnp.split(scale, ends, axis=-1)
    return tuple(scaling(part * i, s, given.dtype) for given, part, i, s in zip(parts, wide, inverse, own, strict=True))


class LayerNorm(nnx.Module):
    """Layer normalization: `(x - mean(x)) / sqrt(var(x) + eps) * scale + bias` over the last axis, in float32.

    See arXiv:1607.06450.

    Args:
        build: how parameters are made.
        size: length of the last axis.
        eps: added to the variance.
        axis: logical name of the last axis.
        bias: whether there is a bias; Cohere's norms have none.
    """

    def __init__(self, build: Build, size: int, eps: float, axis: str | None, *, bias: bool = True):
        self.scale = constant(build, (size,), (axis,), 1.0)
        self.bias = constant(build, (size,), (axis,), 0.0) if bias else None
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize `[..., size]` in the dtype of `x`."""
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        wide = wide * self.scale[...].astype(jnp.float32)
        if self.bias is not None:
            wide = wide + self.bias[...].astype(jnp.float32)
        return wide.astype(x.dtype)
