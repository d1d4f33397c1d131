"""Whisper and Llama 3.2 Vision, at their widths and with few layers, compiled for an H100 with none present."""

import re
from functools import cache

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

from jaxinfer.engine.runner.buckets import Needs, decode_bucket, encode_shape
from jaxinfer.engine.runner.encode_steps import abstract_encode_arguments, make_encode_step
from jaxinfer.engine.runner.shapes import Shapes
from jaxinfer.sharding.collectives import DECODE, ENCODE

pytestmark = [pytest.mark.xdist_group("h100"), pytest.mark.usefixtures("cuda_compiler"), pytest.mark.slow]

LAYERS, ROWS, LENGTH, BLOCK = 2, 8, 448, 16
WHISPER = dict(
    architectures=["WhisperForConditionalGeneration"],
    model_type="whisper",
    vocab_size=51866,
    num_mel_bins=128,
    d_model=1280,
    encoder_layers=LAYERS,
    decoder_layers=LAYERS,
    encoder_attention_heads=20,
    decoder_attention_heads=20,
    encoder_ffn_dim=5120,
    decoder_ffn_dim=5120,
    max_source_positions=1500,
    max_target_positions=LENGTH,
    pad_token_id=50256,
    bos_token_id=50257,
    eos_token_id=50257,
    decoder_start_token_id=50258,
    dtype="bfloat16",
)
"""The shape of whisper-large-v3."""
VISION = dict(
    model_type="mllama_vision_model",
    hidden_size=1280,
    num_hidden_layers=2,
    num_global_layers=1,
    attention_heads=16,
    intermediate_size=5120,
    image_size=560,
    patch_size=14,
    max_num_tiles=4,
    intermediate_layers_indices=[0],
    vision_output_dim=2560,
    num_channels=3,
    hidden_act="gelu",
    norm_eps=1e-5,
    supported_aspect_ratios=[[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
)
MLLAMA = dict(
    architectures=["MllamaForConditionalGeneration"],
    model_type="mllama",
    dtype="bfloat16",
    image_token_index=128256,
    vision_config=VISION,
    text_config=dict(
        model_type="mllama_text_model",
        vocab_size=128256,
        hidden_size=4096,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        cross_attention_layers=[1],
        max_position_embeddings=131072,
        hidden_act="silu",
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
)
"""That of Llama-3.2-11B-Vision."""
# Products of matrices in a decode step: Whisper's layers have qkv, out, q, out, up, down; Llama's, which attend either
# to the text or to the image, qkv or q, out, gate with up, down. And the head.
MODELS = {"whisper": (WHISPER, 6 * LAYERS + 1), "mllama": (MLLAMA, 4 * LAYERS + 1)}
_OF_THE_ENCODER = re.compile(r"^(encoder|vision_model|projector)\.|\.qkv\.kv\.|layers\.1\.attention\.k_norm\.")
"""What makes and projects its positions; in Llama's layer 1, which attends to the image, the norm of keys is among
it."""


@pytest.fixture(scope="module")
def cuda_compiler() -> None:
    require_cuda_compiler()


@cache
def step(name: str, kind: str) -> Compiled:
    """One input a step is encoded."""
    hf, _ = MODELS[name]
    program, params = abstract_model(hf, h100_mesh(1))
    assert program.kernel == "triton"
    shapes = Shapes(
        num_blocks=8192,
        block_size=BLOCK,
        rows=ROWS,
        width=LENGTH // BLOCK,
        decode_buckets=(ROWS,),
        prefill_buckets=(512,),
        prefill_rows=ROWS,
        max_logprobs=5,
        max_length=LENGTH,
        sampled_vocab=program.vocab,
        groups=program.layout.groups,
        cross_buckets=(1,),
    )
    if kind == DECODE:
        return compile_step(program, params, shapes, decode_bucket(program, shapes, ROWS, 0, Needs()))
    shape = encode_shape(program, shapes, 1)
    arguments = abstract_encode_arguments(program, shapes, shape)
    return compile_lowered(make_encode_step(program, shapes, shape).lower(params, *arguments), arguments[0])


@pytest.mark.parametrize("kind", [DECODE, ENCODE])
@pytest.mark.parametrize("name", MODELS)
def test_the_cache_stays_in_place(name: str, kind: str):
    compiled = step(name, kind)
    assert compiled.aliased_bytes >= compiled.cache_bytes and compiled.large_copies == []
    assert compiled.command_buffers == 1 and len(compiled.launched_alone) == 4 * (compiled.sampler is not None)


# Mllama's tower has 16 heads over 6432 positions: a thousand queries' scores in float32 take 421 MB.
@pytest.mark.parametrize(("name", "layers", "limit"), [("whisper", LAYERS, 64 << 20), ("mllama", 3, 160 << 20)])
def test_encoders_attend_in_the_kernel_without_loops_and_scores(name: str, layers: int, limit: int):
    compiled = step(name, ENCODE)
    assert "kWhile" not in compiled.thunks and compiled.kernels.count("attend") == layers
    assert compiled.temporary_bytes < limit


@pytest.mark.parametrize("name", MODELS)
def test_a_decode_step_has_the_products_of_the_decoder(name: str):
    assert len(re.findall(r" dot\(", step(name, DECODE).executable.as_text())) == MODELS[name][1]


@pytest.mark.parametrize("name", MODELS)
def test_a_decoded_token_touches_nothing_of_the_encoder(name: str):
    """Neither its weights nor those that project its positions are read."""
    unread, names = unread_in_decode(MODELS[name][0], h100_mesh(1))
    assert unread == {name for name in names if _OF_THE_ENCODER.search(name)} and any(".kv." in name for name in unread)
