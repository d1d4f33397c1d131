"""Changes of a transformers model that disable one option each: the reference of a program that ignores it.

torch is imported when a model is changed, so that declarations of changes do not need it.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np

from support.families import Change


def with_config(**changes: Any) -> Change:
    """Use the same weights under another configuration; weights without a place in it are dropped."""

    def change(reference: Any) -> Any:
        values = reference.config.to_dict() | changes
        made = type(reference)(type(reference.config)(**values, attn_implementation="eager")).float().eval()
        loaded = made.load_state_dict(reference.state_dict(), strict=False)
        assert not loaded.missing_keys, loaded
        return made

    return change


def with_weights(ending: str, value: float) -> Change:
    """Set the weights whose names end in `ending` to `value`."""

    def change(reference: Any) -> Any:
        made = copy.deepcopy(reference)
        names = [name for name, _ in made.named_parameters() if name.endswith(ending)]
        assert names, ending
        for name in names:
            made.get_parameter(name).data.fill_(value)
        return made

    return change


def with_attention(change_one: Callable[[Any], None]) -> Change:
    """Change every attention layer in place."""

    def change(reference: Any) -> Any:
        made = copy.deepcopy(reference)
        for layer in made.model.layers:
            change_one(layer.self_attn)
        return made

    return change


def without(name: str) -> Change:
    """Remove the submodule of this name from every layer."""

    def change(reference: Any) -> Any:
        import torch

        made = copy.deepcopy(reference)
        for layer in made.model.layers:
            assert hasattr(layer, name)
            setattr(layer, name, torch.nn.Identity())
        return made

    return change


def without_embedding_scale(reference: Any) -> Any:
    """Do not scale embeddings."""
    made = copy.deepcopy(reference)
    made.model.embed_tokens.embed_scale.data.fill_(1.0)
    return made


def norms_as_kept(reference: Any) -> Any:
    """Use norm weights as stored, without adding 1."""
    made = copy.deepcopy(reference)
    for name, value in made.named_parameters():
        if name.endswith("norm.weight"):
            value.data.sub_(1.0)
    return made


def without_qk_norm(attention: Any) -> None:
    """Do not normalise queries and keys."""
    import torch

    attention.q_norm = attention.k_norm = torch.nn.Identity()


def rope_over_halves(attention: Any) -> None:
    """Rotate column i against column i + D / 2 of a head, where the model rotates columns 2i and 2i + 1."""
    import torch

    size = attention.head_dim
    order = torch.arange(size).reshape(2, size // 2).T.flatten()
    for projection in (attention.q_proj, attention.k_proj):
        for value in projection.parameters():  # rows of the weight, entries of the bias
            heads = value.data.reshape(-1, size, *value.shape[1:])
            value.data = heads[:, order].reshape(value.shape)


def scale_of_width(attention: Any) -> None:
    """Scale scores as if the head size were hidden_size / heads."""
    attention.scaling = (attention.config.hidden_size // attention.config.num_attention_heads) ** -0.5


def other_groups(reference: Any) -> Any:
    """Let query head h read KV head h mod K instead of h div (H / K)."""
    import torch

    heads, kv_heads = reference.config.num_attention_heads, reference.config.num_key_value_heads
    size = reference.model.layers[0].self_attn.head_dim
    order = np.arange(heads).reshape(heads // kv_heads, kv_heads).T.ravel()
    columns = torch.tensor((order[:, None] * size + np.arange(size)).ravel())
    made = copy.deepcopy(reference)
    with torch.no_grad():
        for layer in made.model.layers:
            attention = layer.self_attn
            queries = attention.qkv_proj if hasattr(attention, "qkv_proj") else attention.q_proj
            for value in queries.parameters():
                value[: heads * size] = value[columns].clone()
            attention.o_proj.weight.copy_(attention.o_proj.weight[:, columns])
    return made


def first_head_only(reference: Any) -> Any:
    """Give keys and values to query head 0 only: an implementation that expects one KV head per query head."""
    import torch

    made = copy.deepcopy(reference)
    size = made.model.layers[0].self_attn.head_dim
    with torch.no_grad():
        for layer in made.model.layers:
            layer.self_attn.o_proj.weight[:, size:] = 0
    return made
