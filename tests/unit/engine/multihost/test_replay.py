"""Encoding of dispatches, and detection of diverged devices."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support import tiny

from jaxinfer.engine.multihost import divergence, handshake
from jaxinfer.engine.multihost.replay import decode_key, encode_key
from jaxinfer.errors import DistributedError
from jaxinfer.sharding import make_mesh

pytestmark = pytest.mark.xdist_group("llama")


def test_keys_round_trip():
    keys = tiny.random_runner().programs.keys()
    assert {type(key).__name__ for key in keys} >= {"Bucket", "Copies", "Install", "InstallTables"}
    for key in keys:
        back = decode_key(encode_key(key))
        assert (back, str(back), back.takes, back.gives) == (key, str(key), key.takes, key.gives)


@pytest.mark.parametrize(
    "value",
    [
        ["Nothing", {}],
        ["Copies", {}],
        ["Copies", {"width": "4"}],
        ["Copies", {"width": True}],
        ["Copies", {"width": 4, "more": 1}],
        ["Copies", []],
        ["Copies"],
        7,
        None,
    ],
)
def test_invalid_keys_are_refused(value):
    with pytest.raises(DistributedError, match="invalid program key"):
        decode_key(json.dumps(value).encode())


def test_invalid_json_is_refused():
    with pytest.raises(DistributedError, match="invalid program key"):
        decode_key(b"\x80\x04.")


def copies(*own: np.ndarray) -> jax.Array:
    """An array declared as replicated whose copy on device i is `own[i]`."""
    mesh = make_mesh(len(own))
    parts = [jax.device_put(values, device) for values, device in zip(own, mesh.devices.flat)]
    return jax.make_array_from_single_device_arrays(own[0].shape, NamedSharding(mesh, PartitionSpec()), parts)


def distances(*own: np.ndarray) -> list[float]:
    hidden = copies(*own)
    rows = divergence.local(jax.jit(divergence.summary, static_argnums=0)(hidden.sharding.mesh, hidden))
    assert rows.shape == (len(own), divergence.GROUPS + 1)
    return [divergence.max_distance(rows[i : i + 1], rows[0]) for i in range(len(own))]


def test_a_diverged_device_is_distinguished_from_rounding():
    random = np.random.default_rng(1)
    hidden = np.concatenate([random.normal(size=(5, 70)), np.tile(random.normal(size=70), (59, 1))]).astype(np.float32)
    rounded = np.asarray(jnp.asarray(hidden, jnp.bfloat16), np.float32)
    other = random.normal(size=hidden.shape).astype(np.float32)
    same, near, far, flipped = distances(hidden, rounded, other, -hidden)
    assert same == 0 and 0 < near < divergence.TOLERANCE / 3
    assert far > 5 * divergence.TOLERANCE and flipped > 5 * divergence.TOLERANCE


def test_rows_that_failed_are_not_compared():
    hidden = np.ones((2, 16), np.float32)
    hidden[1] = np.nan
    assert distances(hidden, hidden) == [0, 0]


def test_the_checksum_sees_a_changed_weight_a_moved_one_and_their_order():
    random = np.random.default_rng(2)
    one, two = (random.normal(size=8).astype(np.float32) for _ in range(2))
    changed = one.copy()
    changed[3] = np.nextafter(changed[3], 9)
    found = [
        handshake.checksum([copies(a), copies(b)])
        for a, b in ((one, two), (changed, two), (one[::-1].copy(), two), (two, one), (one, two))
    ]
    assert len(set(found)) == 4 and found[0] == found[-1]
