"""The modules of an LLM's replicas: the loaded one on the devices of each, without copies of its weights."""

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import tree_map

from jaxinfer.models.base import LanguageModel


def on_mesh(module: LanguageModel, mesh: Mesh) -> LanguageModel:
    """Return a module on a part of its mesh; it shares the arrays that lie there.

    Args:
        module: the module, whose weights are replicated over the axes that `mesh` lacks.
        mesh: the part, as of `sharding.mesh.of_replicas`.
    """

    def place(array: jax.Array) -> jax.Array:
        spec = array.sharding.spec if isinstance(array.sharding, NamedSharding) else PartitionSpec()
        return jax.device_put(array, NamedSharding(mesh, spec))

    graph, state = nnx.split(module)
    placed = nnx.merge(graph, tree_map(place, state))
    for _, part in nnx.iter_modules(placed):
        if hasattr(part, "mesh"):
            part.mesh = mesh
    return placed
