"""Creation of parameters: shape, dtype, logical axes and initial values."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from jaxinfer.kernels.matmul import int8_matmul
from jaxinfer.sharding import mesh as meshes
from jaxinfer.sharding.policy import EXPERTS, REPLICATE, Placement


class Build(NamedTuple):
    """Arguments with which modules create their parameters."""

    rngs: nnx.Rngs
    dtype: jnp.dtype
    """Dtype of weights and activations."""
    mesh: Mesh | AbstractMesh
    quantization: str | None = None
    """"int8" to quantize the weights made by `matrix`; None to keep them in `dtype`."""
    placement: Placement = Placement()
    """Which modules are sharded over the mesh."""
    path: str = ""
    """Path of the module being built, from the model's root."""
    pad_heads: bool = False
    """Whether attention is padded with zero heads that make its heads divide over the shards (`layers.heads`)."""

    def at(self, *names: str | int) -> "Build":
        """Return the build of a submodule with this name."""
        return self._replace(path=".".join([*filter(None, [self.path]), *map(str, names)]))

    @property
    def replicated(self) -> bool:
        """Whether the module is replicated on every device."""
        return self.placement.tactic(self.path) == REPLICATE

    @property
    def by_expert(self) -> bool:
        """Whether the module's experts, if any, are distributed whole over devices (expert parallelism)."""
        return self.placement.tactic(self.path) == EXPERTS

    @property
    def tp(self) -> int:
        """Shards of the module's tensor-parallel weights."""
        return 1 if self.replicated else meshes.size(self.mesh)


def weight(
    build: Build, shape: tuple[int, ...], axes: tuple[str | None, ...], scale: float, **metadata: Any
) -> nnx.Param:
    """Create a weight of normal values with standard deviation `scale`.

    Args:
        build: how parameters are made.
        shape: its shape.
        axes: logical axis names.
        scale: standard deviation.
        **metadata: for the loader: `outputs` of a fused weight; `unpadded`, the shape in the checkpoint if it differs;
            `inputs`, the projection output that produces the weight's columns; `stacked`, whether the first axis stacks
            several such weights, to each of which the other metadata applies.
    """
    values = scale * jax.random.normal(build.rngs.params(), shape, build.dtype)
    return param(build, values, axes, **metadata)


def param(build: Build, values: jax.Array, axes: tuple[str | None, ...], **metadata: Any) -> nnx.Param:
    """Create a parameter with its logical axes, module path and whether it is replicated (`sharding.rules.of`)."""
    return nnx.Param(values, logical_axes=axes, replicated=build.replicated, module=build.path, **metadata)


def matrix(
    build: Build,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    scale: float,
    *,
    block: int,
    whole_scales: bool = False,
    **metadata: Any,
) -> tuple[nnx.Param, nnx.Param | None]:
    """Create a `weight` for matmuls and, if weights are quantized, the scales of its rows `shape[:-1]`.

    The loader computes the scales from the weight's tensors. Scales are sharded like the rows, or replicated with
    `whole_scales`, for rows that every device looks up. In int8 the rows are rotated in blocks of `block` columns
    (`int8_matmul.rotation`).
    """
    made = weight(build, shape, axes, scale, **metadata)
    if build.quantization is None:
        return made, None
    values, scales = int8_matmul.quantise_weight(made[...], block)
    names = (None,) * scales.ndim if whole_scales else axes[:-1]
    rows = {name: value[:-1] if name == "unpadded" else value for name, value in metadata.items() if name != "inputs"}
    return (
        param(build, values, axes, block=block, **metadata),
        param(build, scales, names, scales_of="weight", block=block, **rows),
    )


def constant(
    build: Build, shape: tuple[int, ...], axes: tuple[str | None, ...], value: float, **metadata: Any
) -> nnx.Param:
    """Create a parameter with one value everywhere, such as a norm scale or bias."""
    return param(build, jnp.full(shape, value, build.dtype), axes, **metadata)
