"""Reference implementation of InternVL (transformers), and checkpoints with OpenGVLab's names. Needs torch."""

import copy
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

from support import internvl

Model = transformers.InternVLForConditionalGeneration


def model(seed: int = 0, **changes: Any) -> Model:
    """Return a tiny model (`internvl.config`) with random weights."""
    hf = internvl.config(**changes)
    made = Model(transformers.InternVLConfig.from_dict(hf, attn_implementation="eager")).float().eval()
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        for name, value in made.named_parameters():
            value.copy_(torch.tensor(internvl.noise(name, tuple(value.shape), generator)))
    return made


@torch.no_grad()
def tower(reference: Model, pixels: np.ndarray) -> np.ndarray:
    """Return the output of the vision tower's last layer for tiles, `[n, t, M]`."""
    return reference.model.vision_tower(pixel_values=torch.tensor(pixels)).last_hidden_state.numpy()


@torch.no_grad()
def rows(reference: Model, pixels: np.ndarray) -> np.ndarray:
    """Return the output of the projector for tiles, `[n, rows, M]`."""
    layer = reference.config.vision_feature_layer
    return reference.get_image_features(torch.tensor(pixels), vision_feature_layer=layer).pooler_output.numpy()


@torch.no_grad()
def logits(reference: Model, ids: list[int], pixels: np.ndarray | None) -> np.ndarray:
    """Return float32 logits `[T, V]` at every position."""
    images = {} if pixels is None else {"pixel_values": torch.tensor(pixels)}
    return reference(input_ids=torch.tensor([ids]), **images).logits[0].float().numpy()


def changed(**changes: Any) -> Callable[[Model], Model]:
    """Use the same weights under another configuration (arguments of `internvl.config`); drop weights without a
    place."""

    def change(reference: Model) -> Model:
        hf = reference.config.to_dict()
        for name, value in changes.items():
            key = {"vision": "vision_config", "text": "text_config"}.get(name, name)
            hf[key] = hf[key] | value if isinstance(value, Mapping) else value
        made = Model(transformers.InternVLConfig.from_dict(hf, attn_implementation="eager")).float().eval()
        found = made.load_state_dict(reference.state_dict(), strict=False)
        assert not found.missing_keys, found
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


def normed(epsilon: float) -> Callable[[Model], Model]:
    """Set the epsilon of the query and key norms."""

    def change(reference: Model) -> Model:
        made = copy.deepcopy(reference)
        for layer in made.model.vision_tower.encoder.layer:
            layer.attention.q_norm.variance_epsilon = layer.attention.k_norm.variance_epsilon = epsilon
        return made

    return change


def a_head_apart(reference: Model) -> Model:
    """Normalise queries and keys per head instead of over the whole width."""
    made = copy.deepcopy(reference)
    for layer in made.model.vision_tower.encoder.layer:
        attention = layer.attention
        for name in ("q_norm", "k_norm"):
            norm, heads = getattr(attention, name), attention.num_heads
            setattr(attention, name, _HeadNorm(norm.weight, norm.variance_epsilon, heads))
    return made


class _HeadNorm(torch.nn.Module):
    def __init__(self, weight: torch.Tensor, epsilon: float, heads: int):
        super().__init__()
        self.weight, self.epsilon, self.heads = weight, epsilon, heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = x.unflatten(-1, (self.heads, -1))
        split = split * torch.rsqrt(split.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight * split.flatten(-2)


def down_the_columns(reference: Model) -> Model:
    """Use the pixel shuffle of the original's `ps_version` "v1"."""
    made = copy.deepcopy(reference)
    whole = made.model.pixel_shuffle
    made.model.pixel_shuffle = lambda *args, **kwargs: whole(*args, **kwargs).transpose(1, 2).contiguous()
    return made


def bilinear(reference: Model) -> Model:
    """Resample position embeddings for other tile sizes bilinearly."""
    return _resampled(reference, mode="bilinear")


def antialiased(reference: Model) -> Model:
    """Resample position embeddings for other tile sizes with antialiasing."""
    return _resampled(reference, mode="bicubic", antialias=True)


def _resampled(reference: Model, **how: Any) -> Model:
    made = copy.deepcopy(reference)
    embeddings = made.model.vision_tower.embeddings

    def resample(_: torch.Tensor, height: int, width: int) -> torch.Tensor:
        first, others = embeddings.position_embeddings[:, :1], embeddings.position_embeddings[:, 1:]
        side, patch = round(others.shape[1] ** 0.5), embeddings.patch_size[0]
        table = others.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        table = torch.nn.functional.interpolate(table, size=(height // patch, width // patch), **how)
        return torch.cat([first, table.flatten(2).transpose(1, 2)], dim=1)

    embeddings.interpolate_pos_encoding = resample
    return made


_LAYER = r"model\.vision_tower\.encoder\.layer\.(\d+)\."
_RENAMED = (
    (r"model\.vision_tower\.embeddings\.cls_token", "vision_model.embeddings.class_embedding"),
    (r"model\.vision_tower\.embeddings\.position_embeddings", "vision_model.embeddings.position_embedding"),
    (r"model\.vision_tower\.embeddings\.patch_embeddings\.projection", "vision_model.embeddings.patch_embedding"),
    (_LAYER + r"attention\.projection_layer", r"vision_model.encoder.layers.\1.attn.proj"),
    (_LAYER + r"attention\.", r"vision_model.encoder.layers.\1.attn."),
    (_LAYER + r"layernorm_before", r"vision_model.encoder.layers.\1.norm1"),
    (_LAYER + r"layernorm_after", r"vision_model.encoder.layers.\1.norm2"),
    (_LAYER + r"lambda_", r"vision_model.encoder.layers.\1.ls"),
    (_LAYER + r"mlp\.", r"vision_model.encoder.layers.\1.mlp."),
    (r"model\.multi_modal_projector\.layer_norm", "mlp1.0"),
    (r"model\.multi_modal_projector\.linear_1", "mlp1.1"),
    (r"model\.multi_modal_projector\.linear_2", "mlp1.3"),
    (r"model\.language_model\.", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
)


def original_tensors(reference: Model) -> dict[str, np.ndarray]:
    """Return the weights under the names of OpenGVLab's code, where q, k and v are one tensor."""
    found = {}
    for name, value in reference.state_dict().items():
        for pattern, replacement in _RENAMED:
            name, count = re.subn(f"^{pattern}", replacement, name)
            if count:
                break
        found[name] = value.numpy()
    for name in [name for name in found if ".attn.q_proj." in name]:
        parts = [found.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        found[name.replace("q_proj", "qkv")] = np.concatenate(parts)
    return {name: np.ascontiguousarray(value) for name, value in found.items()}


def original_config(reference: Model, **changes: Any) -> dict[str, Any]:
    """Return config.json as in OpenGVLab's checkpoints, including fields that do not affect the computation."""
    hf = reference.config.to_dict()
    vision, text = hf["vision_config"], hf["text_config"]
    own = {
        name: vision[name]
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_channels",
            "norm_type",
            "hidden_act",
            "layer_norm_eps",
        )
    }
    own |= dict(
        architectures=["InternVisionModel"],
        model_type="intern_vit_6b",
        image_size=vision["image_size"][0],
        patch_size=vision["patch_size"][0],
        qk_normalization=vision["use_qk_norm"],
        qkv_bias=vision["attention_bias"],
        drop_path_rate=0.1,
        initializer_factor=0.1,
        use_flash_attn=True,
        num_experts=8,
        use_moe=False,
        noisy_gate_policy="RSample_before",
        auto_map={"AutoModel": "modeling_intern_vit.InternVisionModel"},
    )
    kind = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}[text["model_type"]]
    return (
        dict(
            architectures=["InternVLChatModel"],
            model_type="internvl_chat",
            torch_dtype="float32",
            vision_config=own,
            llm_config=text | {"architectures": [kind]},
            downsample_ratio=hf["downsample_ratio"],
            ps_version="v2",
            select_layer=hf["vision_feature_layer"],
            force_image_size=own["image_size"],
            template="internvl2_5",
            use_thumbnail=True,
            min_dynamic_patch=1,
            max_dynamic_patch=12,
            dynamic_image_size=True,
            pad2square=False,
            hidden_size=text["hidden_size"],
            use_backbone_lora=0,
            use_llm_lora=0,
            tie_word_embeddings=False,
            auto_map={"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        )
        | changes
    )


def save_original(reference: Model, folder: Path, **changes: Any) -> Path:
    """Write a checkpoint in OpenGVLab's format, for which transformers has no class."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(original_tensors(reference), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(original_config(reference, **changes)))
    tokens = {"added_tokens_decoder": {str(internvl.PLACEHOLDER): {"content": "<IMG_CONTEXT>", "special": True}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return folder
