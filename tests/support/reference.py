"""The reference: tiny transformers models whose every option shows in the logits. Needs torch."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from support.tiny import ARCHITECTURES, CONFIG, OWN

Model = transformers.PreTrainedModel

COMMON = dict(CONFIG, rms_norm_eps=0.05, bos_token_id=1, eos_token_id=2, pad_token_id=0)
"""config.json of every tiny model; the ids lie inside its vocabulary, and no norm has an epsilon that is a default."""


def config(family: str, **changes: Any) -> transformers.PreTrainedConfig:
    """A tiny configuration of the family; a change to None leaves the attribute out."""
    own = COMMON | OWN.get(family, {}) | changes
    values = {name: value for name, value in own.items() if value is not None}
    return getattr(transformers, ARCHITECTURES[family]).config_class(**values, attn_implementation="eager")


def model(family: str, *, seed: int = 0, head: float = 0.7, **changes: Any) -> Model:
    """A model with random weights of its own scale: all activations are of order one, no bias or norm is neutral.

    `head`: standard deviation of the language-model head, and with it of the logits.
    """
    made = getattr(transformers, ARCHITECTURES[family])(config(family, **changes)).float().eval()
    generator = torch.Generator().manual_seed(seed)
    tied = made.config.tie_word_embeddings
    with torch.no_grad():
        for name, value in made.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("norm.weight"):
                value.copy_(_norm_weight(made, name) + 0.4 * noise)
            elif name.endswith(("bias", "A_log")):
                value.copy_(0.5 * noise)
            elif name == "lm_head.weight":
                value.copy_(head * noise)
            elif "embed" in name:
                # Tied, a large embedding would have every token predict itself.
                value.copy_((0.25 if tied else 1.0) * noise)
            elif name.endswith("sinks"):
                value.copy_(1 + noise)
            else:
                # The MLP outweighs the embedding, so that the kinds of gelu can be told apart.
                scale = 3.0 if "down_proj" in name else 1.5
                value.copy_(scale * value.shape[1] ** -0.5 * noise)
    return made


def _norm_weight(reference: Model, name: str) -> float:
    """What the weights of a norm lie around: 1, which Gemma keeps less one.

    Gemma's tied embedding is scaled up, and its layers give what their last norm makes of it: so that makes more.
    """
    if not reference.config.model_type.startswith("gemma"):
        return 1.0
    return 3.0 if ".post_" in name else 0.0


def save(reference: Model, folder: Path, **how: Any) -> Path:
    """`save_pretrained`; gives the folder."""
    reference.save_pretrained(folder, **how)
    return folder


def fresh(reference: Model) -> Model:
    """Forgets the lengths that a rope scaled by length has seen in other prompts."""
    rotary = getattr(reference.model, "rotary_emb", None)
    if rotary is not None:
        reference.model.rotary_emb = type(rotary)(reference.config)
    return reference


@torch.no_grad()
def logits(
    reference: Model, prompt: Sequence[int], following: Sequence[int] = (), *, cached: bool = True
) -> np.ndarray:
    """Float32 logits `[T, V]` at every position of the prompt, then of each following token, decoded one by one.

    Not `cached`: all in one call.
    """
    fresh(reference)
    if not cached:
        return reference(torch.tensor([[*prompt, *following]]), use_cache=False).logits[0].float().numpy()
    out = reference(torch.tensor([prompt]), use_cache=True)
    found = [out.logits[0]]
    for token in following:
        out = reference(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits[0])
    return torch.cat(found).float().numpy()


def greedy(reference: Model, prompt: Sequence[int], count: int, *, cached: bool = True) -> list[int]:
    """The tokens `generate` makes without sampling; no token ends it."""
    settings = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=count, eos_token_id=None, pad_token_id=0, use_cache=cached
    )
    reference.generation_config = settings
    ids = torch.tensor([prompt])
    out = fresh(reference).generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return out[0, len(prompt) :].tolist()


# What follows takes one option of a model away. Each gives the reference of a program that overlooks that option.


def with_config(**changes: Any) -> Callable[[Model], Model]:
    """The same weights under another configuration; weights it has no place for are dropped."""

    def change(reference: Model) -> Model:
        values = reference.config.to_dict() | changes
        made = type(reference)(type(reference.config)(**values, attn_implementation="eager")).float().eval()
        loaded = made.load_state_dict(reference.state_dict(), strict=False)
        assert not loaded.missing_keys, loaded
        return made

    return change


def with_weights(ending: str, value: float) -> Callable[[Model], Model]:
    """Weights whose names end so set to one value."""

    @torch.no_grad()
    def change(reference: Model) -> Model:
        made = copy.deepcopy(reference)
        names = [name for name, _ in made.named_parameters() if name.endswith(ending)]
        assert names, ending
        for name in names:
            made.get_parameter(name).fill_(value)
        return made

    return change


def with_attention(change_one: Callable[[torch.nn.Module], None]) -> Callable[[Model], Model]:
    """Every attention layer changed in place."""

    def change(reference: Model) -> Model:
        made = copy.deepcopy(reference)
        for layer in made.model.layers:
            change_one(layer.self_attn)
        return made

    return change


def without(name: str) -> Callable[[Model], Model]:
    """The part of this name of every layer left out."""

    def change(reference: Model) -> Model:
        made = copy.deepcopy(reference)
        for layer in made.model.layers:
            assert hasattr(layer, name)
            setattr(layer, name, torch.nn.Identity())
        return made

    return change


@torch.no_grad()
def without_embedding_scale(reference: Model) -> Model:
    """Embeddings as the table has them."""
    made = copy.deepcopy(reference)
    made.model.embed_tokens.embed_scale.fill_(1.0)
    return made


@torch.no_grad()
def norms_as_kept(reference: Model) -> Model:
    """The weights of all norms, with nothing added to them."""
    made = copy.deepcopy(reference)
    for name, value in made.named_parameters():
        if name.endswith("norm.weight"):
            value.sub_(1.0)
    return made


def without_qk_norm(attention: torch.nn.Module) -> None:
    """Queries and keys as the projection gives them."""
    attention.q_norm = attention.k_norm = torch.nn.Identity()


def scale_of_width(attention: torch.nn.Module) -> None:
    """Scores scaled as if a head had hidden_size / heads dimensions."""
    attention.scaling = (attention.config.hidden_size // attention.config.num_attention_heads) ** -0.5


def other_groups(reference: Model) -> Model:
    """Query head h reads kv head h mod K, not h div (H / K)."""
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


def first_head_only(reference: Model) -> Model:
    """Only query head 0 finds keys and values: each head is expected to have its own, and there is one."""
    made = copy.deepcopy(reference)
    size = made.model.layers[0].self_attn.head_dim
    with torch.no_grad():
        for layer in made.model.layers:
            layer.self_attn.o_proj.weight[:, size:] = 0
    return made
