"""The text model of a multimodal Gemma 3 checkpoint, under both kinds of tensor names."""

import pytest
from support.tiny import CONFIG, FULL, SLIDING, prompt

pytest.importorskip("torch", reason="the reference of the parity tests; it comes with the extra `test`")

import torch
import transformers
from support import loaded
from support import reference as ref
from support.layers import assert_logits_close

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("gemma3")]

PROMPTS = [prompt(length, seed) for seed, length in enumerate((6, 7, 8, 40))]
FOLLOWING = [prompt(4, 10 + seed) for seed in range(4)]


@pytest.fixture(scope="module")
def reference():
    """Random weights of matching scale, in text model and vision tower."""
    text = {name: value for name, value in CONFIG.items() if name != "dtype"}
    text |= dict(sliding_window=7, layer_types=[SLIDING, FULL], query_pre_attn_scalar=8, pad_token_id=0)
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=96,
        boi_token_index=95,
        eoi_token_index=94,
        attn_implementation="eager",
    )
    made = transformers.Gemma3ForConditionalGeneration(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in made.parameters():
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return made


@pytest.mark.parametrize("of_the_hub", [True, False])
def test_logits_equal_transformers(reference, of_the_hub, tmp_path):
    folder = ref.save(reference, tmp_path, save_original_format=of_the_hub)
    found = loaded.logits(folder, PROMPTS, FOLLOWING)
    for ids, after, ours in zip(PROMPTS, FOLLOWING, found, strict=True):
        with torch.no_grad():
            theirs = reference(torch.tensor([[*ids, *after]]), use_cache=False).logits[0].numpy()
        assert_logits_close(folder, reference, ours, theirs, ids, 1e-4)
        assert theirs.std() > 0.1
