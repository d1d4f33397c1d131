"""Gather weights that are divided over the mesh axis `fsdp`, a module at a time."""

from typing import TypeVar

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from jaxinfer.sharding import axes, rules

Part = TypeVar("Part", bound=nnx.Module)


def gather(part: Part, mesh: Mesh | AbstractMesh, x: jax.Array) -> tuple[Part, jax.Array]:
    """Gather a module's weights over `fsdp`, once its input is available; without such an axis nothing is done.

    The barrier ties the weights to the input: otherwise the compiler could gather all layers before the first, and
    hoist them out of a loop over steps.

    Args:
        part: the module.
        mesh: the mesh that its weights lie on.
        x: the module's input.

    Returns:
        The module, with weights that `fsdp` does not divide, and the input to call it with.
    """
    if mesh.shape.get(axes.FSDP, 1) == 1:
        return part, x
    graph, state = nnx.split(part)
    flat = nnx.to_flat_state(state)
    arrays, x = jax.lax.optimization_barrier(([param.get_value() for _, param in flat], x))
    gathered = []
    for (path, param), array in zip(flat, arrays, strict=True):
        where = ".".join(map(str, path))
        placed = rules.of(mesh, param.get_metadata(), array.shape, where, gathered=True)
        gathered.append((path, param.replace(jax.lax.with_sharding_constraint(array, placed))))
    return nnx.merge(graph, nnx.from_flat_state(gathered)), x
