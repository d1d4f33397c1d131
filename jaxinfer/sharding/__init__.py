"""Logical axes, meshes, the rules that map one to the other, and placement plans. Independent of any model.

`plan(model, tensor_parallel_size=8)`, which makes a `Plan` from a config.json, is `jaxinfer.loading.plan.plan`; the
root package also exports it here.
"""

import sys
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh as Mesh

from jaxinfer.sharding import axes as axes
from jaxinfer.sharding import mesh as mesh
from jaxinfer.sharding import rules as rules
from jaxinfer.sharding.mesh import make_mesh as make_mesh
from jaxinfer.sharding.placement import Plan as Plan
from jaxinfer.sharding.serving_mesh import serving_mesh as serving_mesh

if TYPE_CHECKING:
    plan: Any


def __getattr__(name: str) -> Any:
    """Return a name that the root package adds to this one (`plan`)."""
    return sys.modules["jaxinfer"].name_from_above(__name__, name)
