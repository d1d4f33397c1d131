"""The steps of a model of Kimi-Linear's widths compiled for H100s with none present: state and latents in place, what
shards say."""

import re
from collections import Counter
from functools import cache

import pytest
from support.lowering import Compiled, abstract_model, compile_step, h100_mesh, large_copies, require_cuda_compiler

from jaxinfer.engine.runner.buckets import Needs, decode_bucket, prefill_bucket
from jaxinfer.engine.runner.steps import Shapes
from jaxinfer.sharding.collectives import DECODE, PREFILL

pytestmark = [pytest.mark.xdist_group("h100"), pytest.mark.usefixtures("cuda_compiler"), pytest.mark.slow]

ROWS, LENGTH, BLOCK, CHUNK = 8, 4096, 16, 256
CONFIG = dict(
    architectures=["KimiLinearForCausalLM"],
    vocab_size=163840,
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=4,
    num_attention_heads=32,
    num_key_value_heads=32,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    num_experts=256,
    num_experts_per_token=8,
    num_shared_experts=1,
    moe_intermediate_size=1024,
    first_k_dense_replace=1,
    model_max_length=1048576,
    rms_norm_eps=1e-5,
    dtype="bfloat16",
    linear_attn_config=dict(
        num_heads=32,
        head_dim=128,
        short_conv_kernel_size=4,
        kda_layers=[1, 2, 3],
        full_attn_layers=[4],
    ),
)
"""Kimi-Linear-48B-A3B with four of its layers."""
SHAPES = Shapes(
    num_blocks=2 * ROWS * LENGTH // BLOCK,
    block_size=BLOCK,
    rows=ROWS,
    width=LENGTH // BLOCK,
    decode_buckets=(ROWS,),
    prefill_buckets=(CHUNK,),
    prefill_rows=ROWS,
    max_logprobs=5,
    max_length=LENGTH,
    sampled_vocab=CONFIG["vocab_size"],
    state_slots=4 * ROWS,
)
STATE = SHAPES.state_slots * 32 * 128 * 128
"""Elements of what one layer remembers; the last inputs of its convolution are a thirtieth of that."""


@pytest.fixture(scope="module")
def cuda_compiler() -> None:
    require_cuda_compiler()


@cache
def step(kind: str, tp: int = 1) -> Compiled:
    program, params = abstract_model(CONFIG, h100_mesh(tp))
    make = decode_bucket if kind == DECODE else prefill_bucket
    size = (ROWS, 0) if kind == DECODE else (CHUNK,)
    return compile_step(program, params, SHAPES, make(program, SHAPES, *size, Needs()))


@pytest.mark.parametrize("kind", [DECODE, PREFILL])
def test_states_and_latents_stay_in_place(kind: str):
    compiled = step(kind)
    assert compiled.aliased_bytes >= compiled.cache_bytes
    assert large_copies(compiled.executable.as_text(), STATE) == []


def test_shards_add_up_what_rows_make_and_nothing_else():
    """Of each layer attention and MLP, and the rows of the embedding; the sampler gathers its columns."""
    assert step(DECODE, 4).collectives == Counter({"all-reduce": 2 * 4 + 1, "all-gather": 1})


def test_a_kda_layer_has_one_product_for_six_projections_and_one_for_two():
    """q, k, v, b, f_a and g_a; f_b and g_b. Beside them its recurrence, and what comes out of it."""
    kda, experts = 3, 3
    dims = re.findall(r"= \w+\[([\d,]+)\]\S* dot\(", step(DECODE).executable.as_text())
    assert dims.count(f"{3 * 4096 + 32 + 2 * 128},{ROWS}") == kda
    assert dims.count(f"2,4096,{ROWS}") == kda
    # Of the others: latents and queries, the two halves of absorbed attention, its end; MLPs, routers, the head.
    assert len(dims) == 4 * kda + 4 + 2 + 3 * experts + 1
