"""Reference implementation: tiny transformers models whose options all change the logits. Needs torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from support.families import NULL
from support.tiny import ARCHITECTURES, CONFIG, OWN, VARIANTS

Model = transformers.PreTrainedModel
CLASSES = ARCHITECTURES | VARIANTS

COMMON = dict(CONFIG, rms_norm_eps=0.05, bos_token_id=1, eos_token_id=2, pad_token_id=0)
"""config.json of every tiny model; special ids lie inside its vocabulary, and the norm epsilon is no default."""


def config(family: str, **changes: Any) -> transformers.PreTrainedConfig:
    """Return a tiny configuration of the family; a change to None removes an attribute, to `NULL` sets it to null."""
    own = COMMON | OWN.get(family, {}) | changes
    values = {name: None if value is NULL else value for name, value in own.items() if value is not None}
    return getattr(transformers, CLASSES[family]).config_class(**values, attn_implementation="eager")


def model(family: str, *, seed: int = 0, head: float = 0.7, **changes: Any) -> Model:
    """Return a model with random weights, scaled for activations of order one; no bias or norm is neutral.

    `head`: standard deviation of the LM head's weights, and so of the logits.
    """
    made = getattr(transformers, CLASSES[family])(config(family, **changes)).float().eval()
    generator = torch.Generator().manual_seed(seed)
    tied = made.config.tie_word_embeddings
    with torch.no_grad():
        for name, value in made.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 1 and "norm" in name and name.endswith("weight"):
                value.copy_(_norm_weight(made, name) + 0.4 * noise)
            elif name.endswith(("bias", "A_log")):
                value.copy_(0.5 * noise)
            elif name == "lm_head.weight":
                value.copy_(head * noise)
            elif "embed" in name:
                # With tied embeddings, a large embedding would make every token predict itself.
                value.copy_((0.25 if tied else 1.0) * noise)
            elif name.endswith(("sinks", "mamba.D", "mixer.D", "router.scale", "per_expert_scale")):
                value.copy_(1 + noise)
            else:
                # The MLP outweighs the embedding, so that a wrong gelu variant shows in the logits.
                scale = 3.0 if "down_proj" in name else 1.5
                value.copy_(scale * value.shape[1] ** -0.5 * noise)
        for name, value in made.named_buffers():
            if name.endswith(("expert_bias", "mixer.gate.e_score_correction_bias")):
                value.copy_(0.5 * torch.randn(value.shape, generator=generator))
            elif name.endswith("layer_scalar"):
                value.copy_(1 + 0.2 * torch.randn(value.shape, generator=generator))
    return made


def _norm_weight(reference: Model, name: str) -> float:
    """Return the mean of a norm's stored weights: 1, or 0 for Gemma up to 3, which stores weights minus 1.

    Gemma scales its tied embedding up and normalises the outputs of attention and MLP (`post_` norms): those norms get
    a mean of 3, to match the embedding.
    """
    if not reference.config.model_type.startswith("gemma"):
        return 1.0
    if reference.config.model_type.startswith("gemma4"):
        return 3.0 if ".post_" in name else 1.0
    return 3.0 if ".post_" in name else 0.0


def save(reference: Model, folder: Path, **how: Any) -> Path:
    """Call `save_pretrained` and return the folder."""
    reference.save_pretrained(folder, **how)
    return folder


def fresh(reference: Model) -> Model:
    """Reset length-dependent RoPE scaling, which remembers the lengths of earlier prompts."""
    rotary = getattr(reference.model, "rotary_emb", None)
    if rotary is not None:
        reference.model.rotary_emb = type(rotary)(reference.config)
    return reference


@torch.no_grad()
def logits(
    reference: Model, prompt: Sequence[int], following: Sequence[int] = (), *, cached: bool = True
) -> np.ndarray:
    """Return float32 logits `[T, V]` at every position of the prompt, then of each following token, decoded one by one.

    If not `cached`, all tokens go in one call without a cache.
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
    """Return the greedy tokens of `generate`, without EOS."""
    settings = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=count, eos_token_id=None, pad_token_id=0, use_cache=cached
    )
    reference.generation_config = settings
    ids = torch.tensor([prompt])
    out = fresh(reference).generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return out[0, len(prompt) :].tolist()
