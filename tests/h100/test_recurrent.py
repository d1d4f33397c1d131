"""The steps of models with recurrent layers compiled for H100s with none present: loops within kernels, state and
latents in place, what shards say."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import pytest
from support.lowering import Compiled, abstract_model, compile_step, h100_mesh, large_copies, require_cuda_compiler
from support.ptx import compiled_kernels, spilled

from jaxinfer.engine.runner.buckets import Needs, decode_bucket, prefill_bucket
from jaxinfer.engine.runner.shapes import Shapes
from jaxinfer.kernels.state import ssd, triton_delta, triton_ssd
from jaxinfer.kernels.state.delta import Tokens
from jaxinfer.kernels.state.slots import Segments
from jaxinfer.kernels.triton.triton_launch import Target
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
QWEN_NEXT = dict(
    architectures=["Qwen3NextForCausalLM"],
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5120,
    num_hidden_layers=2,
    layer_types=["linear_attention", "full_attention"],
    num_attention_heads=16,
    num_key_value_heads=2,
    head_dim=256,
    linear_num_key_heads=16,
    linear_num_value_heads=32,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    linear_conv_kernel_dim=4,
    num_experts=16,
    num_experts_per_tok=2,
    moe_intermediate_size=512,
    shared_expert_intermediate_size=512,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    norm_topk_prob=True,
    partial_rotary_factor=0.25,
    max_position_embeddings=262144,
    rms_norm_eps=1e-6,
    dtype="bfloat16",
)
"""Qwen3-Next-80B-A3B with two layers, few experts and a small vocabulary."""
GRANITE = dict(
    architectures=["GraniteMoeHybridForCausalLM"],
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=768,
    shared_intermediate_size=1536,
    num_hidden_layers=2,
    layer_types=["mamba", "attention"],
    num_attention_heads=32,
    num_key_value_heads=8,
    num_local_experts=8,
    num_experts_per_tok=2,
    mamba_n_heads=128,
    mamba_d_state=128,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    dtype="bfloat16",
)
"""Granite-4.0-H-Small with two layers, few experts and a small vocabulary."""
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


def net_step(kind: str) -> Compiled:
    return _small_step("qwen3_next", kind)


def mamba_step(kind: str) -> Compiled:
    return _small_step("granite", kind)


@cache
def _small_step(name: str, kind: str) -> Compiled:
    config = QWEN_NEXT if name == "qwen3_next" else GRANITE
    program, params = abstract_model(config, h100_mesh(1))
    shapes = replace(SHAPES, sampled_vocab=config["vocab_size"])
    make = decode_bucket if kind == DECODE else prefill_bucket
    size = (ROWS, 0) if kind == DECODE else (CHUNK,)
    return compile_step(program, params, shapes, make(program, shapes, *size, Needs()))


@pytest.mark.parametrize("kind", [DECODE, PREFILL])
@pytest.mark.parametrize(
    ("compiled", "layers", "prefill", "decode"),
    [
        (step, 3, ("prepare", "advance"), "step"),
        (net_step, 1, ("prepare", "advance"), "step"),
        (mamba_step, 1, ("scan",), "scan_steps"),
    ],
    ids=["kda", "gated delta net", "mamba"],
)
def test_a_step_is_one_command_buffer_without_a_loop(
    compiled: Callable[[str], Compiled], layers: int, prefill: tuple[str, ...], decode: str, kind: str
):
    """A loop whose length is data is driven by the host, which reads its condition before each iteration."""
    made = compiled(kind)
    assert "While" not in made.thunks and " while(" not in made.executable.as_text()
    assert made.command_buffers == 1 and len(made.launched_alone) == len(made.sampler.kernels) == 4
    assert len(made.touching_new_addresses) == 3
    names = Counter(made.kernels)
    wanted = (decode,) if kind == DECODE else prefill
    assert {name: names[name] for name in (*prefill, decode)} == {
        name: layers * (name in wanted) for name in (*prefill, decode)
    }


def test_a_prefill_step_of_a_recurrent_layer_needs_little_memory():
    """Per token and head five rows of 128 in float32 beside q, k, v and decays."""
    assert step(PREFILL).temporary_bytes < 100 << 20


@pytest.mark.parametrize(
    ("heads", "key_dim", "value_dim", "decays"),
    [(32, 128, 128, 128), (32, 128, 128, 1), (16, 64, 64, 64), (8, 96, 192, 1)],
    ids=["Kimi Linear", "Qwen3-Next", "heads of 64", "heads of no power of two"],
)
def test_the_kernels_suit_the_device(heads: int, key_dim: int, value_dim: int, decays: int):
    tokens, rows, array = 64, 4, jax.ShapeDtypeStruct
    widths = dict(q=key_dim, k=key_dim, v=value_dim, g=decays, beta=1)
    given = Tokens(**{name: array((tokens, heads, width), jnp.float32) for name, width in widths.items()})
    fields = [array((rows,), jnp.int32)] * 4
    states, segments = (
        array((8, heads, key_dim, value_dim), jnp.float32),
        Segments(*fields, array((rows,), jnp.bool_)),
    )
    with compiled_kernels() as made:
        for call in triton_delta.prefill, triton_delta.prefill_steps:
            jax.eval_shape(lambda *operands, call=call: call(*operands, Target(90, 132)), given, states, segments)
    assert [kernel.name for kernel in made] == ["prepare", "advance", "step"]
    for kernel in made:
        assert spilled(kernel.ptx) == 0
        assert 2 * kernel.shared_bytes <= 227 << 10, "two programs on a multiprocessor"
    assert "cp.async" in made[1].ptx  # the next chunk is loaded while one is computed
    assert re.search(r"mma\S*\.tf32", made[1].ptx)


@pytest.mark.parametrize(
    ("heads", "groups", "key_dim", "value_dim"),
    [(128, 1, 128, 64), (24, 1, 256, 64), (112, 8, 128, 80)],
    ids=["Granite 4", "Falcon H1", "Nemotron-H"],
)
def test_mambas_kernels_suit_the_device(heads: int, groups: int, key_dim: int, value_dim: int):
    tokens, rows, array = 64, 4, jax.ShapeDtypeStruct
    widths = dict(q=(groups, key_dim), k=(groups, key_dim), v=(heads, value_dim), g=(heads, 1))
    given = ssd.Tokens(**{name: array((tokens, *width), jnp.float32) for name, width in widths.items()})
    states = array((8, heads, key_dim, value_dim), jnp.float32)
    segments = Segments(*[array((rows,), jnp.int32)] * 4, array((rows,), jnp.bool_))
    with compiled_kernels() as made:
        for call in triton_ssd.prefill, triton_ssd.prefill_steps:
            jax.eval_shape(lambda *operands, call=call: call(*operands, Target(90, 132)), given, states, segments)
    assert [kernel.name for kernel in made] == ["scan", "scan_steps"]
    for kernel in made:
        assert spilled(kernel.ptx) == 0
        assert 2 * kernel.shared_bytes <= 227 << 10, "two programs on a multiprocessor"
    assert re.search(r"mma\S*\.tf32", made[0].ptx)


def test_a_prefill_step_of_mamba_keeps_nothing_but_its_rows():
    """Values, outputs and projections of 8192 columns in float32, and no copy of keys for each of 128 heads."""
    assert mamba_step(PREFILL).temporary_bytes < 40 * CHUNK * 8192 * 4 // 8


@pytest.mark.parametrize("compiled", [step, mamba_step], ids=["kda", "mamba"])
@pytest.mark.parametrize("kind", [DECODE, PREFILL])
def test_states_and_latents_stay_in_place(compiled: Callable[[str], Compiled], kind: str):
    made = compiled(kind)
    assert made.aliased_bytes >= made.cache_bytes
    assert large_copies(made.executable.as_text(), STATE) == []


def test_shards_add_up_what_rows_make_and_nothing_else():
    """Of each layer attention and MLP, and the rows of the embedding; the sampler gathers its columns."""
    assert step(DECODE, 4).collectives == Counter({"all-reduce": 2 * 4 + 1, "all-gather": 1})


def test_a_kda_layer_has_one_product_for_six_projections_and_one_for_two():
    """q, k, v, b, f_a and g_a; f_b and g_b. Beside them what comes out of its recurrence, which is a kernel."""
    kda, experts = 3, 3
    dims = re.findall(r"= \w+\[([\d,]+)\]\S* dot\(", step(DECODE).executable.as_text())
    assert dims.count(f"{3 * 4096 + 32 + 2 * 128},{ROWS}") == kda
    assert dims.count(f"2,4096,{ROWS}") == kda
    # Of the others: latents and queries, the two halves of absorbed attention, its end; MLPs, routers, the head.
    assert len(dims) == 3 * kda + 4 + 2 + 3 * experts + 1
