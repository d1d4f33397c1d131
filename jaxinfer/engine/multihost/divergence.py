"""Detect when the devices of several processes compute different hidden states, by comparing a few sums.

The residual stream is replicated: every device computes its own copy, and nothing sums the copies up again. If one
device computes it wrongly, the logits of the sharded output head are still the same on all devices, so all sample the
same, wrong tokens and nothing else detects the error.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxinfer.layers.sharded import on_shards

GROUPS = 8
"""Number of groups of neighbouring columns that are summed up, under random signs."""
TOLERANCE = 0.1
"""Maximum distance of two sums, relative to the expected size of a sum of independent numbers. Different programs on
different devices round differently, by a few hundredths in bfloat16; unrelated numbers have a distance of about 1.
"""


def summary(mesh: Mesh, hidden: jax.Array) -> jax.Array:
    """Summarize hidden states `[B, M]` as `[devices, GROUPS + 1]` float32, each device's own row on that device.

    The last column is the scale that distances are divided by. Non-finite values count as 0, so failed rows are not
    compared.
    """

    # Padding rows are equal: without random weights per row their rounding errors would add up.
    random = np.random.default_rng(0)
    rows = random.normal(size=(hidden.shape[0], 1)).astype(np.float32)
    signs = random.choice(np.array([-1, 1], np.float32), hidden.shape[1])

    def own(x: jax.Array) -> jax.Array:
        x = jnp.where(jnp.isfinite(x), x, 0).astype(jnp.float32) * rows
        sums = (x * signs).sum(axis=0)
        sums = jnp.pad(sums, (0, -len(sums) % GROUPS)).reshape(GROUPS, -1).sum(axis=1)
        return jnp.append(sums, jnp.sqrt(jnp.square(x).sum() / GROUPS))[None]

    return on_shards(own, mesh, PartitionSpec(), PartitionSpec(mesh.axis_names), hidden)


def local(summaries: jax.Array) -> np.ndarray:
    """Return the summaries `[n, GROUPS + 1]` of this process's devices; blocks until they are computed."""
    return np.concatenate([np.asarray(shard.data) for shard in summaries.addressable_shards])


def max_distance(rows: np.ndarray, reference: np.ndarray) -> float:
    """Return the largest distance of rows `[n, GROUPS + 1]` from a reference row, in the unit of `TOLERANCE`."""
    scale = max(float(reference[-1]), float(rows[:, -1].max()), 1e-30)
    return float(np.abs(rows - reference).max()) / scale
