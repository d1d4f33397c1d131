"""Tiny models with one compiled prefill and one decode bucket each, shared by engines with different host settings."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from jaxinfer.engine.engine import Engine
from jaxinfer.engine.request import Request
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.engine.runner.steps import Shapes
from jaxinfer.engine.sizing.settings import HostSettings
from jaxinfer.functional import Program, split
from jaxinfer.inputs.defaults import ModelLimits, resolve
from jaxinfer.loading import weights
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.sharding import make_mesh

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

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "cohere2": "Cohere2ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_linear": "KimiLinearForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
}

VARIANTS = {
    "olmo2": "Olmo2ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "seed_oss": "SeedOssForCausalLM",
    "exaone4": "Exaone4ForCausalLM",
    "ernie4_5": "Ernie4_5ForCausalLM",
    "helium": "HeliumForCausalLM",
}
"""Architectures whose layers are those of `ARCHITECTURES` with other options. They are compared with transformers only:
equivalences and plans are those of the layers."""

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
LATENT = dict(
    num_key_value_heads=4,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=12,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    n_shared_experts=1,
    routed_scaling_factor=1.5,
    head_dim=None,
)
"""Fields of config.json for latent attention (MLA) and experts of DeepSeek models."""

OWN: dict[str, dict[str, Any]] = {
    "mixtral": dict(num_local_experts=6, num_experts_per_tok=2),
    "qwen3_moe": dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24, norm_topk_prob=True),
    # A sliding-window layer and a full-attention layer: two groups on one cache array.
    "gemma2": dict(sliding_window=10, query_pre_attn_scalar=8, attn_logit_softcapping=2.0, final_logit_softcapping=4.0),
    "gemma3": dict(sliding_window=7, query_pre_attn_scalar=8, layer_types=[SLIDING, FULL]),
    "olmo3": dict(sliding_window=9, layer_types=[SLIDING, FULL]),
    "ernie4_5": dict(tie_word_embeddings=False),
    "smollm3": dict(no_rope_layers=[1, 0], tie_word_embeddings=False),
    "exaone4": dict(sliding_window=9, layer_types=[SLIDING, FULL]),
    # transformers' o_proj is square, so that head_dim must be hidden_size / heads.
    "helium": dict(hidden_size=64),
    "granite": dict(embedding_multiplier=1.5, attention_multiplier=0.4, residual_multiplier=0.5, logits_scaling=0.8),
    "cohere2": dict(
        sliding_window=9,
        layer_types=[SLIDING, FULL],
        logit_scale=0.5,
        head_dim=None,
        hidden_size=64,
        tie_word_embeddings=False,
        layer_norm_eps=1e-3,
        rms_norm_eps=None,
    ),
    "gpt_oss": dict(sliding_window=8, num_local_experts=6, num_experts_per_tok=2),
    "deepseek_v3": LATENT
    | dict(
        n_routed_experts=8,
        n_group=4,
        topk_group=2,
        q_lora_rank=20,
        first_k_dense_replace=1,
        attention_bias=False,
    ),
    "kimi_linear": LATENT
    | dict(
        num_local_experts=6,
        linear_num_heads=4,
        linear_head_dim=8,
        layer_types=[LINEAR, FULL],
    ),
    "qwen3_next": dict(
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=20,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_num_value_heads=4,
        linear_value_head_dim=12,
        layer_types=[LINEAR, FULL],
    ),
}
"""Fields of a family's config.json in addition to `CONFIG`."""


def config(family: str) -> dict[str, Any]:
    """Return config.json of a family's tiny model."""
    return CONFIG | OWN.get(family, {}) | {"architectures": [ARCHITECTURES[family]]}


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
}
"""Models with sliding-window layers, most windows shorter than a chunk: config.json fields in addition to `CONFIG`."""


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


@cache  # positional key of all three arguments, whether a test passes them by position or by name
def _random_runner(family: str, tp: int, quantization: str | None) -> Runner:
    mesh = make_mesh(tp)
    module = weights.random(config(family), mesh, quantization=quantization)
    program, params = split(module, mesh)
    return Runner(program, params, shapes_of(program, switched=family == "llama"))


@cache
def deterministic_runner(family: str, dtype: str = "bfloat16", kernel: str = "auto", *, on: bool = True) -> Runner:
    """Return the runner of a deterministic engine; `dtype` may be "int8", of weights in a bfloat16 model.

    `on=False`: the same without `deterministic`, with prefill steps of 64 tokens.
    """
    mesh, int8 = make_mesh(1), dtype == "int8"
    hf = config(family) | {"dtype": "bfloat16" if int8 else dtype}
    module = weights.random(hf, mesh, quantization="int8" if int8 else None)
    program, params = split(module, mesh, attention_kernel=kernel, matmul_kernel=kernel, deterministic=on)
    buckets = (CHUNK,) if on else (64,)
    return Runner(program, params, shapes_of(program, switched=True, prefill_buckets=buckets))


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
