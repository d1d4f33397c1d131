"""The attention kernel compiled for an H100: tensor cores, wide loads, nothing spilled, and what fits beside it."""

import re

import jax
import jax.numpy as jnp
import pytest
from support.ptx import assemble, compiled_kernels

from jaxinfer.kernels.attention.paged import DecodeRows, KVCache, PrefillTiles, Scoring, Slots
from jaxinfer.kernels.attention.quantised_cache import SCALE, format_of
from jaxinfer.kernels.attention.triton_attention import TritonAttention
from jaxinfer.kernels.triton import triton_tiles, tuned
from jaxinfer.kernels.triton.triton_launch import Target

pytest.importorskip("triton")
pytestmark = pytest.mark.xdist_group("h100")

H100 = Target(90, 132)
SHARED, REGISTERS = 227 << 10, 65536
"""Bytes of shared memory, and registers, of one multiprocessor."""
BLOCK, BLOCKS, WIDTH = 16, 4096, 256
# heads, kv heads, key width, value width (None: the keys' columns), dtype, scoring, sinks; and the format of a
# quantised cache
LAYERS = {
    "Llama 3 8B": (32, 8, 128, 128, "bfloat16", Scoring(0.1), False),
    "one kv head of 64": (71, 1, 64, 64, "float16", Scoring(0.1), False),
    "no groups, width 96": (32, 32, 96, 96, "bfloat16", Scoring(0.1), False),
    "latent": (32, 1, 576, None, "bfloat16", Scoring(0.1, value_dim=512), False),
    "Gemma 2": (16, 8, 256, 256, "bfloat16", Scoring(0.1, window=4096, softcap=50.0), False),
    "Gemma 4, full": (32, 4, 512, 512, "bfloat16", Scoring(1.0), False),
    "Gemma 4 E2B, full": (8, 1, 512, 512, "bfloat16", Scoring(1.0), False),
    "Llama 4": (40, 8, 128, 128, "bfloat16", Scoring(0.1, window=8192, chunked=True), False),
    "gpt-oss": (64, 8, 64, 64, "bfloat16", Scoring(0.1, window=128), True),
    "float32": (32, 8, 128, 128, "float32", Scoring(0.1), False),
    "Llama 3 8B, int8 codes": (32, 8, 128, 128, "bfloat16", Scoring(0.1), False, "int8"),
    "Llama 3 8B, fp8 codes": (32, 8, 128, 128, "bfloat16", Scoring(0.1), False, "fp8"),
    "latent, fp8 codes": (32, 1, 576, None, "bfloat16", Scoring(0.1, value_dim=512), False, "fp8"),
    "Gemma 2, int8 codes": (16, 8, 256, 256, "bfloat16", Scoring(0.1, window=4096, softcap=50.0), False, "int8"),
    "gpt-oss, fp8 codes": (64, 8, 64, 64, "bfloat16", Scoring(0.1, window=128), True, "fp8"),
}


def trace(name: str, kind: str) -> None:
    """Builds the program of one attention call, for which its kernels are compiled."""
    heads, kv_heads, dim, value_dim, dtype, scoring, sinks, *codes = LAYERS[name]
    tokens, array, ints = 8 if kind == "decode" else 512, jax.ShapeDtypeStruct, jnp.int32
    widths, kinds = (dim, value_dim), (format_of(*codes) if codes else dtype, SCALE)
    if codes:
        widths += 1, None if value_dim is None else 1
    kv_cache = KVCache(
        *(None if d is None else array((BLOCKS, kv_heads, BLOCK, d), kinds[n // 2]) for n, d in enumerate(widths))
    )
    q, k = array((tokens, heads, dim), dtype), array((tokens, kv_heads, dim), dtype)
    v = None if value_dim is None else array((tokens, kv_heads, value_dim), dtype)
    slots, tables = Slots(array((tokens,), ints), array((tokens,), ints)), array((8, WIDTH), ints)
    extra = array((heads,), dtype) if sinks else None
    kernels = TritonAttention(H100)
    if kind == "decode":
        rows, call = DecodeRows(tables, array((8,), ints)), kernels.decode
        run = lambda q, k, v, kv, slots, rows, extra: call(q, k, v, kv, slots, rows, scoring, extra)  # noqa: E731
    else:
        rows, call = PrefillTiles(tables, array((40, 4), ints), array((), ints)), kernels.prefill
        tile = triton_tiles.tile(heads // kv_heads, value_dim or 512, jnp.dtype(dtype).itemsize)
        run = lambda q, k, v, kv_cache, slots, rows, extra: call(  # noqa: E731
            q, k, v, kv_cache, slots, rows, scoring, extra, tile=tile
        )
    jax.eval_shape(run, q, k, v, kv_cache, slots, rows, extra)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decode", "prefill"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_kernel_suits_the_device(name: str, kind: str):
    with compiled_kernels() as made, tuned.watching() as calls:
        trace(name, kind)
    attend = made[0]
    [tiles] = calls.estimated.values()
    assert [kernel.name for kernel in made] == ["attend", "combine"][: 2 if kind == "decode" else 1]
    at_a_time = tiles.decode_programs if kind == "decode" else 1
    assert attend.shared_bytes * at_a_time <= SHARED
    found = [assemble(kernel.ptx) for kernel in made]
    assert not any(one.spilled for one in found)
    assert found[0].registers * attend.threads * at_a_time <= REGISTERS
    # Keys and values come in 16 bytes at a time, asynchronously; codes of latents, which are keys and values, are
    # widened in registers before.
    if name == "latent, fp8 codes":
        assert re.search(r"ld\.global\.[a-zA-Z:.0-9]*v4\.b32", attend.ptx)
    else:
        assert re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], (?:0x10|16)", attend.ptx)
    if name != "float32":
        assert re.search(r"wgmma\.mma_async|mma\.sync", attend.ptx)
    wide = LAYERS[name][2] > 256  # 32 queries, too few for these instructions
    if kind == "prefill" and not wide and name != "float32":
        assert "wgmma.mma_async" in attend.ptx
