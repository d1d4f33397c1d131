"""Every family and every option against transformers: logits at all positions, 64 greedy tokens.

Each option is shown to matter by removing it from the reference. Tiny checkpoints are created on the fly, written by
`save_pretrained` and read by the real loader.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import loaded
from support.tiny import ARCHITECTURES, VARIANTS, prompt

pytest.importorskip("torch", reason="the reference of the parity tests; it comes with the extra `test`")

from support import reference as ref
from support.layers import assert_logits_close

TOLERANCE = 1e-4
"""Absolute tolerance of a float32 logit; ignoring an option must change the logits by 100 times as much."""
GREEDY = 64
LENGTHS = (3, 17, 40, 1)
"""Lengths of the prompts of a batch: part of a chunk, more than one, several, a single token."""

Change = Callable[[ref.Model], ref.Model]


@dataclass(frozen=True)
class Case:
    """A checkpoint with some options enabled."""

    family: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Changes of config.json relative to the tiny Llama of `support.tiny`."""
    without: Mapping[str, Change] = field(default_factory=dict)
    """Option -> the reference of a program that ignores it."""
    lengths: tuple[int, ...] = LENGTHS
    head: float = 0.7
    cached: bool = True
    """Whether transformers may use its cache."""
    tolerance: float = TOLERANCE
    distinct: int = 15
    """Minimum number of distinct output tokens, so that their equality is meaningful (exclusive)."""


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, "rope_type": kind, **parameters}}


PLAIN = ref.with_config(**rope("default"))
LINEAR = rope("linear", factor=4.0)
DYNAMIC = rope("dynamic", factor=4.0) | {"max_position_embeddings": 32}
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
SHORT, LONG = [1.0 + 0.2 * i for i in range(8)], [2.0 + 0.5 * i for i in range(8)]


def yarn(**changed: Any) -> dict[str, Any]:
    return rope("yarn", factor=8.0, original_max_position_embeddings=32, **changed)


def longrope(original: int, **changed: Any) -> dict[str, Any]:
    factors = {"short_factor": SHORT, "long_factor": LONG} | changed
    # Phi-3 has the original length beside the rope's parameters, others within them.
    parameters = rope("longrope", original_max_position_embeddings=original, **factors)
    return parameters | {"original_max_position_embeddings": original, "max_position_embeddings": 256}


PHI3_HEADS = {"hidden_size": 64, "head_dim": None}
"""transformers checks the factors of Phi-3's longrope against hidden_size / heads."""


def activation(name: str) -> Change:
    return ref.with_config(hidden_act=name)


FULL, SLIDING = "full_attention", "sliding_attention"
NORMS = {
    f"weight of {name}": ref.with_weights(f"{name}.weight", 1.0)
    for name in ("input_layernorm", "post_attention_layernorm", "model.norm")
}


def norms(value: float, *names: str) -> dict[str, Change]:
    """References without the weights of these norms."""
    return {f"weight of {name}": ref.with_weights(f"{name}.weight", value) for name in names}


BIASES = {f"bias of {name}": ref.with_weights(f"{name}_proj.bias", 0.0) for name in "qkvo"}
AROUND = ("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
GEMMA = {
    **norms(0.0, "input_layernorm", *AROUND, "model.norm"),
    **{f"no {name}": ref.without(name) for name in ("input_layernorm", *AROUND)},
    "one more than the weight": ref.norms_as_kept,
    "embedding scale": ref.without_embedding_scale,
    "query_pre_attn_scalar": ref.with_config(query_pre_attn_scalar=16),
    "kinds of layers": ref.with_config(layer_types=[FULL, SLIDING]),
    "window": ref.with_config(layer_types=[FULL] * 2),
    "hidden_activation": ref.with_config(hidden_activation="silu"),
}


def ropes(full: dict[str, Any], sliding: dict[str, Any]) -> dict[str, Any]:
    """A rope for each kind of layers."""
    return {"rope_parameters": {FULL: full["rope_parameters"], SLIDING: sliding["rope_parameters"]}}


GLOBAL, LOCAL = rope("default", rope_theta=1e6), rope("default")


def windowed(window: int, **changes: Any) -> dict[str, Any]:
    return {"use_sliding_window": True, "sliding_window": window} | changes


def no_window(layers: int) -> Change:
    return ref.with_config(use_sliding_window=False, layer_types=[FULL] * layers)


GROUPS = {"groups of query heads": ref.other_groups}
HEAD_DIM = {"head_dim": ref.with_attention(ref.scale_of_width)}

CASES = {
    "llama": Case("llama", {}, {**GROUPS, **HEAD_DIM, **NORMS, "head": ref.with_config(tie_word_embeddings=True)}),
    "llama mqa, gelu": Case(
        "llama",
        {"num_key_value_heads": 1, "hidden_act": "gelu"},
        {"one kv head for all": ref.first_head_only, "gelu": activation("silu"), "exact gelu": activation("gelu_new")},
        head=1.2,
    ),
    "llama mha, relu": Case(
        "llama", {"num_key_value_heads": 4, "head_dim": None, "hidden_act": "relu"}, {"relu": activation("silu")}
    ),
    "llama biases, gelu_pytorch_tanh": Case(
        "llama",
        {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"},
        {
            **{
                f"bias of {name}": ref.with_weights(f"{name}_proj.bias", 0.0)
                for name in ("q", "k", "v", "o", "gate", "up", "down")
            },
            "gelu_pytorch_tanh": activation("gelu"),
        },
        head=1.5,
    ),
    "llama tied, theta, epsilon, gelu_new": Case(
        "llama",
        {
            "tie_word_embeddings": True,
            "rms_norm_eps": 0.1,
            "hidden_act": "gelu_new",
            **rope("default", rope_theta=500.0),
        },
        {"rope_theta": PLAIN, "rms_norm_eps": ref.with_config(rms_norm_eps=1e-5), "gelu_new": activation("silu")},
    ),
    "llama linear": Case("llama", LINEAR, {"linear": PLAIN}),
    "llama dynamic": Case("llama", DYNAMIC, {"dynamic": PLAIN}),
    "llama llama3": Case("llama", LLAMA3, {"llama3": PLAIN}),
    "llama yarn": Case(
        "llama", yarn(), {"yarn": PLAIN, "attention factor": ref.with_config(**yarn(attention_factor=1.0))}
    ),
    "llama longrope": Case(
        "llama",
        longrope(32),
        {
            "short": ref.with_config(**longrope(32, short_factor=LONG)),
            "long": ref.with_config(**longrope(32, long_factor=SHORT)),
        },
    ),
    "mistral": Case("mistral", {}, {**GROUPS, **HEAD_DIM, **NORMS}),
    "mistral yarn": Case("mistral", yarn(), {"yarn": PLAIN}),
    "qwen2": Case(
        "qwen2", {}, {**GROUPS, **HEAD_DIM, **{f"bias of {n}": ref.with_weights(f"{n}_proj.bias", 0.0) for n in "qkv"}}
    ),
    "qwen2 tied": Case("qwen2", {"tie_word_embeddings": True, "head_dim": None}),
    "qwen3": Case(
        "qwen3",
        {},
        {
            **GROUPS,
            "q and k norm": ref.with_attention(ref.without_qk_norm),
            **{f"weight of {n}_norm": ref.with_weights(f"{n}_norm.weight", 1.0) for n in "qk"},
        },
    ),
    "qwen3 attention_bias, tied": Case(
        "qwen3",
        {"attention_bias": True, "tie_word_embeddings": True},
        {f"bias of {n}": ref.with_weights(f"{n}_proj.bias", 0.0) for n in "qkvo"},
    ),
    # Prompts shorter and longer than the window, by one and by many; chunks (16) are mostly longer than it.
    "mistral window": Case(
        "mistral",
        {"sliding_window": 12},
        {"window": ref.with_config(sliding_window=None), "its last position": ref.with_config(sliding_window=11)},
        lengths=(11, 12, 13, 28),
    ),
    "mistral window of a chunk": Case("mistral", {"sliding_window": 16}, lengths=(15, 16, 17, 1)),
    "mistral window of a block": Case("mistral", {"sliding_window": 4}, lengths=(3, 4, 5, 40)),
    # transformers' cache keeps the last `window - 1` positions with [-0:], which is all of them.
    "mistral window of one": Case("mistral", {"sliding_window": 1}, lengths=(1, 2, 17, 40), cached=False, distinct=3),
    "mistral window above all": Case("mistral", {"sliding_window": 4096}),
    "qwen2 windows from layer 1": Case(
        "qwen2",
        windowed(7, num_hidden_layers=3, max_window_layers=1),
        {
            "window": no_window(3),
            "layers": ref.with_config(layer_types=[SLIDING] * 3),
            "its last position": ref.with_config(sliding_window=6),
        },
        lengths=(6, 7, 8, 42),
    ),
    "qwen2 use_sliding_window off": Case("qwen2", {"sliding_window": 4, "use_sliding_window": False}),
    "qwen3 alternating": Case(
        "qwen3",
        windowed(9, num_hidden_layers=4, layer_types=[SLIDING, FULL] * 2),
        {"window": no_window(4), "layers": ref.with_config(layer_types=[FULL, SLIDING] * 2)},
        lengths=(8, 9, 10, 37),
    ),
    "qwen3 five to one": Case(
        "qwen3",
        windowed(5, num_hidden_layers=6, layer_types=[SLIDING] * 5 + [FULL]),
        {"window": no_window(6)},
        lengths=(4, 5, 6, 49),
    ),
    "gemma2": Case(
        "gemma2",
        {},
        {
            **GROUPS,
            **GEMMA,
            "attention softcap": ref.with_config(attn_logit_softcapping=None),
            "logit softcap": ref.with_config(final_logit_softcapping=None),
        },
        lengths=(9, 10, 11, 33),
    ),
    "gemma2 no caps, biases, window of a chunk": Case(
        "gemma2",
        {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "sliding_window": 16,
            "tie_word_embeddings": False,
        },
        BIASES,
        lengths=(15, 16, 17, 1),
    ),
    "gemma3": Case(
        "gemma3",
        ropes(GLOBAL, LOCAL),
        {
            **GROUPS,
            **GEMMA,
            "q and k norm": ref.with_attention(ref.without_qk_norm),
            **norms(0.0, "q_norm", "k_norm"),
            "local rope": ref.with_config(**ropes(GLOBAL, GLOBAL)),
            "global rope": ref.with_config(**ropes(LOCAL, LOCAL)),
        },
        lengths=(6, 7, 8, 41),
    ),
    "gemma3 five to one, linear, logit softcap": Case(
        "gemma3",
        {
            "num_hidden_layers": 6,
            "layer_types": None,
            "sliding_window": 4,
            "final_logit_softcapping": 3.0,
            **ropes(rope("linear", rope_theta=1e6, factor=8.0), LOCAL),
        },
        {
            "linear": ref.with_config(**ropes(GLOBAL, LOCAL)),
            "logit softcap": ref.with_config(final_logit_softcapping=None),
        },
        lengths=(3, 4, 5, 50),
    ),
    "olmo3": Case(
        "olmo3",
        {},
        {
            **GROUPS,
            "q and k norm": ref.with_attention(ref.without_qk_norm),
            **norms(1.0, "q_norm", "k_norm", "post_attention_layernorm", "post_feedforward_layernorm", "model.norm"),
            **{f"no {name}": ref.without(name) for name in ("post_attention_layernorm", "post_feedforward_layernorm")},
            "kinds of layers": ref.with_config(layer_types=[FULL, SLIDING]),
            "window": ref.with_config(layer_types=[FULL] * 2),
        },
        lengths=(8, 9, 10, 36),
    ),
    "olmo3 three to one, yarn, biases, mha": Case(
        "olmo3",
        {
            "num_hidden_layers": 4,
            "layer_types": None,
            "attention_bias": True,
            "num_key_value_heads": 4,
            **ropes(yarn(), LOCAL),
        },
        {
            **BIASES,
            "yarn": ref.with_config(**ropes(LOCAL, LOCAL)),
            "of full layers": ref.with_config(**ropes(yarn(), yarn())),
        },
        lengths=(15, 16, 17, 9),
    ),
    "olmo2": Case(
        "olmo2",
        {"attention_bias": True},
        {
            **GROUPS,
            **BIASES,
            "q and k norm": ref.with_attention(ref.without_qk_norm),
            **norms(1.0, "q_norm", "k_norm", "post_attention_layernorm", "post_feedforward_layernorm", "model.norm"),
        },
    ),
    "smollm3": Case(
        "smollm3", {}, {**GROUPS, **HEAD_DIM, "layers without rope": ref.with_config(no_rope_layers=[1, 1])}
    ),
    "smollm3 window, biases": Case(
        "smollm3",
        {
            "num_hidden_layers": 4,
            "no_rope_layers": None,
            "use_sliding_window": True,
            "sliding_window": 9,
            "attention_bias": True,
            "mlp_bias": True,
        },
        {**BIASES, "window": ref.with_config(layer_types=[FULL] * 4)},
        lengths=(8, 9, 10, 37),
        head=1.5,
    ),
    "ernie4_5": Case(
        "ernie4_5",
        {"use_bias": True},
        {
            **GROUPS,
            **HEAD_DIM,
            "rope over neighbouring columns": ref.with_attention(ref.rope_over_halves),
            **{
                f"bias of {n}": ref.with_weights(f"{n}_proj.bias", 0.0)
                for n in ("q", "k", "v", "o", "gate", "up", "down")
            },
        },
    ),
    "seed_oss": Case(
        "seed_oss",
        {"attention_out_bias": True, "mlp_bias": True},
        {
            **GROUPS,
            **{
                f"bias of {n}": ref.with_weights(f"{n}_proj.bias", 0.0)
                for n in ("q", "k", "v", "o", "gate", "up", "down")
            },
        },
        head=1.5,
    ),
    "exaone4": Case(
        "exaone4",
        {},
        {
            **GROUPS,
            "q and k norm": ref.with_attention(ref.without_qk_norm),
            **norms(1.0, "q_norm", "k_norm", "post_attention_layernorm", "post_feedforward_layernorm", "model.norm"),
            "kinds of layers": ref.with_config(layer_types=[FULL, SLIDING]),
            "window": ref.with_config(sliding_window=30),
        },
        lengths=(8, 9, 10, 36),
    ),
    "helium": Case("helium", {}, {**GROUPS, **NORMS, "neighbouring columns": ref.with_attention(ref.rope_over_halves)}),
    "helium biases, tied": Case(
        "helium",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {
            f"bias of {name}": ref.with_weights(f"{name}_proj.bias", 0.0)
            for name in ("q", "k", "v", "gate", "up", "down")
        },
        head=1.5,
    ),
    "granite": Case(
        "granite",
        {},
        {
            **GROUPS,
            **NORMS,
            **{
                name: ref.with_config(**{name: 1.0})
                for name in ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
            },
        },
    ),
    "granite biases, tied": Case(
        "granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, BIASES, head=1.5
    ),
    "cohere2": Case(
        "cohere2",
        {},
        {
            **GROUPS,
            **norms(1.0, "input_layernorm", "model.norm"),
            "logit_scale": ref.with_config(logit_scale=1.0),
            "layer_norm_eps": ref.with_config(layer_norm_eps=0.3),
            "kinds of layers": ref.with_config(layer_types=[FULL, SLIDING]),
            "window": ref.with_config(sliding_window=40),
            "rope of sliding layers": ref.with_config(**rope("default", rope_theta=50.0)),
        },
        lengths=(8, 9, 10, 36),
    ),
    "cohere2 three to one, biases, tied": Case(
        "cohere2",
        {
            "num_hidden_layers": 4,
            "layer_types": None,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "logit_scale": 2.0,
        },
        BIASES,
        lengths=(15, 16, 17, 9),
    ),
    "gpt_oss": Case(
        "gpt_oss",
        yarn(truncate=False),
        {
            **GROUPS,
            **HEAD_DIM,
            **BIASES,
            **norms(1.0, "input_layernorm", "post_attention_layernorm", "model.norm"),
            "sinks": ref.with_weights("sinks", -100.0),
            "yarn": PLAIN,
            "ends of the ramp": ref.with_config(**yarn()),
            "bias of the router": ref.with_weights("router.bias", 0.0),
            "router": ref.with_weights("router.weight", 0.0),
            **{f"bias of {name}": ref.with_weights(f"{name}_proj_bias", 0.0) for name in ("gate_up", "down")},
            "alpha": ref.with_config(swiglu_alpha=1.0),
            "experts of a token": ref.with_config(num_experts_per_tok=1),
            "kinds of layers": ref.with_config(layer_types=[FULL, SLIDING]),
            "window": ref.with_config(layer_types=[FULL] * 2),
        },
        lengths=(7, 8, 9, 40),
    ),
    "gpt_oss limit, window of a block, every expert": Case(
        "gpt_oss",
        {"swiglu_limit": 1.0, "sliding_window": 4, "num_experts_per_tok": 6, "tie_word_embeddings": True},
        {"limit": ref.with_config(swiglu_limit=7.0)},
        lengths=(3, 4, 5, 17),
    ),
    "phi3 window": Case("phi3", {"sliding_window": 8}, {"window": ref.with_config(sliding_window=None)}),
    "phi3": Case("phi3", {}, {**GROUPS, **HEAD_DIM, **NORMS}),
    "mixtral": Case(
        "mixtral",
        {},
        {
            **GROUPS,
            "router": ref.with_weights("mlp.gate.weight", 0.0),
            "experts of a token": ref.with_config(num_experts_per_tok=1),
            "gelu": activation("gelu"),
        },
    ),
    "mixtral window, gelu, one of its experts": Case(
        "mixtral",
        {"sliding_window": 12, "hidden_act": "gelu", "num_experts_per_tok": 1},
        {"window": ref.with_config(sliding_window=None), "gelu": activation("silu")},
        lengths=(11, 12, 13, 28),
    ),
    "qwen3_moe": Case(
        "qwen3_moe",
        {},
        {
            "q and k norm": ref.with_attention(ref.without_qk_norm),
            "norm_topk_prob": ref.with_config(norm_topk_prob=False),
            "router": ref.with_weights("mlp.gate.weight", 0.0),
            "experts of a token": ref.with_config(num_experts_per_tok=2),
        },
    ),
    "qwen3_moe not renormalised, every expert": Case(
        "qwen3_moe",
        {"norm_topk_prob": False, "num_experts_per_tok": 8, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "qwen3_moe some layers": Case(
        "qwen3_moe",
        {
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [1],
            "norm_topk_prob": False,
            "intermediate_size": 40,
        },
        {"norm_topk_prob": ref.with_config(norm_topk_prob=True)},
    ),
    "deepseek_v3": Case(
        "deepseek_v3",
        rope("default"),
        {
            "groups": ref.with_config(topk_group=4),
            "query latent's norm": ref.with_weights("q_a_layernorm.weight", 1.0),
            "latent's norm": ref.with_weights("kv_a_layernorm.weight", 1.0),
            "pairs": ref.with_config(rope_interleave=False),
            "scale": ref.with_config(routed_scaling_factor=1.0),
            "shared expert": ref.with_weights("shared_experts.down_proj.weight", 0.0),
            "renormalised": ref.with_config(norm_topk_prob=False),
        },
        head=0.3,
    ),
    "deepseek_v3 yarn, no query latent, biases": Case(
        "deepseek_v3",
        {
            "q_lora_rank": None,
            "attention_bias": True,
            "rope_interleave": False,
            "n_group": 1,
            "topk_group": 1,
            **yarn(mscale=1.0, mscale_all_dim=0.8),
        },
        {"yarn": PLAIN, "scores": ref.with_config(**yarn(mscale=1.0, mscale_all_dim=0.1))},
        lengths=(15, 16, 17, 9),
        head=0.3,
    ),
    "kimi_linear": Case(
        "kimi_linear",
        {},
        {
            "decay": ref.with_weights("A_log", -4.0),
            "bias of the decay": ref.with_weights("dt_bias", 0.0),
            "convolution": ref.with_weights("conv1d.weight", 0.3),
            "gated norm": ref.with_weights("o_norm.weight", 1.0),
            "gate": ref.with_weights("g_b_proj.weight", 0.0),
            "strength": ref.with_weights("b_proj.weight", 0.0),
        },
        lengths=(15, 16, 17, 16),
        tolerance=5e-4,
    ),
    "qwen3_next": Case(
        "qwen3_next",
        rope("default", partial_rotary_factor=0.5),
        {
            "decay": ref.with_weights("A_log", -4.0),
            "bias of the decay": ref.with_weights("dt_bias", 0.0),
            "convolution": ref.with_weights("conv1d.weight", 0.3),
            "rotated columns": ref.with_config(**rope("default", partial_rotary_factor=1.0)),
            "shared gate": ref.with_weights("shared_expert_gate.weight", 0.0),
            "renormalised": ref.with_config(norm_topk_prob=False),
            "one more than the weight": ref.norms_as_kept,
        },
        lengths=(1, 23, 24, 7),
        tolerance=5e-4,
    ),
    "phi3 partial rotary": Case("phi3", rope("default", partial_rotary_factor=0.5), {"partial rotary": PLAIN}),
    # transformers discards Phi-3's cache when a sequence grows past the original length, and so does jaxinfer.
    "phi3 longrope across": Case("phi3", longrope(32) | PHI3_HEADS),
    "phi3 longrope short": Case(
        "phi3", longrope(128) | PHI3_HEADS, {"short": ref.with_config(**longrope(128, short_factor=LONG))}
    ),
    "phi3 longrope long": Case(
        "phi3", longrope(8) | PHI3_HEADS, {"long": ref.with_config(**longrope(8, long_factor=SHORT))}, (9, 17, 38)
    ),
}


ENGINE = {
    next(name for name, case in CASES.items() if case.family == family) for family in ARCHITECTURES | VARIANTS
} | {
    "llama dynamic",
    "llama longrope",
    "phi3 longrope across",
    "mistral window",
    "mistral window of a chunk",
    "mistral window of one",
    "qwen2 windows from layer 1",
    "qwen3 alternating",
}
"""Cases that also run through the engine: each family, and options that its steps depend on. For other options
logits suffice.
"""


def cases(
    names: Collection[str] = tuple(CASES), quick: tuple[str, ...] = ("llama", "llama llama3")
) -> pytest.MarkDecorator:
    """Parametrise over cases: those of a family on one worker, all but a few outside of the quick tier."""
    return pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=[pytest.mark.xdist_group(case.family), *[pytest.mark.slow] * (name not in quick)])
            for name, case in CASES.items()
            if name in names
        ],
    )


@cache
def model(name: str) -> ref.Model:
    case = CASES[name]
    return ref.model(case.family, head=case.head, **case.changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a case, written once per worker."""
    return cache(lambda name: ref.save(model(name), tmp_path_factory.mktemp("checkpoint")))


def prompts(name: str) -> list[list[int]]:
    return [prompt(length, seed) for seed, length in enumerate(CASES[name].lengths)]


FOLLOWING = [prompt(4, 10), prompt(2, 11), prompt(4, 12), prompt(1, 13)]
"""Tokens fed to decode steps after each prompt: rows leave the batch at different times."""


@cases()
def test_logits_at_every_position_equal_transformers(name, folder):
    asked = prompts(name)
    following = FOLLOWING[: len(asked)]
    found = loaded.logits(folder(name), asked, following)
    for ids, after, ours in zip(asked, following, found, strict=True):
        theirs = ref.logits(model(name), ids, after, cached=CASES[name].cached)
        assert_logits_close(folder(name), model(name), ours, theirs, ids, CASES[name].tolerance)


@pytest.mark.xdist_group("llama")
@pytest.mark.parametrize("broken", [0, 1])
def test_a_failure_names_the_first_layer_that_differs(broken, folder):
    other = ref.with_weights(f"layers.{broken}.mlp.down_proj.weight", 0.0)(model("llama"))
    ids = prompts("llama")[1]
    ours, theirs = (ref.logits(reference, ids) for reference in (model("llama"), other))
    assert_logits_close(folder("llama"), model("llama"), ours, ours, ids, TOLERANCE)
    with pytest.raises(AssertionError, match=f"first to differ: layer {broken}$"):
        assert_logits_close(folder("llama"), other, ours, theirs, ids, TOLERANCE)


@cases(ENGINE, quick=("llama",))
def test_greedy_tokens_equal_transformers(name, folder):
    asked = prompts(name)
    found = loaded.greedy(folder(name), asked, GREEDY)
    expected = [ref.greedy(model(name), ids, GREEDY, cached=CASES[name].cached) for ids in asked]
    assert found == expected
    assert len(set(sum(expected, []))) > CASES[name].distinct


@cases()
def test_ignoring_an_option_changes_the_logits(name):
    asked = prompts(name)
    whole = [ref.logits(model(name), ids) for ids in asked]
    for option, change in CASES[name].without.items():
        other = change(model(name))
        moved = max(np.abs(ref.logits(other, ids) - a).max() for ids, a in zip(asked, whole, strict=True))
        assert moved > 100 * CASES[name].tolerance, option


def test_every_family_and_option_has_a_case():
    from jaxinfer.layers.mlp import ACTIVATIONS
    from jaxinfer.layers.rope_config import ROPE_KINDS
    from jaxinfer.models.registry import ARCHITECTURES

    configs = [model(name).config for name in CASES]
    elsewhere = {"internvl.model", "bart", "mbart", "whisper.model", "mllama.model"}  # in files of their own
    assert {case.family for case in CASES.values()} == set(ARCHITECTURES.values()) - elsewhere
    assert {getattr(config, "hidden_act", "silu") for config in configs} | {"swish"} == set(ACTIVATIONS)
    ropes = [getattr(config, "rope_parameters", {}) for config in configs]
    assert {rope.get("rope_type", "default") for rope in ropes} == set(ROPE_KINDS)
