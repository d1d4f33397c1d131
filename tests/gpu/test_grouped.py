"""The device's own kernel of grouped products, against the oracle."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.kernels.matmul import choose as matmul
from jaxinfer.kernels.matmul import grouped, int8_matmul
from jaxinfer.kernels.triton import triton_launch
from jaxinfer.sharding import make_mesh

CASES = {
    "a token of 128 experts": ([1 if e % 16 == 0 else 0 for e in range(128)], 8, 1536, 2048),
    "rows of padding": ([3, 0, 7, 1, 0, 0, 40, 2], 64, 200, 352),
    "all to one": ([0, 500, 0, 0], 512, 1024, 512),
    "prefill": ([130, 1, 64, 65, 500, 0, 16, 17], 1024, 768, 1024),
}
"""Rows of the groups, all rows, out, in."""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize("name", CASES)
def test_each_row_is_multiplied_with_the_matrix_of_its_group(device: str, name: str, dtype: str):
    sizes, rows, out, inner = CASES[name]
    if device == "cpu":
        out, inner = out // 4, inner // 4
    mesh, rng = make_mesh(), np.random.default_rng(0)
    kernel = matmul.choose("auto", mesh)
    assert device == "cpu" or kernel == matmul.TRITON
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    end, kind = offsets[-1], jnp.bfloat16 if dtype == "bfloat16" else jnp.float32
    x, weight = (rng.standard_normal(shape).astype(kind) for shape in ((rows, inner), (len(sizes), out, inner)))
    x[end:] = np.nan
    block = int8_matmul.rotation(inner)
    call = jax.jit(partial(grouped.matmul, kernel=kernel, target=triton_launch.target(mesh), block=block))
    if dtype == "int8":
        values, scales = int8_matmul.quantise_weight(weight, block)
        found = np.asarray(call(x, values, offsets, scales), np.float64)[:end]
        expected = np.concatenate(
            [
                int8_matmul.reference(x[a:b], v, s, block)
                for a, b, v, s in zip(offsets, offsets[1:], values, scales, strict=False)
            ]
        )
        steps = np.concatenate(
            [
                int8_matmul.row_scales(int8_matmul.rotate(x[a:b], block))[:, None] * 127 * s
                for a, b, s in zip(offsets, offsets[1:], scales, strict=False)
            ]
        )
        assert (np.abs(found - expected) <= 2.01 * steps + 1e-5 * np.abs(expected)).all()
        return
    found = np.asarray(call(x, weight, offsets)[:end], np.float64)
    expected = grouped.reference(x, weight, offsets)[:end]
    tolerance = 2**-8 * np.abs(expected) if dtype == "bfloat16" else 0
    assert (np.abs(found - expected) <= tolerance + 1e-5 * np.sqrt(inner)).all()
