"""Tiny encoder-decoder model (BART) with random weights, and requests for it."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxinfer.engine.engine import Engine
from jaxinfer.engine.request import Request
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.functional import split
from jaxinfer.loading import weights as loading
from jaxinfer.media import CrossInputs, EncoderInput
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.sharding import make_mesh
from support.checkpoint import tensors, tokenizer
from support.tiny import BLOCK, LENGTH, VOCAB, make_engine, make_request, run, shapes

START = 2
"""Start token of the decoder."""
UNITS = (32, LENGTH)
"""Bucket sizes of an encoder step, in tokens."""

CONFIG = dict(
    architectures=["BartForConditionalGeneration"],
    vocab_size=VOCAB,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=40,
    max_position_embeddings=LENGTH,
    scale_embedding=True,
    dtype="float32",
    decoder_start_token_id=START,
)
"""config.json of a BART; encoder and decoder differ in every setting that may differ."""

LOUDER = {"shared": 12, "embed_positions": 40, "encoder_attn.out": 3, "encoder_attn": 4}
"""Scale factors of random weights, so that the encoder's input and its order change every output token."""


@cache
def folder(*, with_tokenizer: bool = False, **changes: Any) -> Path:
    """Return a checkpoint folder of the model, kept for the lifetime of the process."""
    _folders.append(TemporaryDirectory(prefix="cross"))
    hf, made = CONFIG | changes, Path(_folders[-1].name)
    weights = {
        name: value * np.float32(next((factor for part, factor in LOUDER.items() if part in name), 1))
        for name, value in tensors(hf).items()
    }
    save_file(weights, made / "model.safetensors")
    (made / "config.json").write_text(json.dumps(hf))
    if with_tokenizer:
        tokenizer().save_pretrained(made)
    return made


_folders: list[TemporaryDirectory] = []


def cross_runner(tp: int = 1, quantization: str | None = None) -> Runner:
    """Return the model's runner over `tp` devices."""
    return _cross_runner(tp, quantization)


@cache  # positional key of both arguments, whether a test passes them by position or by name
def _cross_runner(tp: int, quantization: str | None) -> Runner:
    mesh = make_mesh(tp)
    module = loading.load(folder(), mesh, quantization=quantization, progress=False)
    program, params = split(module, mesh)
    return Runner(program, params, shapes(groups=program.layout.groups, cross_buckets=UNITS))


@cache
def deterministic_runner() -> Runner:
    """Return the runner of a deterministic engine of the model in bfloat16."""
    mesh = make_mesh(1)
    module = loading.load(folder(), mesh, dtype="bfloat16", progress=False)
    program, params = split(module, mesh, deterministic=True)
    return Runner(program, params, shapes(groups=program.layout.groups, cross_buckets=UNITS, switched=True))


def text(length: int, seed: int = 0) -> EncoderInput:
    """Return a random encoder input of text for a seed."""
    return EncoderInput("text", np.random.default_rng(seed).integers(3, VOCAB, length).astype(np.int32), 1)


def cross_request(
    name: str,
    read: EncoderInput | CrossInputs | None,
    params: SamplingParams,
    prompt: Sequence[int] = (START,),
    **fields: Any,
) -> Request:
    """Make a request as `LLM` does."""
    cross = CrossInputs((read,)) if isinstance(read, EncoderInput) else read
    return make_request(name, prompt, params, cross=cross, **fields)


def alone(requests: Sequence[Request], runner: Runner | None = None) -> list[list[list[int]]]:
    """Return the tokens of each request run alone on its own engine."""
    return [run(make_engine(runner or cross_runner()), [again(request)])[0] for request in requests]


def again(request: Request, name: str | None = None) -> Request:
    """Return a fresh copy of a request, optionally with another id."""
    names = ("params", "limit", "salt", "seed", "cross", "rule")
    return Request(name or request.id, request.prompt, **{name: getattr(request, name) for name in names})


def count(engine: Engine, name: str) -> int:
    """Return the value of an engine counter."""
    return engine.metrics.counters[name]


def blocks(length: int) -> int:
    """Return the number of block ids, over all layers of the group, that a text of `length` positions takes."""
    return -(-length // BLOCK) * cross_runner().program.layout.kinds[-1].count
