"""The device's own attention kernel, against the oracle."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from support.attention import CHUNKS, PLAIN, SHAPES, Case, Shape, same_cache

from jaxinfer.errors import ConfigError
from jaxinfer.kernels.attention import choose as attention
from jaxinfer.sharding import make_mesh

REAL = {
    "GQA of 8": Shape(heads=32, kv_heads=4, dim=128, block=16, dtype="bfloat16"),
    "heads of 64, float16": Shape(heads=32, kv_heads=8, dim=64, block=16, dtype="float16"),
    "latent of 512 + 64": Shape(heads=16, kv_heads=1, dim=576, block=16, dtype="bfloat16", value_dim=512, latent=True),
    "window, sinks, softcap": Shape(
        heads=16, kv_heads=2, dim=64, block=16, dtype="bfloat16", window=100, sinks=True, softcap=20.0
    ),
}
"""As models have them, beside the small shapes that all implementations share."""
CHOSEN = {name: SHAPES[name] for name in ("plain", "window", "sinks", "narrow values", "latent")} | REAL
PADDING = 3


@pytest.fixture(scope="module")
def name(device: str) -> str:
    """The implementation that the device's users get: on a GPU the Triton kernel, or the test fails."""
    return attention.choose(attention.TRITON if device == "gpu" else attention.AUTO, make_mesh())


@pytest.fixture(scope="module")
def kernel(name: str) -> Any:
    return attention.implementation(name, make_mesh())


def sized(chosen: str, device: str) -> Shape:
    """Return a shape as models have it; on a CPU with fewer heads."""
    shape = CHOSEN[chosen]
    few = chosen in REAL and device == "cpu"
    return replace(shape, heads=shape.heads // 4, kv_heads=max(1, shape.kv_heads // 4)) if few else shape


def check(case: Case, call: Any, step: Any, values: tuple) -> None:
    """Runs a case; the result and the cache are the oracle's."""
    q, k, v, rows, positions = values
    found, kv_cache = jax.jit(partial(call, scoring=case.shape.scoring))(
        q, k, v, case.kv_cache, case.slots(rows, positions), step, sinks=case.sinks
    )
    expected, expected_cache = case.expected(q, k, v, rows, positions)
    case.close(found[:-PADDING], expected[:-PADDING])
    same_cache(kv_cache, expected_cache, case.shape.wide)
    assert np.isfinite(np.asarray(found[-PADDING:], np.float32)).all(), "padding gives what harms nobody"


@pytest.mark.parametrize("chosen", CHOSEN)
def test_decode_is_the_oracle(kernel: Any, device: str, chosen: str):
    shape = sized(chosen, device)
    block = shape.block
    lengths = [1, block - 1, block, block + 1, 4 * block + 2, 700 if chosen in REAL else 50]
    case = Case(shape, lengths, [1] * len(lengths))
    check(case, kernel.decode, case.decode_rows(padding=PADDING), case.step(padding=PADDING))


@pytest.mark.parametrize("lengths", [[20_000], [5000, 1, 17, 300]], ids=["one long", "ragged"])
def test_decode_in_pieces_is_the_oracle(kernel: Any, device: str, lengths: list[int]):
    lengths = lengths if device == "gpu" else [-(-length // 10) for length in lengths]
    case = Case(replace(REAL["GQA of 8"], heads=8, kv_heads=1, dim=64), lengths, [1] * len(lengths))
    check(case, kernel.decode, case.decode_rows(padding=PADDING), case.step(padding=PADDING))


@pytest.mark.parametrize(
    ("chosen", "chunks"),
    [*((chosen, "several") for chosen in CHOSEN), ("plain", "one token"), ("plain", "more than a tile")],
)
def test_prefill_is_the_oracle(kernel: Any, name: str, device: str, chosen: str, chunks: str):
    shape = sized(chosen, device)
    # The chunks are in terms of the small block.
    wide = [(start * shape.block // PLAIN.block, count) for start, count in CHUNKS[chunks]]
    case = Case(shape, [start + count for start, count in wide], [count for _, count in wide])
    value_dim = shape.value_dim or shape.dim
    tile = attention.prefill_tile(
        name, shape.heads // shape.kv_heads, value_dim, np.dtype(case.kv_cache.keys.dtype).itemsize
    )
    call = partial(kernel.prefill, tile=tile)
    check(case, call, case.prefill_tiles(tile, padding=PADDING), case.step(padding=PADDING))


@pytest.mark.parametrize("chosen", ["GQA of 8", "heads of 64, float16", "window, sinks, softcap"])
def test_decode_by_the_mosaic_kernel_is_the_oracle(device: str, chosen: str):
    """On a CPU this kernel is interpreted (`tests/unit/kernels/attention/test_mosaic_attention.py`)."""
    try:
        kernel = attention.implementation(attention.choose(attention.MOSAIC, make_mesh()), make_mesh())
    except ConfigError as error:
        pytest.skip(str(error))
    lengths = [1, 15, 16, 17, 66, 3000]
    case = Case(REAL[chosen], lengths, [1] * len(lengths))
    check(case, kernel.decode, case.decode_rows(padding=PADDING), case.step(padding=PADDING))
