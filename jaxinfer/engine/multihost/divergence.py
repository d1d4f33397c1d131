"""Whether the devices of several processes compute the same: a few sums of what each of them has whole.

The residual stream is whole on every device: each makes its own copy, and nothing sums the copies up again. Where one
device goes astray the head, divided over all, still gives all of them the same tokens, and wrong ones.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxinfer.layers.sharded import on_shards

GROUPS = 8
"""Groups of neighbouring columns that are summed up, under random signs."""
MOST = 0.1
"""How far apart two sums may be, in parts of what sums of independent numbers of that size would be. Other programs for
other devices round otherwise, by a few hundredths in bfloat16; numbers that have nothing to do with each other are 1
apart."""


def summary(mesh: Mesh, hidden: jax.Array) -> jax.Array:
    """Of hidden states `[B, M]`: `[devices, GROUPS + 1]` float32, each device's own row on that device.

    The last column is what the others are held against. What is not finite counts as 0: rows that failed are not
    compared.
    """

    # Rows of padding are all alike: without weights of their own their rounding would add up.
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
    """Those of this process's devices, `[n, GROUPS + 1]`; waits for them."""
    return np.concatenate([np.asarray(shard.data) for shard in summaries.addressable_shards])


def apart(rows: np.ndarray, reference: np.ndarray) -> float:
    """How far the farthest of rows `[n, GROUPS + 1]` is from one of them, `[GROUPS + 1]`, in the unit of `MOST`."""
    scale = max(float(reference[-1]), float(rows[:, -1].max()), 1e-30)
    return float(np.abs(rows - reference).max()) / scale
