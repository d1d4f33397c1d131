"""The text models of multimodal checkpoints, under both kinds of tensor names."""

from functools import cache

import pytest
from support.families import LINEAR_LAYER, families
from support.tiny import CONFIG, FULL, SLIDING, prompt

pytest.importorskip("torch", reason="the reference of the parity tests; it comes with the extra `test`")

import torch
import transformers
from support import loaded
from support import reference as ref
from support.layers import assert_logits_close

pytestmark = pytest.mark.slow

PROMPTS = [prompt(length, seed) for seed, length in enumerate((6, 7, 8, 40))]
FOLLOWING = [prompt(4, 10 + seed) for seed in range(4)]


TEXT = {name: value for name, value in CONFIG.items() if name != "dtype"} | {"pad_token_id": 0}


def gemma3() -> transformers.PreTrainedConfig:
    text = TEXT | dict(sliding_window=7, layer_types=[SLIDING, FULL], query_pre_attn_scalar=8)
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    return transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=96,
        boi_token_index=95,
        eoi_token_index=94,
        attn_implementation="eager",
    )


def qwen3_5(config: type[transformers.PreTrainedConfig], **experts: int) -> transformers.PreTrainedConfig:
    rope = families()["qwen3_5"].cases["qwen3_5"].changes
    text = {**TEXT, **families()["qwen3_5"].config, **rope, **experts, "layer_types": [LINEAR_LAYER, FULL]}
    vision = dict(
        depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, num_position_embeddings=4
    )
    ids = dict(image_token_id=96, video_token_id=95, vision_start_token_id=94, vision_end_token_id=93)
    return config(text_config=text, vision_config=vision, attn_implementation="eager", **ids)


def gemma4() -> transformers.PreTrainedConfig:
    text = TEXT | families()["gemma4"].config
    tower = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    vision = dict(tower, intermediate_size=16, num_key_value_heads=2, head_dim=8, patch_size=4)
    audio = dict(tower, output_proj_dims=16, subsampling_conv_channels=[4, 4])
    ids = dict(image_token_id=0, video_token_id=1, audio_token_id=2)  # of none in a prompt, which would be padding
    return transformers.Gemma4Config(
        text_config=text,
        vision_config=vision | {"position_embedding_size": 16},
        audio_config=audio,
        tie_word_embeddings=False,
        attn_implementation="eager",
        **ids,
    )


def llama4() -> transformers.PreTrainedConfig:
    text = TEXT | families()["llama4"].config
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vision_output_dim=16)
    vision = dict(sizes, image_size=28, patch_size=14, projector_input_dim=16, projector_output_dim=16)
    ids = dict(image_token_index=96, boi_token_index=95, eoi_token_index=94)
    return transformers.Llama4Config(text_config=text, vision_config=vision, attn_implementation="eager", **ids)


EXPERTS = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=20)
MODELS = {
    "gemma3": (transformers.Gemma3ForConditionalGeneration, gemma3),
    "gemma4": (transformers.Gemma4ForConditionalGeneration, gemma4),
    "llama4": (transformers.Llama4ForConditionalGeneration, llama4),
    "qwen3_5": (transformers.Qwen3_5ForConditionalGeneration, lambda: qwen3_5(transformers.Qwen3_5Config)),
    "qwen3_5_moe": (
        transformers.Qwen3_5MoeForConditionalGeneration,
        lambda: qwen3_5(transformers.Qwen3_5MoeConfig, **EXPERTS),
    ),
}


@cache
def model(family: str) -> ref.Model:
    """Return a model with random weights of matching scale, in text model and vision tower."""
    cls, config = MODELS[family]
    made = cls(config()).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in made.parameters():
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return made


@pytest.mark.parametrize("of_the_hub", [True, False])
@pytest.mark.parametrize("family", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in MODELS])
def test_logits_equal_transformers(family, of_the_hub, tmp_path):
    reference = model(family)
    folder = ref.save(reference, tmp_path, save_original_format=of_the_hub)
    if family == "llama4":  # transformers 5.24 computes its multimodal model with images alone
        reference = reference.language_model
    found = loaded.logits(folder, PROMPTS, FOLLOWING)
    tokens = list(zip(PROMPTS, FOLLOWING, strict=True))
    expected = [ref.logits(reference, *each, cached=False) for each in tokens]
    assert_logits_close(folder, reference, found, expected, tokens, families()[family].cases[family].tolerance)
    assert all(logits.std() > 0.1 for logits in expected)
