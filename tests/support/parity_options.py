"""Options of decoder families in config.json, and the changes of the reference that show that they matter."""

from typing import Any

from support import reference_changes as ref
from support.families import FULL, SLIDING, Change


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
