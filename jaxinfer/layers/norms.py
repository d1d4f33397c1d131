"""Normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.layers.params import Build, constant


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, in float32 (arXiv:1910.07467)."""

    def __init__(self, build: Build, size: int, eps: float, axis: str | None):
        self.scale = constant(build, (size,), (axis,), 1.0)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., size]` -> `[..., size]`, in the dtype of `x`."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return self.scale[...] * wide.astype(x.dtype)


class LayerNorm(nnx.Module):
    """`(x - mean(x)) / sqrt(var(x) + eps) * scale + bias` over the last axis, in float32 (arXiv:1607.06450)."""

    def __init__(self, build: Build, size: int, eps: float, axis: str | None):
        self.scale = constant(build, (size,), (axis,), 1.0)
        self.bias = constant(build, (size,), (axis,), 0.0)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., size]` -> `[..., size]`, in the dtype of `x`."""
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)
