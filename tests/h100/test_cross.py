"""The steps of an encoder-decoder compiled for H100s with none present: in place, in one command buffer, and what is
done when."""

import re
from collections import Counter
from functools import cache

import jax.numpy as jnp
import pytest
from support.lowering import (
    Compiled,
    abstract_model,
    compile_lowered,
    compile_step,
    h100_mesh,
    require_cuda_compiler,
    unread_in_decode,
)
from support.plans import on_gpu

from jaxinfer.engine.runner.buckets import Needs, decode_bucket, encode_shape, prefill_bucket
from jaxinfer.engine.runner.encode_steps import abstract_encode_arguments, make_encode_step
from jaxinfer.engine.runner.keys import EncodeCross
from jaxinfer.engine.runner.shapes import Shapes
from jaxinfer.engine.sizing.memory import largest_programs
from jaxinfer.loading import weights
from jaxinfer.sharding import placement
from jaxinfer.sharding.collectives import DECODE, ENCODE, PREFILL

pytestmark = [pytest.mark.xdist_group("h100"), pytest.mark.usefixtures("cuda_compiler"), pytest.mark.slow]

LAYERS, ROWS, POSITIONS, BLOCK, CHUNK, READ = 2, 8, 1024, 16, 512, 1024
CONFIG = dict(
    architectures=["BartForConditionalGeneration"],
    vocab_size=50264,
    d_model=1024,
    encoder_layers=LAYERS,
    decoder_layers=LAYERS,
    encoder_attention_heads=16,
    decoder_attention_heads=16,
    encoder_ffn_dim=4096,
    decoder_ffn_dim=4096,
    max_position_embeddings=POSITIONS,
    dtype="bfloat16",
)
"""The shape of bart-large, with fewer layers."""
SHAPES = Shapes(
    num_blocks=4 * ROWS * POSITIONS // BLOCK,
    block_size=BLOCK,
    rows=ROWS,
    width=POSITIONS // BLOCK,
    decode_buckets=(ROWS,),
    prefill_buckets=(CHUNK,),
    prefill_rows=ROWS,
    max_logprobs=5,
    max_length=POSITIONS,
    sampled_vocab=CONFIG["vocab_size"],
    groups=2,
    cross_buckets=(READ,),
)


@pytest.fixture(scope="module")
def cuda_compiler() -> None:
    require_cuda_compiler()


@cache
def step(kind: str, tp: int = 1, quantization: str | None = None) -> Compiled:
    program, params = abstract_model(CONFIG, h100_mesh(tp), quantization=quantization)
    assert program.kernel == "triton"
    if kind == ENCODE:
        shape = encode_shape(program, SHAPES, READ)
        lowered = make_encode_step(program, SHAPES, shape).lower(
            params, *abstract_encode_arguments(program, SHAPES, shape)
        )
        return compile_lowered(lowered, abstract_encode_arguments(program, SHAPES, shape)[0])
    if kind == DECODE:
        return compile_step(program, params, SHAPES, decode_bucket(program, SHAPES, ROWS, 0, Needs()))
    return compile_step(program, params, SHAPES, prefill_bucket(program, SHAPES, CHUNK, Needs()))


@pytest.mark.parametrize("kind", [DECODE, PREFILL, ENCODE])
def test_the_cache_stays_in_place_in_one_command_buffer(kind: str):
    compiled = step(kind)
    assert compiled.aliased_bytes >= compiled.cache_bytes and compiled.large_copies == []
    assert compiled.command_buffers == 1 and len(compiled.launched_alone) == 4 * (compiled.sampler is not None)
    assert compiled.temporary_bytes < (8 << 20 if kind == DECODE else 128 << 20)
    # The encoder attends in one direction after the other half: a layer of the decoder twice, one of its own once.
    assert compiled.kernels.count("attend") == (LAYERS if kind == ENCODE else 2 * LAYERS)


def test_what_the_encoder_needs_is_measured_before_the_cache_is_sized():
    program, _ = abstract_model(CONFIG, h100_mesh(1))
    assert EncodeCross(**vars(encode_shape(program, SHAPES, READ))) in largest_programs(program, SHAPES)
    assert 10 << 20 < step(ENCODE).temporary_bytes < 100 << 20


def products(compiled: Compiled) -> int:
    """Of matrices, in a program's text."""
    return len(re.findall(r" dot\(", compiled.executable.as_text()))


# A layer of the decoder: qkv, out, q, out, up, down. One of the encoder: qkv, out, up, down; and for each of the
# decoder's kv, which XLA may put together, as their input is the same.
@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [
        (DECODE, 6 * LAYERS + 1, 6 * LAYERS + 1),
        (PREFILL, 6 * LAYERS + 1, 6 * LAYERS + 1),
        (ENCODE, 4 * LAYERS + 1, 5 * LAYERS),
    ],
)
def test_products_are_those_that_are_needed(kind: str, least: int, most: int):
    assert least <= products(step(kind)) <= most


def test_a_decoded_token_touches_nothing_of_the_encoder():
    """Neither its weights nor those that project its positions are read."""
    unread, names = unread_in_decode(CONFIG, h100_mesh(1))
    assert unread == {name for name in names if name.startswith("encoder.") or ".cross.qkv.kv." in name}


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("kind", [DECODE, PREFILL, ENCODE])
def test_collectives_are_those_of_the_plan(kind: str, quantization: str | None):
    found = step(kind, 8, quantization).collectives
    module = weights.abstract(*weights.parse(CONFIG), jnp.dtype("bfloat16"), h100_mesh(8), quantization=quantization)
    planned = on_gpu(placement.plan(module, h100_mesh(8), itemsize=2), kind)
    sampler = Counter() if kind == ENCODE else Counter({"all-gather": 1})
    assert found == Counter(planned) + sampler
    # A layer of the decoder has three, one of the encoder two; and the rows of the embedding are added up.
    assert found["all-reduce"] == (2 if kind == ENCODE else 3) * LAYERS + 1
