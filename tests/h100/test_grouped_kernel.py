"""The kernel of grouped products compiled for an H100, and steps of models with experts."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from support.lowering import Compiled, abstract_model, compile_step, h100_mesh, require_cuda_compiler
from support.ptx import compiled_kernels, spilled

from jaxinfer.engine.runner.batch import Bucket
from jaxinfer.engine.runner.shapes import Shapes
from jaxinfer.engine.sampling.sampling_rows import Level
from jaxinfer.kernels.matmul import grouped
from jaxinfer.kernels.matmul.choose import TRITON
from jaxinfer.kernels.triton.triton_launch import Target
from jaxinfer.sharding.policy import Placement

pytest.importorskip("triton")
pytestmark = [pytest.mark.xdist_group("h100"), pytest.mark.slow]

H100 = Target(90, 132)
SHARED = 227 << 10
"""Bytes of shared memory of one multiprocessor."""
PRODUCTS = {
    "Qwen3-30B, a token": (8, 128, 1536, 2048, "bfloat16"),
    "Qwen3-30B, 8 tokens, down": (64, 128, 2048, 768, "bfloat16"),
    "Qwen3-30B, prefill": (4096, 128, 1536, 2048, "bfloat16"),
    "Mixtral, prefill": (4096, 8, 28672, 4096, "bfloat16"),
    "gpt-oss, 32 tokens": (128, 32, 5760, 2880, "bfloat16"),
    "float16": (64, 8, 1024, 512, "float16"),
    "float32": (256, 8, 1024, 512, "float32"),
    "int8, a token": (8, 64, 1024, 2048, "int8"),
    "int8, prefill": (4096, 8, 1024, 2048, "int8"),
}
"""Rows, experts, out, in, dtype of the weights."""


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_kernel_suits_the_device(name: str):
    rows, groups, out, inner, dtype = PRODUCTS[name]
    array = jax.ShapeDtypeStruct
    x, weight = array((rows, inner), "bfloat16" if dtype == "int8" else dtype), array((groups, out, inner), dtype)
    scales = array((groups, out), jnp.float32) if dtype == "int8" else None
    with compiled_kernels() as made:
        call = lambda *operands: grouped.matmul(*operands, kernel=TRITON, target=H100)  # noqa: E731
        jax.eval_shape(call, x, weight, array((groups + 1,), jnp.int32), scales)
    (kernel,) = made
    assert kernel.shared_bytes * 2 <= SHARED
    assert spilled(kernel.ptx) == 0
    # Weights come in 16 bytes at a time, asynchronously.
    assert re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], (?:0x10|16)", kernel.ptx)
    if dtype != "float32":
        assert re.search(r"wgmma\.mma_async|mma\.sync", kernel.ptx)
    if "prefill" in name:
        assert "wgmma.mma_async" in kernel.ptx


LAYERS = 4
QWEN = dict(
    architectures=["Qwen3MoeForCausalLM"],
    vocab_size=32000,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=LAYERS,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=4096,
    rms_norm_eps=1e-6,
    dtype="bfloat16",
    num_experts=32,
    num_experts_per_tok=4,
    moe_intermediate_size=256,
    norm_topk_prob=True,
)
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


def step(kind: str, tp: int = 1, placement: str = "shard", quantization: str | None = None) -> Compiled:
    require_cuda_compiler()
    program, params = abstract_model(
        QWEN, h100_mesh(tp), placement=Placement({"*.mlp": placement}), quantization=quantization
    )
    tokens = ROWS if kind == "decode" else CHUNK
    return compile_step(program, params, SHAPES, Bucket(kind, tokens, ROWS, WIDTH, Level.GREEDY, -1, tile=program.tile))


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_a_step_with_experts_is_one_command_buffer_and_copies_no_weights(kind: str, quantization: str | None):
    compiled = step(kind, quantization=quantization)
    assert Counter(compiled.kernels)["grouped"] == 2 * LAYERS
    assert compiled.command_buffers == 1 and len(compiled.launched_alone) == len(compiled.sampler.kernels) == 4
    assert compiled.aliased_bytes >= compiled.cache_bytes and compiled.large_copies == []
    assert compiled.collectives == Counter()


@pytest.mark.parametrize("placement", ["shard", "experts"])
def test_a_layer_has_two_all_reduces_and_nothing_else(placement: str):
    assert step("decode", 4, placement).collectives == Counter({"all-reduce": 2 * LAYERS + 1, "all-gather": 1})
