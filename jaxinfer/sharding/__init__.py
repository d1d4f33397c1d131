"""Named axes, the mesh, and the one table between them. Knows no model."""

from jax.sharding import Mesh as Mesh

from jaxinfer.sharding import axes as axes
from jaxinfer.sharding import mesh as mesh
from jaxinfer.sharding import rules as rules
from jaxinfer.sharding.mesh import make_mesh as make_mesh
