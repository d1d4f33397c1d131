"""The kernel of products with weights of 4 bits compiled for an H100, and steps of a model that has them."""

import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from support.lowering import MEDIUM, Compiled, abstract_model, compile_step, h100_mesh, require_cuda_compiler
from support.ptx import compiled_kernels, spilled
from support.tiny import FOUR_BITS

from jaxinfer.engine.runner.batch import Bucket
from jaxinfer.engine.runner.shapes import Shapes
from jaxinfer.engine.sampling.sampling_rows import Level
from jaxinfer.kernels.matmul import packed_matmul
from jaxinfer.kernels.matmul.choose import TRITON
from jaxinfer.kernels.matmul.packed_matmul import Packed
from jaxinfer.kernels.triton.triton_launch import Target

pytest.importorskip("triton")
pytestmark = [pytest.mark.xdist_group("h100"), pytest.mark.slow]

H100 = Target(90, 132)
SHARED = 227 << 10
"""Bytes of shared memory of one multiprocessor."""
PRODUCTS = {
    "Llama 8B, a token": (1, 28672, 4096, 128, True, "bfloat16"),
    "64 tokens, down": (64, 4096, 14336, 128, True, "float16"),
    "symmetric, groups of 32": (32, 6144, 4096, 32, False, "bfloat16"),
    "groups that tiles cut": (16, 1024, 2880, 90 * 8, True, "bfloat16"),
    "float32": (16, 1024, 2048, 64, True, "float32"),
}
"""Rows, out, in, columns of a group, whether there are zero points, dtype of the activations."""
LAYERS = 3
ROWS, BLOCK, WIDTH, CHUNK = 8, 16, 64, 256
SHAPES = Shapes(
    num_blocks=2 * ROWS * WIDTH,
    block_size=BLOCK,
    rows=ROWS,
    width=WIDTH,
    decode_buckets=(ROWS,),
    prefill_buckets=(CHUNK,),
    prefill_rows=ROWS,
    max_logprobs=5,
    max_length=WIDTH * BLOCK,
    sampled_vocab=32000,
)


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_kernel_suits_the_device(name: str):
    rows, out, inner, group, asymmetric, dtype = PRODUCTS[name]
    array, groups = jax.ShapeDtypeStruct, (out, inner // group)
    zeros = array(groups, jnp.uint8) if asymmetric else None
    packed = Packed(array((out, inner // 2), jnp.uint8), array(groups, jnp.float16), zeros)
    with compiled_kernels() as made:
        call = partial(packed_matmul.matmul, kernel=TRITON, target=H100)
        jax.eval_shape(call, array((rows, inner), dtype), packed)
    (kernel,) = made
    assert kernel.shared_bytes * 2 <= SHARED
    assert spilled(kernel.ptx) == 0
    assert re.search(r"cp\.async\.c[ag]\.shared\.global|ld\.global\S*\.v[24]\.b32", kernel.ptx)
    if dtype != "float32":
        assert re.search(r"wgmma\.mma_async|mma\.sync", kernel.ptx)


def step(kind: str, tp: int = 1) -> Compiled:
    require_cuda_compiler()
    program, params = abstract_model(MEDIUM | FOUR_BITS | {"num_hidden_layers": LAYERS}, h100_mesh(tp))
    tokens = ROWS if kind == "decode" else CHUNK
    return compile_step(program, params, SHAPES, Bucket(kind, tokens, ROWS, WIDTH, Level.GREEDY, -1, tile=program.tile))


def test_a_decode_step_reads_codes_and_makes_no_weight():
    compiled = step("decode")
    assert Counter(compiled.kernels)["packed"] == 4 * LAYERS
    assert compiled.command_buffers == 1
    assert compiled.aliased_bytes >= compiled.cache_bytes
    assert not re.search(r"bf16\[(?:1536|5632),1024\]|bf16\[1024,(?:1024|2816)\]", compiled.executable.as_text())


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_devices_dequantise_their_own_part(kind: str):
    """Two all-reduces a layer, as with other weights, and no codes are gathered."""
    assert step(kind, 4).collectives == Counter({"all-reduce": 2 * LAYERS + 1, "all-gather": 1})
