"""How a parameter is made: its shape, dtype, logical axes and initial values, stated once."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from jaxinfer.kernels.matmul import int8_matmul
from jaxinfer.sharding import mesh as meshes
from jaxinfer.sharding.policy import EXPERTS, REPLICATE, Placement


class Build(NamedTuple):
    """What every module needs to make its parameters."""

    rngs: nnx.Rngs
    dtype: jnp.dtype
    """Of weights and activations."""
    mesh: Mesh | AbstractMesh
    quantization: str | None = None
    """What the matrices that `matrix` makes are kept in: "int8"; None: in `dtype`."""
    placement: Placement = Placement()
    """Which modules are divided over the mesh."""
    path: str = ""
    """Of the module that is made, from the model's root."""
    pad_heads: bool = False
    """Whether attention gets heads of zeroes where its own do not divide (`layers.heads`)."""

    def at(self, *names: str | int) -> "Build":
        """For the module of this name within this one."""
        return self._replace(path=".".join([*filter(None, [self.path]), *map(str, names)]))

    @property
    def replicated(self) -> bool:
        """Whether the module is whole on every device."""
        return self.placement.tactic(self.path) == REPLICATE

    @property
    def by_expert(self) -> bool:
        """Whether the module's experts, if it has any, lie whole on one device each."""
        return self.placement.tactic(self.path) == EXPERTS

    @property
    def tp(self) -> int:
        """Shards of the module's tensor-parallel weights."""
        return 1 if self.replicated else meshes.size(self.mesh)


def weight(
    build: Build, shape: tuple[int, ...], axes: tuple[str | None, ...], scale: float, **metadata: Any
) -> nnx.Param:
    """A matrix of normal values of standard deviation `scale`, named axis by axis.

    `metadata` is what the loader must know: `outputs` of a fused weight, `unpadded`, the shape in the checkpoint where
    it is another, `inputs`, the output whose columns those of the weight are, and `stacked`: the first axis is one of
    several such weights, to which all else applies alone.
    """
    values = scale * jax.random.normal(build.rngs.params(), shape, build.dtype)
    return param(build, values, axes, **metadata)


def param(build: Build, values: jax.Array, axes: tuple[str | None, ...], **metadata: Any) -> nnx.Param:
    """A parameter with its logical axes, whether they are divided (`sharding.rules.of`), and its module's path."""
    return nnx.Param(values, logical_axes=axes, replicated=build.replicated, module=build.path, **metadata)


def matrix(
    build: Build,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    scale: float,
    *,
    whole_scales: bool = False,
    **metadata: Any,
) -> tuple[nnx.Param, nnx.Param | None]:
    """A `weight` to multiply activations with and, where weights are quantised, the scales of its rows `shape[:-1]`.

    The loader makes the scales of the weight's own tensors. They lie where their rows do, or with `whole_scales`
    all on every device, for rows that are looked up from everywhere.
    """
    made = weight(build, shape, axes, scale, **metadata)
    if build.quantization is None:
        return made, None
    values, scales = int8_matmul.quantise(made[...])
    names = (None,) * scales.ndim if whole_scales else axes[:-1]
    rows = {name: value[:-1] if name == "unpadded" else value for name, value in metadata.items() if name != "inputs"}
    return (
        param(build, values, axes, **metadata),
        param(build, scales, names, scales_of="weight", **rows),
    )


def constant(
    build: Build, shape: tuple[int, ...], axes: tuple[str | None, ...], value: float, **metadata: Any
) -> nnx.Param:
    """A parameter that starts at one value everywhere: norm scales, biases."""
    return param(build, jnp.full(shape, value, build.dtype), axes, **metadata)
