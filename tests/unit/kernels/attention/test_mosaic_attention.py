"""Decode by the Mosaic GPU kernel, interpreted on the CPU, against the reference."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from support.attention import Case, Shape, same_cache

from jaxinfer.errors import ConfigError
from jaxinfer.kernels.attention import choose, xla_attention
from jaxinfer.kernels.attention.mosaic_attention import MosaicAttention, unsupported
from jaxinfer.kernels.attention.mosaic_tiles import KEYS
from jaxinfer.kernels.triton.triton_launch import Target
from jaxinfer.sharding import make_mesh

PLAIN = Shape(heads=8, kv_heads=2, dim=64, block=16, dtype="bfloat16")
SHAPES = {
    "window that begins within a block": replace(PLAIN, window=70),
    "blocks of a tile, narrow values": replace(PLAIN, dim=128, value_dim=64, block=KEYS),
    "sinks, softcap, more heads than 8 on one, float16": Shape(
        heads=24, kv_heads=2, dim=64, block=32, dtype="float16", sinks=True, softcap=20.0
    ),
}
PADDING = 2
PROCESSORS = 6
"""Few, so that long rows are cut into pieces of several tiles."""


@pytest.mark.parametrize("name", SHAPES)
def test_decode_is_the_oracle(name: str):
    plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip("jax < 0.12 has no interpreter for these kernels")
    kernels = MosaicAttention(Target(90, PROCESSORS), plgpu.InterpretGPUParams(detect_races=True))
    lengths = [1, PLAIN.block, KEYS + 1, 500]
    case = Case(SHAPES[name], lengths, [1] * len(lengths))
    q, k, v, rows, positions = case.step(padding=PADDING)
    step, scoring = case.decode_rows(padding=PADDING), case.shape.scoring
    slots = case.slots(rows, positions)
    decode = jax.jit(partial(kernels.decode, scoring=scoring))
    found, kv_cache = decode(q, k, v, case.kv_cache, slots, step, sinks=case.sinks)
    expected, expected_cache = case.expected(q, k, v, rows, positions)
    case.close(found[:-PADDING], expected[:-PADDING])
    same_cache(kv_cache, expected_cache, case.shape.wide)
    assert not np.asarray(found[-PADDING:], np.float32).any()


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (replace(PLAIN, dtype="float32"), "float32"),
        (replace(PLAIN, block=4), "block_size"),
        (replace(PLAIN, dim=96), "96"),
        (replace(PLAIN, heads=130, kv_heads=2), "65"),
        (replace(PLAIN, codes="int8"), "16 bits"),
        (replace(PLAIN, kv_heads=1, dim=128, value_dim=64, latent=True), "arrays of their own"),
    ],
)
def test_caches_that_the_kernel_cannot_read(shape: Shape, reason: str):
    case = Case(shape, [3], [1])
    assert reason in unsupported(case.kv_cache, case.step()[0])


def test_other_caches_are_left_to_xla():
    case = Case(replace(PLAIN, dtype="float32"), [3, 20], [1, 1])
    q, k, v, rows, positions = case.step()
    args = q, k, v, case.kv_cache, case.slots(rows, positions), case.decode_rows()
    ways = MosaicAttention(Target(90, PROCESSORS)).decode, xla_attention.decode
    found, expected = (jax.jit(partial(way, scoring=case.shape.scoring))(*args) for way in ways)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), found, expected))


def test_other_devices_are_refused():
    with pytest.raises(ConfigError, match=r"attention_kernel='mosaic' needs GPUs of compute capability 9\.0.*cpu"):
        choose.choose(choose.MOSAIC, make_mesh())
