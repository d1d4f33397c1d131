"""Tiny models with one compiled prefill and one decode bucket each, shared by engines with different host settings."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from jaxinfer.engine.engine import Engine
from jaxinfer.engine.request import Request
from jaxinfer.engine.request import Sequence as Sample
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.engine.runner.shapes import Shapes
from jaxinfer.engine.sizing.settings import HostSettings
from jaxinfer.functional import Program, split
from jaxinfer.inputs.defaults import ModelLimits, resolve
from jaxinfer.loading import weights
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.sharding import make_mesh
from support.families import FULL, SLIDING, families

VOCAB, BLOCK, CHUNK, ROWS, LENGTH = 97, 4, 16, 8, 128
"""Sizes of every tiny model; blocks and chunks are small, so that short prompts span many of them."""
SNAPSHOTS = 6
"""Snapshots of recurrent state, besides two slots per row: few enough to be evicted."""

CONFIG = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    dtype="float32",
)
"""config.json of a Llama whose head_dim differs from hidden_size / heads."""

FOUR_BITS = {
    "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
}
"""Fields of config.json of a model whose projections are kept in 4 bits."""

ARCHITECTURES = {name: data.architecture for name, data in families().items() if data.architecture and not data.variant}
"""Architecture of each family that the tests of equivalences, plans and saved checkpoints run over."""
VARIANTS = {name: data.architecture for name, data in families().items() if data.variant}
"""Architectures whose layers are those of `ARCHITECTURES` with other options."""
OWN = {name: dict(data.config) for name, data in families().items()}
"""Fields of a family's config.json in addition to `CONFIG`."""


def config(family: str) -> dict[str, Any]:
    """Return config.json of a family's tiny model."""
    return CONFIG | OWN.get(family, {}) | {"architectures": [(ARCHITECTURES | VARIANTS)[family]]}


def layers(kinds: Sequence[str], window: int) -> dict[str, Any]:
    """Return config.json of a Qwen2 with layers of these kinds."""
    return dict(
        architectures=["Qwen2ForCausalLM"],
        num_hidden_layers=len(kinds),
        layer_types=list(kinds),
        sliding_window=window,
        use_sliding_window=True,
    )


HYBRIDS = {
    "alternating": layers([SLIDING, FULL] * 2, 10),
    "five to one": layers([*[SLIDING] * 5, FULL], 7),
    "all sliding": layers([SLIDING] * 2, 6),
    "window of one": layers([SLIDING, FULL], 1),
    "window of a block": layers([FULL, SLIDING], BLOCK),
    "window above all": layers([FULL, SLIDING], 4 * LENGTH),
    "chunks of six": config("llama4"),
}
"""Models with layers that see a window, most shorter than a chunk of a prefill: config.json fields in addition to
`CONFIG`. One has windows that do not slide (Llama 4)."""


def window_of(hybrid: str) -> int:
    """Return the window of one of `HYBRIDS`."""
    return HYBRIDS[hybrid].get("sliding_window") or HYBRIDS[hybrid]["attention_chunk_size"]


def shapes(**changes: Any) -> Shapes:
    """Return the shapes of a tiny model's steps.

    By default not `switched`, as on a GPU: each sampler level is a program of its own, and the greedy program compiles
    in a third of the time. Models that stand for a kind of cache are `switched`, as on a CPU.
    """
    values = dict(
        num_blocks=changes.get("groups", 1) * ROWS * LENGTH // BLOCK,
        block_size=BLOCK,
        rows=ROWS,
        width=LENGTH // BLOCK,
        decode_buckets=(ROWS,),
        prefill_buckets=(CHUNK,),
        prefill_rows=ROWS,
        max_logprobs=5,
        max_length=LENGTH,
        sampled_vocab=VOCAB,
    )
    return Shapes(**values | changes)


def shapes_of(program: Program, **changes: Any) -> Shapes:
    """Return the shapes of the steps of a model with several groups of layers, or with recurrent layers."""
    slots = 2 * ROWS + SNAPSHOTS if program.layout.states else 0
    return shapes(groups=program.layout.groups, state_slots=slots, **changes)


def random_runner(family: str = "llama", tp: int = 1, quantization: str | None = None) -> Runner:
    """Return the runner of a model with random weights, shared by all tests of a worker."""
    return _random_runner(family, tp, quantization)


@cache
def divided_runner() -> Runner:
    """Return a runner of the shared llama whose steps are two programs, as on a GPU."""
    model = random_runner()
    shapes = shapes_of(model.program, switched=False, decode_buckets=(2, ROWS))
    return Runner(model.program, model.params, shapes)


@cache  # positional key of all three arguments, whether a test passes them by position or by name
def _random_runner(family: str, tp: int, quantization: str | None) -> Runner:
    mesh = make_mesh(tp)
    module = weights.random(config(family), mesh, quantization=quantization)
    program, params = split(module, mesh)
    return Runner(program, params, shapes_of(program, switched=family == "llama"))


@cache
def deterministic_runner(
    family: str,
    dtype: str = "bfloat16",
    kernel: str = "auto",
    *,
    on: bool = True,
    capture: tuple[str, ...] = (),
    tp: int = 1,
) -> Runner:
    """Return the runner of a deterministic engine; `dtype` may be "int8", "fp8" or "4 bits", of weights in a bfloat16
    model, and end with the format of a quantised cache: "bfloat16/fp8".

    `on=False`: the same without `deterministic`, with prefill steps of 64 tokens. `capture`: outputs of modules that
    its steps return. `tp`: devices that its weights are divided over.
    """
    dtype, _, codes = dtype.partition("/")
    mesh, own = make_mesh(tp), FOUR_BITS if dtype == "4 bits" else {}
    hf = config(family) | {"dtype": "bfloat16" if dtype in ("int8", "fp8", "4 bits") else dtype} | own
    module = weights.random(hf, mesh, quantization=dtype if dtype in ("int8", "fp8") else None)
    kernels = dict(attention_kernel=kernel, matmul_kernel=kernel, kv_cache_dtype=codes or "auto")
    program, params = split(module, mesh, deterministic=on, **kernels)
    buckets = (CHUNK,) if on else (64,)
    own = dict(switched=True, prefill_buckets=buckets, capture=capture)
    return Runner(program, params, shapes_of(program, **own))


@cache
def joint_runner(runner: Runner) -> Runner:
    """Return a runner of the same model, with the same programs, that runs prefills and decodes in joint steps."""
    shapes = replace(runner.shapes, joint_buckets=((CHUNK, ROWS),))
    return Runner(runner.program, runner.params, shapes, programs=runner.programs)


@cache
def quantised_runner(family: str, codes: str) -> Runner:
    """Return the runner of a model with random weights whose cache is quantised."""
    mesh, hf = make_mesh(1), CONFIG | HYBRIDS[family] if family in HYBRIDS else config(family)
    program, params = split(weights.random(hf, mesh), mesh, kv_cache_dtype=codes)
    return Runner(program, params, shapes_of(program, switched=family == "llama"))


@cache
def hybrid_runner(name: str) -> Runner:
    """Return the runner of one of `HYBRIDS` with random weights."""
    mesh = make_mesh(1)
    program, params = split(weights.random(CONFIG | HYBRIDS[name], mesh), mesh)
    return Runner(program, params, shapes_of(program, switched=name == "alternating"))


def make_engine(runner: Runner, *, pool_blocks: int | None = None, budget: int = CHUNK, **host: Any) -> Engine:
    """Make a new engine over a runner; only host settings change, so that nothing is recompiled."""
    runner.reset()
    settings = HostSettings(pool_blocks or runner.shapes.num_blocks, budget, check_invariants=True, **host)
    return Engine(runner, settings)


def make_request(name: str, prompt: Sequence[int], params: SamplingParams, **fields: Any) -> Request:
    """Make a request as `LLM` does from a prompt of token ids."""
    own = resolve(params, ModelLimits(VOCAB, LENGTH), prompt_len=len(prompt))
    limit = len(prompt) + own.max_tokens
    return Request(
        id=name, prompt=np.array(prompt, np.int32), params=own, limit=limit, **{"seed": own.seed or 0} | fields
    )


def run(engine: Engine, requests: Sequence[Request]) -> list[list[list[int]]]:
    """Run requests to their end and return the tokens of each sample of each request; check that nothing stays
    allocated."""
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
    assert int(engine.manager.pool.num_held) == 0
    return [[s.output_ids.tolist() for s in request.sequences] for request in requests]


def prompt(length: int, seed: int = 0) -> list[int]:
    """Return random token ids; the first id already differs between seeds."""
    return np.random.default_rng(seed).integers(3, VOCAB, length).tolist()


def resolved_request(eos: Sequence[int] = (), length: int = 4, **fields: Any) -> Request:
    """Make a request whose `SamplingParams` fields are resolved for a model with EOS ids `eos`."""
    params = resolve(SamplingParams(**fields), ModelLimits(VOCAB, LENGTH, tuple(eos)), prompt_len=length)
    made = make_request("x", prompt(length), SamplingParams(max_tokens=params.max_tokens, n=params.n))
    made.params, made.stop_ids = params, params.all_stop_token_ids
    return made


def add_tokens(sequence: Sample, *tokens: int) -> list[str | None]:
    """Append sampled tokens to a sequence as if it had a row; return the finish reason after each."""
    sequence.prepare()
    return [sequence.add(token) for token in tokens]
