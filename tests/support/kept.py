"""Compare weights that are kept in 4 bits or FP8 with those that the loader dequantises."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.checkpoint import rules
from jaxinfer.kernels.matmul.packed_matmul import Packed
from jaxinfer.loading import weights
from jaxinfer.sharding import make_mesh
from support import four_bits

CODES = (jnp.uint8, jnp.float8_e4m3fn)
"""Dtypes of packed weights."""


def parameters(folder: Path, tp: int = 1, **how: Any) -> dict[str, jax.Array]:
    module = weights.load(folder, make_mesh(tp), dtype="float32", progress=False, **how)
    return {path: param[...] for path, param in rules.parameters(module).items()}


def assert_kept(folder: Path, tp: int, count: int = 8, **how: Any) -> None:
    """Compare each packed weight with the one that the loader dequantises, and where their shards lie.

    `count`: how many weights are packed.
    """
    found, expected = parameters(folder, tp, **how), parameters(folder, tp, quantization="dequantize", **how)
    packed = [path for path, array in found.items() if array.dtype in CODES and path.endswith(".weight")]
    assert len(packed) == count and not any(path.startswith(("embedding", "head")) for path in packed)
    for path, wanted in expected.items():
        if path not in packed:
            np.testing.assert_array_equal(found[path], wanted)
            continue
        stem = path.removesuffix("weight")
        own = Packed(found[path], found[f"{stem}weight_scale"], found.get(f"{stem}weight_zero"))
        rows = Packed(*(None if one is None else np.asarray(one).reshape(-1, one.shape[-1]) for one in own))
        np.testing.assert_array_equal(_values(rows).reshape(wanted.shape), wanted)
        for array in own:
            assert array is None or array.sharding.spec == wanted.sharding.spec


def _values(packed: Packed) -> np.ndarray:
    """Return the weight in float32, computed on the host."""
    if not packed.fp8:
        return four_bits.dequantised(packed)
    return packed.codes.astype(np.float32) * np.repeat(packed.scales.astype(np.float32), packed.group, axis=1)
