"""Checksum of named tensors, equal wherever the values lie: on the host, on one device or sharded over several.

A trainer and the engine can each compute it over their own arrays and compare one string:

    checksum.checksum(tensors) == llm.weights_checksum()

The definition is stable. Each tensor has two sums modulo 2**32 over its elements: of `mix(bits ^ i * 0x9e3779b9)` and
of `mix(bits + i * 0x85ebca6b + 1)`, where `bits` are those of the element as an unsigned integer, i is its row-major
index and `mix` is the finalizer of MurmurHash3, all in 32 bits. The checksum is the SHA-256 of one line for each
tensor, sorted by name: `NAME DTYPE D0xD1x... SUMS` and a line break, the sums as 16 hexadecimal digits.
"""

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

HOST_ELEMENTS = 1 << 20
"""Elements of a NumPy array that are summed at a time."""
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


class Sums(NamedTuple):
    """Sums over a tensor's values."""

    first: int
    second: int
    not_finite: int
    """Number of elements that are NaN or infinite, modulo 2**32."""


def checksum(tensors: Mapping[str, Any]) -> str:
    """Return the checksum of tensors by name: NumPy or JAX arrays of up to 32 bits an element."""
    return combine(tensors, sums(tensors))


def combine(tensors: Mapping[str, Any], found: Mapping[str, Sums], dtypes: Mapping[str, np.dtype] = {}) -> str:
    """Return the checksum of tensors whose sums are known; `dtypes`: the dtype they were converted to before."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        dtype = np.dtype(dtypes.get(name, tensors[name].dtype)).name
        shape = "x".join(map(str, tensors[name].shape))
        digest.update(f"{name} {dtype} {shape} {found[name].first:08x}{found[name].second:08x}\n".encode())
    return digest.hexdigest()


def sums(tensors: Mapping[str, Any], dtypes: Mapping[str, np.dtype] = {}) -> dict[str, Sums]:
    """Return the sums of each tensor, after conversion to its dtype in `dtypes`; JAX arrays stay on their devices."""
    found = {}
    for name, values in sorted(tensors.items()):  # in the same order in all processes
        dtype = np.dtype(dtypes.get(name, values.dtype))
        found[name] = _on_host(values, dtype) if isinstance(values, np.ndarray) else _summed(values, dtype)
    return {name: Sums(*map(int, np.asarray(one))) for name, one in found.items()}


def _summed(values: jax.Array, dtype: np.dtype) -> jax.Array:
    """Sum an array where it lies; the sums of one that lies in several processes are in all of them."""
    if values.is_fully_addressable or not isinstance(values.sharding, NamedSharding):
        return _on_device(values, dtype=dtype)
    everywhere = NamedSharding(values.sharding.mesh, PartitionSpec())
    return jax.jit(_on_device, static_argnames="dtype", out_shardings=everywhere)(values, dtype=dtype)


@partial(jax.jit, static_argnames="dtype")
def _on_device(values: jax.Array, dtype: np.dtype) -> jax.Array:
    values = values.astype(dtype)
    index = jnp.zeros(values.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(values.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, values.shape, axis) * np.uint32(stride & 0xFFFFFFFF)
        stride *= values.shape[axis]
    bits = jax.lax.bitcast_convert_type(values, _UNSIGNED[dtype.itemsize]).astype(jnp.uint32)
    wrong = ~jnp.isfinite(values) if jnp.issubdtype(dtype, jnp.floating) else jnp.zeros(values.shape, bool)
    return jnp.stack([jnp.sum(one, dtype=jnp.uint32) for one in (*_mixed(bits, index), wrong)])


def _on_host(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    total, flat = np.zeros(3, np.uint32), values.reshape(-1)
    for start in range(0, flat.size, HOST_ELEMENTS):
        with np.errstate(over="ignore", invalid="ignore"):
            piece = np.ascontiguousarray(flat[start : start + HOST_ELEMENTS].astype(dtype))
        bits = piece.view(_UNSIGNED[dtype.itemsize]).astype(np.uint32)
        index = np.arange(start, start + piece.size, dtype=np.uint64).astype(np.uint32)
        wrong = ~np.isfinite(piece) if jnp.issubdtype(dtype, jnp.floating) else np.zeros(piece.shape, bool)
        total += np.array([np.sum(one, dtype=np.uint32) for one in (*_mixed(bits, index), wrong)], np.uint32)
    return total


def _mixed(bits: Any, index: Any) -> tuple[Any, Any]:
    """Return the terms of the two sums, for arrays of uint32."""
    return _mix(bits ^ index * np.uint32(0x9E3779B9)), _mix(bits + index * np.uint32(0x85EBCA6B) + np.uint32(1))


def _mix(x: Any) -> Any:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
