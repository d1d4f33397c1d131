"""Qwen3-VL against transformers: tower, logits of prompts with images, and from pictures to text."""

import base64
import io
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from support import loaded, qwen3_vl
from support.internvl import PLACEHOLDER, feature_index, noise, words
from support.qwen3_vl import MARKER, add_files, folder_config, ids_of, image, picture, placed, tokenizer

torch = pytest.importorskip("torch", reason="the reference of the parity tests; it comes with the extra `test`")

import transformers

client = pytest.importorskip("starlette.testclient", reason="the server's route; it comes with the extra `serve`")

from jaxinfer import LLM, AsyncLLM, SamplingParams, functional
from jaxinfer.errors import CheckpointError
from jaxinfer.functional.encoder_batch import EncodeJob, EncodeShape, encode_batch
from jaxinfer.loading import weights
from jaxinfer.loading.update import WeightTable
from jaxinfer.media import EncoderInput, ImageProcessor, MediaReader
from jaxinfer.media.rope_positions import RopePositions
from jaxinfer.models.base import FeatureRows
from jaxinfer.models.qwen3_vl.images import IMAGES

pytestmark = [pytest.mark.xdist_group("qwen3_vl"), pytest.mark.slow]

TOLERANCE = 1e-4
Model = transformers.Qwen3VLForConditionalGeneration


def reference(**changes: Any) -> Model:
    """A tiny model with random weights; no bias, norm or scale is neutral."""
    hf = qwen3_vl.config(**changes)
    kind = "Qwen3VLMoe" if "num_experts" in hf["text_config"] else "Qwen3VL"
    config = getattr(transformers, f"{kind}Config").from_dict(hf, attn_implementation="eager")
    made = getattr(transformers, f"{kind}ForConditionalGeneration")(config).float().eval()
    generator = np.random.default_rng(0)
    with torch.no_grad():
        for name, value in made.named_parameters():
            value.copy_(torch.tensor(noise(name, tuple(value.shape), generator)))
    return made


def pixels(images: Sequence[EncoderInput]) -> dict[str, torch.Tensor]:
    """The arguments of transformers' model: patches of two equal frames, and grids in patches."""
    flat = [np.repeat(one.values[:, :, :, None], 2, axis=3).reshape(4 * one.count, -1) for one in images]
    grids = [[1, 2 * one.numbers[0, 2], 2 * one.numbers[0, 3]] for one in images]
    return {"pixel_values": torch.tensor(np.concatenate(flat)), "image_grid_thw": torch.tensor(grids)}


@torch.no_grad()
def expected_rows(model: Model, images: Sequence[EncoderInput]) -> np.ndarray:
    found = model.model.get_image_features(*pixels(images).values())
    return torch.cat([torch.cat(part) for part in (found.pooler_output, *found.deepstack_features)], 1).numpy()


@torch.no_grad()
def expected_logits(model: Model, ids: list[int], images: Sequence[EncoderInput]) -> np.ndarray:
    model.model.rope_deltas = None
    given = torch.tensor([ids])
    own = {**pixels(images), "mm_token_type_ids": (given == PLACEHOLDER).int()} if images else {}
    return model(input_ids=given, **own).logits[0].numpy()


@partial(jax.jit, static_argnums=0)
def _encode(program: functional.Program, params: list[jax.Array], batch: Any) -> jax.Array:
    return functional.encode_joint(program, params, batch)[:, 0]


def rows(folder: Path, images: Sequence[EncoderInput], units: int = 16, **how: Any) -> np.ndarray:
    """Rows `[units, width]` of images that are encoded together, padded."""
    program, params = loaded.load(folder, **how)
    jobs = [EncodeJob(one, np.empty((0, 0), np.int32)) for one in images]
    return _encode(program, params, encode_batch(program.features, jobs, 1, 0, EncodeShape(units, 4, 0, 4)))


@dataclass(frozen=True)
class Case:
    """A model with some options, and the references of programs that overlook one."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    without: Mapping[str, Callable[[Model], None]] = field(default_factory=dict)


def _set(path: str, name: str, value: Any) -> Callable[[Model], None]:
    return lambda model: setattr(model.get_submodule(path), name, value)


def _no_rope(model: Model) -> None:
    rope = model.model.visual.rotary_pos_emb
    rope.inv_freq = torch.zeros_like(rope.inv_freq)


def _no_deepstack(model: Model) -> None:
    model.model.language_model._deepstack_process = lambda hidden, masks, rows: hidden


def _plain_positions(model: Model) -> None:
    model.model.compute_3d_position_ids = lambda **_: None


TEXT = "model.language_model.rotary_emb"
CASES = {
    "plain": Case(
        {},
        {
            "rope of the tower": _no_rope,
            "DeepStack": _no_deepstack,
            "positions": _plain_positions,
            "sections": _set(TEXT, "mrope_section", [4, 0, 2]),
            "aligned corners": _set("model.visual", "interpolation_align_corners", False),
        },
    ),
    "tied, one tap, relu, bias, yarn, a larger grid, heads of 72": Case(
        dict(
            vision=dict(
                deepstack_visual_indexes=[1], hidden_act="relu", num_position_embeddings=144, depth=2, hidden_size=144
            ),
            text=dict(
                attention_bias=True,
                rope_parameters=qwen3_vl.ROPE
                | dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, mrope_section=[3, 3, 2]),
            ),
            tie_word_embeddings=True,
        ),
        {"activation": lambda model: [setattr(b.mlp, "act_fn", torch.nn.GELU()) for b in model.model.visual.blocks]},
    ),
    "experts, no taps": Case(
        dict(
            vision=dict(deepstack_visual_indexes=[]),
            text=dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, model_type="qwen3_vl_moe_text"),
            architectures=["Qwen3VLMoeForConditionalGeneration"],
            model_type="qwen3_vl_moe",
        ),
        {"router": lambda model: [layer.mlp.gate.weight.data.zero_() for layer in model.model.language_model.layers]},
    ),
}
SHOWN = [image(2, 3, 1), image(3, 1, 2), image(1, 4, 3)]
PARTS = [[3, SHOWN[0], 5, SHOWN[1], 2], [9], [SHOWN[2], SHOWN[1]], [1, SHOWN[2], 2, SHOWN[0]]]
"""Text before, between and after images of other sizes; text alone; images alone, next to each other."""
FOLLOWING = [words(3, 10), words(2, 11), words(3, 12), words(1, 13)]
"""Tokens fed to decode steps after each prompt."""


def _images(parts: Sequence[Any]) -> list[EncoderInput]:
    return [part for part in parts if not isinstance(part, int)]


@pytest.mark.parametrize("name", CASES)
def test_logits_at_every_position_equal_transformers(name, tmp_path):
    model = reference(**CASES[name].changes)
    model.save_pretrained(tmp_path)
    program, _ = loaded.load(tmp_path)
    every = [one for parts in PARTS for one in _images(parts)]
    prompts, made = [ids_of(parts) for parts in PARTS], rows(tmp_path, every, 32)
    np.testing.assert_allclose(made[: sum(one.count for one in every)], expected_rows(model, every), atol=TOLERANCE)
    ropes = [
        placed(program, parts).rope if _images(parts) else RopePositions(np.empty((0, 3), np.int32), 0)
        for parts in PARTS
    ]
    features = FeatureRows(made, feature_index(prompts, loaded.PROMPT_TOKENS))
    with pytest.raises(ValueError, match="rope_positions is None, but this model's rope turns image tokens"):
        loaded.logits(tmp_path, prompts, FOLLOWING, features=features)
    found = loaded.logits(tmp_path, prompts, FOLLOWING, features=features, ropes=ropes)

    def expected() -> list[np.ndarray]:
        # transformers takes images without a token between them for one.
        return [
            expected_logits(model, ids + after, _images(parts))
            for ids, after, parts in zip(prompts, FOLLOWING, PARTS, strict=True)
            if parts is not PARTS[2]
        ]

    whole = expected()
    for ours, theirs in zip([found[0], found[1], found[3]], whole, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
    if "experts" in name:
        own = safetensors.numpy.load_file(tmp_path / "model.safetensors")
        published = {
            key: np.ascontiguousarray(value.swapaxes(1, 2)) if ".experts." in key else value
            for key, value in own.items()
        }
        (tmp_path / "published").mkdir()
        shutil.copy(tmp_path / "config.json", tmp_path / "published")
        safetensors.numpy.save_file(published, tmp_path / "published" / "model.safetensors")
        for value, other in zip(loaded.load(tmp_path / "published")[1], loaded.load(tmp_path)[1], strict=True):
            np.testing.assert_array_equal(value, other)
        program, params = loaded.load(tmp_path / "published")
        table = WeightTable(program, params)
        for key, value in table.tensors(params):
            np.testing.assert_array_equal(value, published[key], key)
        with pytest.raises(CheckpointError, match="cannot be updated"):
            table.prepare(published)
    for option, change in CASES[name].without.items():
        model = reference(**CASES[name].changes)
        change(model)
        assert np.abs(expected()[0] - whole[0]).max() > 100 * TOLERANCE, option


MADE = 10
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
ONE = f"<|vision_start|>{MARKER}<|vision_end|>"
PROMPTS = (
    (f"{ONE}\nhello world", [picture(90, 50)]),
    (f"the cat {ONE} sat on {ONE} the mat", [picture(20, 70, seed=1), picture(9, 9)]),
    ("hello world, the cat", []),
    (f"the {ONE}", [picture(40, 40, "RGBA", 2)]),
    (f"{ONE}{ONE}", [picture(30, 29, "L"), picture(64, 16, "P", 3)]),
    (f"a {ONE}", [picture(1, 150)]),
)


class Processor(transformers.Qwen3VLProcessor):
    """transformers' processor without torchvision, which only videos need."""

    def check_argument_for_proper_class(self, name: str, argument: Any) -> None: ...


def processor(folder: Path) -> Processor:
    return Processor(transformers.Qwen2VLImageProcessorPil.from_pretrained(folder), tokenizer(), None)


@torch.no_grad()
def generated(
    model: Model, prepare: Processor, prompts: Sequence[tuple[str, list[Image.Image]]]
) -> list[tuple[list[int], list[int]]]:
    """Prompt tokens and output tokens of each prompt alone; like jaxinfer, it samples only ids that the tokenizer
    knows.
    """
    model.generation_config.eos_token_id = None
    unknown = list(range(len(prepare.tokenizer), model.config.text_config.vocab_size))
    found = []
    for text, images in prompts:
        model.model.rope_deltas = None
        inputs = prepare(images=images or None, text=text, return_tensors="pt")
        how = dict(max_new_tokens=MADE, do_sample=False, pad_token_id=0, suppress_tokens=unknown)
        made, length = model.generate(**inputs, **how)[0].tolist(), inputs["input_ids"].shape[1]
        found.append((made[:length], made[length:]))
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Model, Path]:
    """A model, and its checkpoint as saved by transformers, with all files."""
    folder, hf = tmp_path_factory.mktemp("qwen3_vl"), folder_config()
    model = reference(text={"vocab_size": hf["text_config"]["vocab_size"]}, image_token_id=hf["image_token_id"])
    model.save_pretrained(folder)
    return model, add_files(folder)


def test_from_pictures_to_text(whole):
    from jaxinfer.serve.app import create_app
    from jaxinfer.serve.config import ServerConfig

    model, folder = whole
    prepare, upright = processor(folder), picture(50, 20, seed=4)
    question = {"type": "text", "text": "what?"}
    chat = [{"role": "user", "content": [{"type": "image", "image": upright}, question]}]
    text = prepare.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    *expected, asked = generated(model, prepare, [*PROMPTS, (text, [upright])])
    assert len({tuple(tokens) for _, tokens in expected}) == len(PROMPTS)
    file = io.BytesIO()
    upright.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, question]}],
        "temperature": 0,
        "max_tokens": MADE,
        "ignore_eos": True,
        "skip_special_tokens": False,
    }
    with LLM(folder, **SETTINGS) as llm:
        prompts = [{"prompt": text, "multi_modal_data": {"image": images}} for text, images in PROMPTS]
        outputs = [*llm.generate(prompts, PARAMS), *llm.chat(chat, PARAMS)]
        assert [(list(o.prompt_token_ids), list(o.outputs[0].token_ids)) for o in outputs] == [*expected, asked]
        with client.TestClient(create_app(AsyncLLM.of(llm), ServerConfig("tiny"))) as server:
            answer = server.post("/v1/chat/completions", json=body).json()
        assert answer["usage"]["prompt_tokens"] == len(asked[0])
        assert answer["choices"][0]["message"]["content"] == llm.get_tokenizer().decode(asked[1])


def test_pixels_and_tokens_equal_those_of_transformers(whole):
    features, prepare = weights.parse(folder_config())[1].features, processor(whole[1])
    read = MediaReader(features, tokenizer(), IMAGES, ImageProcessor(IMAGES, whole[1], {}, features.shape))
    for width, height in ((1, 150), (150, 1), (2, 3), (33, 31), (999, 1003)):
        for mode in ("RGB", "P", "LA"):
            [found] = read.read({"image": picture(width, height, mode)}, 0)
            theirs = prepare(images=[picture(width, height, mode)], text=ONE, return_tensors="np")
            np.testing.assert_array_equal(pixels([found])["pixel_values"], theirs["pixel_values"])
            np.testing.assert_array_equal(pixels([found])["image_grid_thw"], theirs["image_grid_thw"])
            assert found.count == (theirs["input_ids"] == features.placeholder).sum()
