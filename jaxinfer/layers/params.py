"""How a parameter is made: its shape, dtype, logical axes and initial values, stated once."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxinfer.sharding import mesh as meshes


class Build(NamedTuple):
    """What every module needs to make its parameters."""

    rngs: nnx.Rngs
    dtype: jnp.dtype
    """Of weights and activations."""
    mesh: Mesh

    @property
    def tp(self) -> int:
        """Shards of a tensor-parallel weight."""
        return meshes.size(self.mesh)


def weight(
    build: Build, shape: tuple[int, ...], axes: tuple[str | None, ...], scale: float, **metadata: Any
) -> nnx.Param:
    """A matrix of normal values of standard deviation `scale`, named axis by axis.

    `metadata` is what the loader must know: `outputs` of a fused weight, `unpadded` of a padded one.
    """
    values = scale * jax.random.normal(build.rngs.params(), shape, build.dtype)
    return nnx.Param(values, logical_axes=axes, **metadata)


def constant(
    build: Build, shape: tuple[int, ...], axes: tuple[str | None, ...], value: float, **metadata: Any
) -> nnx.Param:
    """A parameter that starts at one value everywhere: norm scales, biases."""
    return nnx.Param(jnp.full(shape, value, build.dtype), logical_axes=axes, **metadata)
