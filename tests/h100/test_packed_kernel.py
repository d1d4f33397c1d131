"""Kernels of products with weights of 4 bits and FP8 compiled for an H100, and steps of models that have them."""

import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from support.lowering import MEDIUM, Compiled, abstract_model, compile_step, h100_mesh, require_cuda_compiler
from support.ptx import compiled_kernels, spilled
from support.tiny import FOUR_BITS

from jaxinfer.engine.runner.batch import Bucket
from jaxinfer.engine.runner.shapes import Shapes
from jaxinfer.engine.sampling.sampling_rows import Level
from jaxinfer.kernels.matmul import grouped, packed_matmul
from jaxinfer.kernels.matmul.choose import TRITON
from jaxinfer.kernels.matmul.packed_matmul import Packed
from jaxinfer.kernels.triton.triton_launch import Binary, Target
from jaxinfer.sharding.policy import Placement

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
IN_FP8 = {
    "Llama 8B, a token": (1, 28672, 4096, 4096, True, "bfloat16"),
    "64 tokens, down": (64, 4096, 14336, 14336, True, "bfloat16"),
    "a prefill": (2048, 6144, 4096, 4096, True, "bfloat16"),
    "columns that tiles cut": (200, 1000, 2880, 2880, True, "float32"),
    "blocks, a token": (1, 28672, 4096, 128, False, "bfloat16"),
    "blocks, 64 tokens": (64, 4096, 14336, 128, False, "bfloat16"),
    "rows, 64 tokens": (64, 4096, 14336, 14336, False, "bfloat16"),
    "float32": (16, 1024, 2048, 64, False, "float32"),
}
"""Rows, out, in, columns of a group, whether activations are quantised, their dtype."""
BLOCKS = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
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


EXPERTS = {
    "gpt-oss 20b, a token": (4, 32, 5760, 2880, 32, "uint8", "bfloat16"),
    "gpt-oss 120b, 64 tokens, down": (256, 128, 2880, 2880, 32, "uint8", "bfloat16"),
    "gpt-oss 20b, 256 tokens": (1024, 32, 5760, 2880, 32, "uint8", "bfloat16"),
    "gpt-oss 20b, prefill": (8192, 32, 5760, 2880, 32, "uint8", "bfloat16"),
    "gpt-oss 20b, prefill, 4 devices": (8192, 32, 2880, 720, 16, "uint8", "bfloat16"),
    "Qwen3-30B, 8 tokens": (64, 128, 1536, 2048, 128, "float16 zeros", "bfloat16"),
    "Mixtral, prefill": (4096, 8, 28672, 4096, 128, "float16 zeros", "float16"),
    "float32": (8192, 32, 5760, 2880, 32, "uint8", "float32"),
}
"""Rows, experts, out, in, columns of a group, form of the scales, dtype of the activations."""


def abstract(shape: tuple[int, ...], group: int, form: str) -> Packed:
    """Return the shapes of a weight; see `support.four_bits.random`."""
    dtype, _, zeros = form.partition(" ")
    array, grid = jax.ShapeDtypeStruct, (*shape[:-1], shape[-1] // group)
    codes = array((*shape[:-1], shape[-1] // 2), jnp.uint8)
    return Packed(codes, array(grid, jnp.dtype(dtype)), array(grid, jnp.uint8) if zeros else None)


def suitable(kernels: list[Binary], dtype: str) -> str:
    """Return the code of the one kernel, which leaves room for another on its multiprocessor and spills nothing."""
    (kernel,) = kernels
    assert kernel.shared_bytes * 2 <= SHARED
    assert spilled(kernel.ptx) == 0
    if dtype != "float32":
        assert re.search(r"wgmma\.mma_async|mma\.sync", kernel.ptx)
    return kernel.ptx


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_kernel_suits_the_device(name: str):
    rows, out, inner, group, asymmetric, dtype = PRODUCTS[name]
    packed = abstract((out, inner), group, "float16 zeros" if asymmetric else "float16")
    with compiled_kernels() as made:
        call = partial(packed_matmul.matmul, kernel=TRITON, target=H100)
        jax.eval_shape(call, jax.ShapeDtypeStruct((rows, inner), dtype), packed)
    ptx = suitable(made, dtype)
    assert re.search(r"cp\.async\.c[ag]\.shared\.global|ld\.global\S*\.v[24]\.b32", ptx)


@pytest.mark.parametrize("name", EXPERTS)
def test_the_kernel_of_experts_suits_the_device(name: str):
    rows, experts, out, inner, group, form, dtype = EXPERTS[name]
    with compiled_kernels() as made:
        call = partial(grouped.packed, kernel=TRITON, target=H100)
        offsets = jax.ShapeDtypeStruct((experts + 1,), jnp.int32)
        jax.eval_shape(
            call, jax.ShapeDtypeStruct((rows, inner), dtype), abstract((experts, out, inner), group, form), offsets
        )
    ptx = suitable(made, dtype)
    assert dtype == "float32" or re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], (?:0x10|16)", ptx)
    assert "wgmma.mma_async" in ptx or rows <= 32 * experts or dtype == "float32"


GPT_OSS = dict(
    architectures=["GptOssForCausalLM"],
    num_local_experts=32,
    num_experts_per_tok=4,
    intermediate_size=512,
    layer_types=["full_attention"] * LAYERS,
    quantization_config={"quant_method": "mxfp4"},
)


@pytest.mark.parametrize("name", IN_FP8)
def test_kernels_of_fp8_suit_the_device(name: str):
    """With quantised activations both operands go to the tensor cores as e4m3, for any number of rows."""
    rows, out, inner, group, activations, dtype = IN_FP8[name]
    array = jax.ShapeDtypeStruct
    packed = Packed(array((out, inner), jnp.float8_e4m3fn), array((out, inner // group), jnp.float32))
    with compiled_kernels() as made:
        call = partial(packed_matmul.matmul, kernel=TRITON, target=H100, activations=activations)
        jax.eval_shape(call, array((rows, inner), dtype), packed)
    assert [kernel.name for kernel in made] == (["rows_to_fp8"] if activations else []) + ["fp8"]
    for kernel in made:
        assert spilled(kernel.ptx) == 0
    assert made[-1].shared_bytes * 2 <= SHARED
    assert re.search(r"cp\.async\.c[ag]\.shared\.global|ld\.global\S*\.v[24]\.b32", made[-1].ptx)
    units = set(re.findall(r"(?:wgmma\.mma_async|mma\.sync)\S*?\.(e4m3\.e4m3|bf16\.bf16)", made[-1].ptx))
    assert units == ({"e4m3.e4m3"} if activations else {"bf16.bf16"} if dtype == "bfloat16" else set())


def step(
    kind: str, tp: int = 1, changes: Mapping[str, Any] = FOUR_BITS, placement: str = "shard", **how: Any
) -> Compiled:
    require_cuda_compiler()
    config = MEDIUM | changes | {"num_hidden_layers": LAYERS}
    program, params = abstract_model(config, h100_mesh(tp), placement=Placement({"*.mlp": placement}), **how)
    tokens = ROWS if kind == "decode" else CHUNK
    return compile_step(program, params, SHAPES, Bucket(kind, tokens, ROWS, WIDTH, Level.GREEDY, -1, tile=program.tile))


def test_a_decode_step_reads_codes_and_makes_no_weight():
    compiled = step("decode")
    assert Counter(compiled.kernels)["packed"] == 4 * LAYERS
    assert compiled.command_buffers == 1
    assert compiled.aliased_bytes >= compiled.cache_bytes
    assert not re.search(r"bf16\[(?:1536|5632),1024\]|bf16\[1024,(?:1024|2816)\]", compiled.executable.as_text())


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_a_step_in_fp8_quantises_rows_and_makes_no_weight(kind: str):
    """Two kernels a product."""
    compiled = step(kind, changes={}, quantization="fp8")
    assert Counter(compiled.kernels) & Counter(["fp8", "rows_to_fp8"] * 4 * LAYERS) == Counter(
        ["fp8", "rows_to_fp8"] * 4 * LAYERS
    )
    assert compiled.command_buffers == 1 and compiled.aliased_bytes >= compiled.cache_bytes
    assert not re.search(r"bf16\[(?:1536|5632),1024\]|bf16\[1024,(?:1024|2816)\]", compiled.executable.as_text())


def test_a_decode_step_reads_blocks_of_fp8_and_makes_no_weight():
    compiled = step("decode", changes=BLOCKS)
    assert Counter(compiled.kernels)["fp8"] == 4 * LAYERS
    assert not re.search(r"bf16\[(?:1536|5632),1024\]|bf16\[1024,(?:1024|2816)\]", compiled.executable.as_text())


def test_devices_quantise_their_own_columns():
    """No more collectives than with other weights, and products of FP8 on each device."""
    compiled = step("decode", 4, changes={}, quantization="fp8")
    assert compiled.collectives == Counter({"all-reduce": 2 * LAYERS + 1, "all-gather": 1})
    parts = [part for part in compiled.executable.as_text().split("\n}") if " dot(" in part]
    assert sum(len(re.findall(r"f8e4m3fn\S+ parameter\(", part)) == 2 for part in parts) == 4 * LAYERS


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_devices_dequantise_their_own_part(kind: str):
    """Two all-reduces a layer, as with other weights, and no codes are gathered."""
    assert step(kind, 4).collectives == Counter({"all-reduce": 2 * LAYERS + 1, "all-gather": 1})


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_a_step_with_experts_reads_their_codes_and_makes_no_weight(kind: str):
    compiled = step(kind, changes=GPT_OSS)
    assert Counter(compiled.kernels)["packed"] == 2 * LAYERS and "grouped" not in compiled.kernels
    assert compiled.command_buffers == 1
    assert compiled.aliased_bytes >= compiled.cache_bytes and compiled.large_copies == []
    assert not re.search(r"(?:bf16|f32)\[32,(?:1,)?(?:1024|512),(?:1024|512)\]", compiled.executable.as_text())


@pytest.mark.parametrize("placement", ["shard", "experts"])
def test_devices_multiply_with_their_own_part_of_the_experts(placement: str):
    compiled = step("decode", 4, GPT_OSS, placement)
    assert compiled.collectives == Counter({"all-reduce": 2 * LAYERS + 1, "all-gather": 1})
    assert Counter(compiled.kernels)["packed"] == 2 * LAYERS
