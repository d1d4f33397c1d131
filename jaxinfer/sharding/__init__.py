"""Named axes, the mesh, the one table between them, and the plan that shows it. Knows no model.

`plan(model, tensor_parallel_size=8)` is where a config.json becomes a `Plan`; it is `jaxinfer.planning.plan`, which
knows models, and is imported when it is first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh as Mesh

from jaxinfer.sharding import axes as axes
from jaxinfer.sharding import mesh as mesh
from jaxinfer.sharding import rules as rules
from jaxinfer.sharding.mesh import make_mesh as make_mesh
from jaxinfer.sharding.placement import Plan as Plan

if TYPE_CHECKING:
    plan: Any


def __getattr__(name: str) -> Any:
    """`plan`, from above this package."""
    if name == "plan":
        return importlib.import_module("jaxinfer.planning").plan
    raise AttributeError(f"module 'jaxinfer.sharding' has no attribute {name!r}")
