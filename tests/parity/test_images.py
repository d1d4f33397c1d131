"""Images from PIL to text against transformers' processor and `generate`, for both kinds of checkpoints."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from support.images import IMAGE_MARKERS, ROWS, SIDE, add_files, folder_config, tokenizer

torch = pytest.importorskip("torch", reason="the reference of the parity tests; it comes with the extra `test`")

import transformers
from support import internvl_reference as ref

from jaxinfer import LLM, SamplingParams

pytestmark = [pytest.mark.xdist_group("internvl"), pytest.mark.slow]

MADE = 12
PARAMS = SamplingParams(temperature=0, max_tokens=MADE, ignore_eos=True)
SETTINGS = dict(
    max_model_len=160,
    max_num_seqs=4,
    max_num_batched_tokens=32,
    block_size=4,
    decode_buckets=(4,),
    prefill_buckets=(32,),
    kv_cache_memory_bytes=1 << 20,
    check_invariants=True,
    use_tqdm=False,
    dtype="float32",
)


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A smooth random image, so that the resizing method matters."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(small).resize((width, height)).convert(mode)


MARKER = IMAGE_MARKERS[2]
PROMPTS = (
    (f"{MARKER}\nhello world", [picture(90, 50)]),
    (f"the cat {MARKER} sat on {MARKER} the mat", [picture(20, 70, seed=1), picture(9, 9)]),
    ("hello world, the cat", []),
    (f"the {MARKER}", [picture(40, 40, "RGBA", 2)]),
    (f"{MARKER}{MARKER}", [picture(30, 29, "L"), picture(64, 16, "P", 3)]),
    (f"a {MARKER}", [picture(1, 2)]),
)


class Processor(transformers.InternVLProcessor):
    """transformers' processor without torchvision, which only videos need."""

    def check_argument_for_proper_class(self, name: str, argument: Any) -> None: ...


def processor(folder: Path) -> Processor:
    own = tokenizer()
    for name, text in zip(("start_image", "end_image", "context_image"), IMAGE_MARKERS, strict=True):
        setattr(own, f"{name}_token", text)
        setattr(own, f"{name}_token_id", own.convert_tokens_to_ids(text))
    own.video_token = "<video>"
    images = transformers.GotOcr2ImageProcessorPil.from_pretrained(folder)
    return Processor(images, own, None, image_seq_length=ROWS)


@torch.no_grad()
def reference(
    model: ref.Model, prepare: Processor, prompts: Sequence[tuple[str, list[Image.Image]]]
) -> list[tuple[list[int], list[int]]]:
    """Prompt tokens and output tokens of each prompt alone; like jaxinfer, it samples only ids that the tokenizer
    knows.
    """
    model.generation_config.eos_token_id = None
    unknown = list(range(len(prepare.tokenizer), model.config.text_config.vocab_size))
    found = []
    for text, images in prompts:
        inputs = prepare(images=images or None, text=text, return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=MADE, do_sample=False, pad_token_id=0, suppress_tokens=unknown)[
            0
        ].tolist()
        length = inputs["input_ids"].shape[1]
        found.append((made[:length], made[length:]))
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[ref.Model, Path]:
    """A model, and its checkpoint as saved by transformers."""
    folder = tmp_path_factory.mktemp("internvl")
    hf = folder_config()
    model = ref.model(text={"vocab_size": hf["text_config"]["vocab_size"]}, image_token_id=hf["image_token_id"])
    model.save_pretrained(folder)
    return model, add_files(folder)


def ours(folder: Path, prompts: Sequence[Any], **settings: Any) -> list[tuple[list[int], list[int]]]:
    with LLM(folder, **SETTINGS | settings) as llm:
        outputs = llm.generate(prompts, PARAMS, use_tqdm=False)
        return [(list(o.prompt_token_ids), list(o.outputs[0].token_ids)) for o in outputs]


def test_prompts_with_images_in_one_batch(made):
    model, folder = made
    expected = reference(model, processor(folder), PROMPTS)
    prompts = [{"prompt": text, "multi_modal_data": {"image": images}} for text, images in PROMPTS]
    assert ours(folder, prompts) == expected
    assert len({tuple(tokens) for _, tokens in expected}) == len(PROMPTS)


def test_an_original_checkpoint_tiles_images_as_transformers(made, tmp_path):
    model, folder = made
    prepare = processor(folder)
    save_file(ref.original_tensors(model), tmp_path / "model.safetensors")
    hf = ref.original_config(
        model, max_dynamic_patch=4, min_dynamic_patch=1, use_thumbnail=True, dynamic_image_size=True
    )
    (tmp_path / "config.json").write_text(json.dumps(hf))
    add_files(tmp_path)
    misleading = {
        "crop_size": SIDE,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "size": SIDE,
        "image_mean": [0, 0, 0],
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(misleading))  # as in original checkpoints
    prompts = [
        {"prompt": text.replace(MARKER, "<image>"), "multi_modal_data": {"image": images}}
        for text, images in PROMPTS[:2]
    ]
    assert ours(tmp_path, prompts) == reference(model, prepare, PROMPTS[:2])


def test_conversations(made):
    model, folder = made
    prepare, image = processor(folder), picture(50, 20, seed=4)
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]}]
    text = prepare.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    [expected] = reference(model, prepare, [(text, [image])])
    with LLM(folder, **SETTINGS) as llm:
        [output] = llm.chat(chat, PARAMS, use_tqdm=False)
    assert (list(output.prompt_token_ids), list(output.outputs[0].token_ids)) == expected
