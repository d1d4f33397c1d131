"""Reference implementation of Llama 3.2 Vision (transformers). Needs torch."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from jaxinfer.media import EncoderInput
from support import mllama

Model = transformers.MllamaForConditionalGeneration


def model(seed: int = 0, **changes: Any) -> Model:
    """Return a tiny model with random weights."""
    hf = mllama.config(**changes)
    made = Model(transformers.MllamaConfig(**hf, attn_implementation="eager")).float().eval()
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        for name, value in made.named_parameters():
            value.copy_(torch.tensor(mllama.noise(name, tuple(value.shape), generator)))
    return made


def as_original(reference: Model) -> Model:
    """Make tokens without a preceding image skip the cross-attention layers, as in the original code.

    transformers lets such tokens attend to all images, including later ones and padding tiles, and skips only the MLP
    (transformers issue 39379).
    """
    made = copy.deepcopy(reference)
    for number in sorted(made.config.text_config.cross_attention_layers):
        layer = made.model.language_model.layers[number]
        layer.register_forward_pre_hook(_remember, with_kwargs=True)
        layer.cross_attn.register_forward_hook(_masked(layer))
    return made


def _remember(layer: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    layer.sees = kwargs["full_text_row_masked_out_mask"]


def _masked(layer: torch.nn.Module) -> Callable[..., Any]:
    def hook(module: torch.nn.Module, args: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        return (output[0] if layer.sees is None else output[0] * layer.sees[:, 0], output[1])

    return hook


def inputs(ids: Sequence[int], images: Sequence[EncoderInput]) -> dict[str, torch.Tensor]:
    """Return the model inputs that transformers' processor makes of a prompt with these images."""
    made = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    if not images:
        return made
    counts = [one.length // mllama.PATCHES for one in images]
    mask = convert_sparse_cross_attention_mask_to_dense(
        [get_cross_attention_token_mask(list(ids), mllama.IMAGE)], [counts], mllama.TILES, len(ids)
    )
    tiles = np.arange(mllama.TILES) < np.array(counts)[:, None]
    return made | {
        "pixel_values": torch.tensor(np.concatenate([one.values for one in images]))[None],
        "aspect_ratio_ids": torch.tensor(np.concatenate([one.numbers for one in images]))[:, 0][None].long(),
        "aspect_ratio_mask": torch.tensor(tiles)[None].long(),
        "cross_attention_mask": torch.tensor(mask),
    }


@torch.no_grad()
def rows(reference: Model, images: Sequence[EncoderInput]) -> list[np.ndarray]:
    """Return the output of vision tower and projector for each image, `[t, p, M]`."""
    given = inputs([mllama.IMAGE] * len(images), images)
    names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    out = reference.model.vision_model(**{name: given[name] for name in names}).last_hidden_state
    return list(reference.model.multi_modal_projector(out)[0].numpy())


@torch.no_grad()
def logits(
    reference: Model, ids: Sequence[int], images: Sequence[EncoderInput], following: Sequence[int] = ()
) -> np.ndarray:
    """Return float32 logits `[T, V]` of a prompt and of the tokens decoded after it."""
    given = inputs(ids, images)
    if following:
        given["input_ids"] = torch.tensor([[*ids, *following]])
        given["attention_mask"] = torch.ones(1, len(ids) + len(following), dtype=torch.long)
        if images:  # a new token attends to the same images as the last token
            mask = given["cross_attention_mask"]
            given["cross_attention_mask"] = torch.cat([mask, mask[:, -1:].expand(-1, len(following), -1, -1)], dim=1)
    return reference(**given, use_cache=False).logits[0].float().numpy()


def greedy(reference: Model, ids: Sequence[int], images: Sequence[EncoderInput], count: int) -> list[int]:
    """Return the greedy tokens of `generate`, without EOS."""
    settings = transformers.GenerationConfig(do_sample=False, max_new_tokens=count, eos_token_id=None, pad_token_id=0)
    reference.generation_config = settings
    return reference.generate(**inputs(ids, images), generation_config=settings)[0, len(ids) :].tolist()


def changed(**changes: Any) -> Callable[[Model], Model]:
    """Use the same weights under another configuration (arguments of `mllama.config`)."""

    def change(reference: Model) -> Model:
        hf = reference.config.to_dict()
        for name, value in changes.items():
            key = {"vision": "vision_config", "text": "text_config"}.get(name, name)
            hf[key] = hf[key] | value if isinstance(value, Mapping) else value
        made = Model(transformers.MllamaConfig(**hf, attn_implementation="eager")).float().eval()
        made.load_state_dict(reference.state_dict())
        return made

    return change


def filled(ending: str, value: float) -> Callable[[Model], Model]:
    """Set the weights whose names end in `ending` to `value`."""

    @torch.no_grad()
    def change(reference: Model) -> Model:
        made = copy.deepcopy(reference)
        names = [name for name, _ in made.named_parameters() if name.endswith(ending)]
        assert names, ending
        for name in names:
            made.get_parameter(name).fill_(value)
        return made

    return change
