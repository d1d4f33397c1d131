"""Every family and every option against transformers: logits at all positions, 64 greedy tokens.

That each option tells is shown by taking it away from the reference. Tiny checkpoints are made on the spot,
written by `save_pretrained` and read by the real loader.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import loaded
from support.tiny import prompt

pytest.importorskip("torch", reason="the reference of the parity tests; it comes with the extra `test`")

from support import reference as ref

TOLERANCE = 1e-4
"""Of a float32 logit; an option that is overlooked must move the logits by 100 times as much."""
GREEDY = 64
LENGTHS = (3, 17, 40, 1)
"""Of the prompts of one batch: a part of a chunk, more than one, several, a single token."""

Change = Callable[[ref.Model], ref.Model]


@dataclass(frozen=True)
class Case:
    """A checkpoint with some options on."""

    family: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Of config.json, against the tiny Llama of `support.tiny`."""
    without: Mapping[str, Change] = field(default_factory=dict)
    """Option -> the reference of a program that overlooks it."""
    lengths: tuple[int, ...] = LENGTHS
    head: float = 0.7
    cached: bool = True
    """Whether transformers may use a cache of its own."""
    distinct: int = 15
    """More different tokens than these must be made for their equality to tell anything."""


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, "rope_type": kind, **parameters}}


PLAIN = ref.with_config(**rope("default"))
LINEAR = rope("linear", factor=4.0)
DYNAMIC = rope("dynamic", factor=4.0) | {"max_position_embeddings": 32}
LLAMA3 = rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
SHORT, LONG = [1.0 + 0.2 * i for i in range(8)], [2.0 + 0.5 * i for i in range(8)]


def yarn(**changed: Any) -> dict[str, Any]:
    return rope("yarn", factor=8.0, original_max_position_embeddings=32, **changed)


def longrope(original: int, **changed: Any) -> dict[str, Any]:
    factors = {"short_factor": SHORT, "long_factor": LONG} | changed
    # Phi-3 keeps the original length beside the rope's parameters, the others within them.
    parameters = rope("longrope", original_max_position_embeddings=original, **factors)
    return parameters | {"original_max_position_embeddings": original, "max_position_embeddings": 256}


PHI3_HEADS = {"hidden_size": 64, "head_dim": None}
"""transformers checks the factors of Phi-3's longrope against hidden_size / heads."""


def activation(name: str) -> Change:
    return ref.with_config(hidden_act=name)


NORMS = {
    f"weight of {name}": ref.with_weights(f"{name}.weight", 1.0)
    for name in ("input_layernorm", "post_attention_layernorm", "model.norm")
}
FULL, SLIDING = "full_attention", "sliding_attention"


def windowed(window: int, **changes: Any) -> dict[str, Any]:
    return {"use_sliding_window": True, "sliding_window": window} | changes


def no_window(layers: int) -> Change:
    return ref.with_config(use_sliding_window=False, layer_types=[FULL] * layers)


GROUPS = {"groups of query heads": ref.other_groups}
HEAD_DIM = {"head_dim": ref.with_attention(ref.scale_of_width)}

CASES = {
    "llama": Case(
        "llama", {}, {**GROUPS, **HEAD_DIM, **NORMS, "head": ref.with_config(tie_word_embeddings=True)}
    ),
    "llama mqa, gelu": Case(
        "llama", {"num_key_value_heads": 1, "hidden_act": "gelu"},
        {"one kv head for all": ref.first_head_only, "gelu": activation("silu"), "exact gelu": activation("gelu_new")},
        head=1.5,
    ),
    "llama mha, relu": Case(
        "llama", {"num_key_value_heads": 4, "head_dim": None, "hidden_act": "relu"}, {"relu": activation("silu")}
    ),
    "llama biases, gelu_pytorch_tanh": Case(
        "llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"},
        {
            **{f"bias of {name}": ref.with_weights(f"{name}_proj.bias", 0.0)
               for name in ("q", "k", "v", "o", "gate", "up", "down")},
            "gelu_pytorch_tanh": activation("gelu"),
        },
        head=1.5,
    ),
    "llama tied, theta, epsilon, gelu_new": Case(
        "llama",
        {"tie_word_embeddings": True, "rms_norm_eps": 0.1, "hidden_act": "gelu_new",
         **rope("default", rope_theta=500.0)},
        {"rope_theta": PLAIN, "rms_norm_eps": ref.with_config(rms_norm_eps=1e-5), "gelu_new": activation("silu")},
    ),
    "llama linear": Case("llama", LINEAR, {"linear": PLAIN}),
    "llama dynamic": Case("llama", DYNAMIC, {"dynamic": PLAIN}),
    "llama llama3": Case("llama", LLAMA3, {"llama3": PLAIN}),
    "llama yarn": Case(
        "llama", yarn(), {"yarn": PLAIN, "attention factor": ref.with_config(**yarn(attention_factor=1.0))}
    ),
    "llama longrope": Case(
        "llama", longrope(32),
        {"short": ref.with_config(**longrope(32, short_factor=LONG)),
         "long": ref.with_config(**longrope(32, long_factor=SHORT))},
    ),
    "mistral": Case("mistral", {}, {**GROUPS, **HEAD_DIM, **NORMS}),
    "mistral yarn": Case("mistral", yarn(), {"yarn": PLAIN}),
    "qwen2": Case(
        "qwen2", {}, {**GROUPS, **HEAD_DIM, **{f"bias of {n}": ref.with_weights(f"{n}_proj.bias", 0.0) for n in "qkv"}}
    ),
    "qwen2 tied": Case("qwen2", {"tie_word_embeddings": True, "head_dim": None}),
    "qwen3": Case(
        "qwen3", {},
        {**GROUPS, "q and k norm": ref.with_attention(ref.without_qk_norm),
         **{f"weight of {n}_norm": ref.with_weights(f"{n}_norm.weight", 1.0) for n in "qk"}},
    ),
    "qwen3 attention_bias, tied": Case(
        "qwen3", {"attention_bias": True, "tie_word_embeddings": True},
        {f"bias of {n}": ref.with_weights(f"{n}_proj.bias", 0.0) for n in "qkvo"},
    ),
    # Prompts shorter and longer than the window, by one and by many; the steps' chunks (16) are longer than most.
    "mistral window": Case(
        "mistral", {"sliding_window": 12},
        {"window": ref.with_config(sliding_window=None), "its last position": ref.with_config(sliding_window=11)},
        lengths=(11, 12, 13, 28),
    ),
    "mistral window of a chunk": Case("mistral", {"sliding_window": 16}, lengths=(15, 16, 17, 1)),
    "mistral window of a block": Case("mistral", {"sliding_window": 4}, lengths=(3, 4, 5, 40)),
    # transformers' cache cuts to the last `window - 1` positions with [-0:], which is all of them.
    "mistral window of one": Case("mistral", {"sliding_window": 1}, lengths=(1, 2, 17, 40), cached=False, distinct=3),
    "mistral window above all": Case("mistral", {"sliding_window": 4096}),
    "qwen2 windows from layer 1": Case(
        "qwen2", windowed(7, num_hidden_layers=3, max_window_layers=1),
        {"window": no_window(3), "layers": ref.with_config(layer_types=[SLIDING] * 3),
         "its last position": ref.with_config(sliding_window=6)},
        lengths=(6, 7, 8, 42),
    ),
    "qwen2 use_sliding_window off": Case("qwen2", {"sliding_window": 4, "use_sliding_window": False}),
    "qwen3 alternating": Case(
        "qwen3", windowed(9, num_hidden_layers=4, layer_types=[SLIDING, FULL] * 2),
        {"window": no_window(4), "layers": ref.with_config(layer_types=[FULL, SLIDING] * 2)},
        lengths=(8, 9, 10, 37),
    ),
    "qwen3 five to one": Case(
        "qwen3", windowed(5, num_hidden_layers=6, layer_types=[SLIDING] * 5 + [FULL]), {"window": no_window(6)},
        lengths=(4, 5, 6, 49),
    ),
    "phi3 window": Case("phi3", {"sliding_window": 8}, {"window": ref.with_config(sliding_window=None)}),
    "phi3": Case("phi3", {}, {**GROUPS, **HEAD_DIM, **NORMS}),
    "phi3 partial rotary": Case(
        "phi3", rope("default", partial_rotary_factor=0.5), {"partial rotary": PLAIN}
    ),
    # transformers throws Phi-3's cache away where a sequence grows past the original length, and so do we.
    "phi3 longrope across": Case("phi3", longrope(32) | PHI3_HEADS),
    "phi3 longrope short": Case(
        "phi3", longrope(128) | PHI3_HEADS, {"short": ref.with_config(**longrope(128, short_factor=LONG))}
    ),
    "phi3 longrope long": Case(
        "phi3", longrope(8) | PHI3_HEADS, {"long": ref.with_config(**longrope(8, long_factor=SHORT))}, (9, 17, 38)
    ),
}


def cases(quick: tuple[str, ...] = ("llama", "llama llama3")) -> pytest.MarkDecorator:
    """Parametrises over cases: those of a family on one worker, all but a few out of the quick tier."""
    return pytest.mark.parametrize("name", [
        pytest.param(name, marks=[pytest.mark.xdist_group(case.family), *[pytest.mark.slow] * (name not in quick)])
        for name, case in CASES.items()
    ])  # fmt: skip


@cache
def model(name: str) -> ref.Model:
    case = CASES[name]
    return ref.model(case.family, head=case.head, **case.changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a case, written once a worker."""
    return cache(lambda name: ref.save(model(name), tmp_path_factory.mktemp("checkpoint")))


def prompts(name: str) -> list[list[int]]:
    return [prompt(length, seed) for seed, length in enumerate(CASES[name].lengths)]


FOLLOWING = [prompt(4, 10), prompt(2, 11), prompt(4, 12), prompt(1, 13)]
"""Tokens fed to the decode step after each prompt: rows leave it at different times."""


@cases()
def test_logits_at_every_position_equal_transformers(name, folder):
    asked = prompts(name)
    following = FOLLOWING[: len(asked)]
    found = loaded.logits(folder(name), asked, following)
    for ids, after, ours in zip(asked, following, found, strict=True):
        theirs = ref.logits(model(name), ids, after, cached=CASES[name].cached)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


@cases(quick=("llama",))
def test_greedy_tokens_equal_transformers(name, folder):
    asked = prompts(name)
    found = loaded.greedy(folder(name), asked, GREEDY)
    expected = [ref.greedy(model(name), ids, GREEDY, cached=CASES[name].cached) for ids in asked]
    assert found == expected
    assert len(set(sum(expected, []))) > CASES[name].distinct


@cases()
def test_an_option_overlooked_moves_the_logits(name):
    asked = prompts(name)
    whole = [ref.logits(model(name), ids) for ids in asked]
    for option, change in CASES[name].without.items():
        other = change(model(name))
        moved = max(np.abs(ref.logits(other, ids) - a).max() for ids, a in zip(asked, whole, strict=True))
        assert moved > 100 * TOLERANCE, option


def test_every_family_and_option_has_a_case():
    from jaxinfer.layers.mlp import ACTIVATIONS
    from jaxinfer.layers.rope_config import ROPE_KINDS
    from jaxinfer.models.registry import ARCHITECTURES

    configs = [model(name).config for name in CASES]
    elsewhere = {"internvl"}  # test_internvl.py
    assert {case.family for case in CASES.values()} == set(ARCHITECTURES.values()) - elsewhere
    assert {config.hidden_act for config in configs} | {"swish"} == set(ACTIVATIONS)
    assert {config.rope_parameters["rope_type"] for config in configs} == set(ROPE_KINDS)
