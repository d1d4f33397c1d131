"""Llama 3.2 Vision against transformers: tower, and logits of prompts with and without images."""

import json
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from support import encoded, loaded, mllama
from support.encoded import PromptCase
from support.mllama import IMAGE, image, words

pytest.importorskip("torch", reason="the reference of the parity tests; it comes with the extra `test`")

from support import mllama_reference as ref

from jaxinfer import LLM, SamplingParams
from jaxinfer.functional import Program
from jaxinfer.media import EncoderInput

pytestmark = [pytest.mark.xdist_group("mllama"), pytest.mark.slow]

TOLERANCE = 1e-4
"""Absolute tolerance in float32; ignoring an option must change the values by 100 times as much."""
IMAGES = [image(1, 0), image(6, 1), image(3, 2)]
"""Images of one, four and three tiles."""


@cache
def model() -> ref.Model:
    return ref.model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint, with tensor names as on the Hub."""
    made = tmp_path_factory.mktemp("mllama")
    model().save_pretrained(made)
    return mllama.add_files(made)


@partial(jax.jit, static_argnums=0)
def _rows(program: Program, params: list[jax.Array], pixels: jax.Array, canvases: jax.Array) -> jax.Array:
    module = program.module(params)
    return module.projector(module.vision_model(pixels, canvases))


def rows(folder: Path, tp: int = 1) -> np.ndarray:
    program, params = loaded.load(folder, tp=tp)
    pixels, canvases = (np.concatenate(parts) for parts in zip(*((one.values, one.numbers) for one in IMAGES)))
    return np.asarray(_rows(program, params, pixels, canvases[:, 0])).reshape(3, mllama.TILES, mllama.PATCHES, -1)


def test_the_state_dict_is_taken_and_given_back(folder: Path):
    state = {name: value.numpy() for name, value in model().state_dict().items()}
    loaded.assert_same_by_name(folder, state)


@pytest.mark.parametrize("tp", [1, 2])
def test_the_tower(folder: Path, tp: int):
    """Images with different numbers of tiles in one step; rows of absent tiles are not compared."""
    for found, expected, one in zip(rows(folder, tp), ref.rows(model(), IMAGES), IMAGES, strict=True):
        own = one.length // mllama.PATCHES
        np.testing.assert_allclose(found[:own], expected[:own], atol=TOLERANCE, rtol=0)


WITHOUT = {
    "gates of the second transformer": ref.filled("gate_ffn", 0.0),
    "of its attention": ref.filled("gate_attn", 0.0),
    "tiles before": ref.filled("pre_tile_positional_embedding.gate", 0.0),
    "tiles between": ref.filled("post_tile_positional_embedding.gate", 0.0),
    "positions of tiles": ref.filled("gated_positional_embedding.gate", 0.0),
    "which layers are kept": ref.changed(vision={"intermediate_layers_indices": [1, 2]}),
    "their order": ref.changed(vision={"intermediate_layers_indices": [2, 0]}),
}


@pytest.mark.parametrize("option", WITHOUT)
def test_every_option_of_the_tower_changes_rows(option: str):
    changed = ref.rows(WITHOUT[option](model()), IMAGES)
    for one, other in zip(changed, ref.rows(model(), IMAGES), strict=True):
        assert np.abs(one - other)[0].max() > 100 * TOLERANCE


def check(folder: Path, reference: ref.Model, prompts: Sequence[tuple], tp: int = 1) -> None:
    """Check prompts, given as (token ids, images, following tokens)."""
    cases = [PromptCase(ids, mllama.cross(ids, images), following) for ids, images, following in prompts]
    for found, (ids, images, following) in zip(encoded.logits(folder, cases, tp=tp), prompts, strict=True):
        expected = ref.logits(reference, ids, images, following)
        np.testing.assert_allclose(found[:, : mllama.VOCAB], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("tp", [1, 2])
def test_prompts_with_and_without_images_side_by_side(folder: Path, tp: int):
    """Image tokens first, as written by transformers' processor."""
    one, two, three = IMAGES
    prompts = [
        ([IMAGE, *words(9)], [one], words(3, 1)),
        (words(12, 2), [], words(4, 3)),
        ([IMAGE, IMAGE, *words(6, 4)], [two, three], words(2, 5)),
        ([IMAGE, *words(15, 6)], [three], []),
    ]
    check(folder, model(), prompts, tp)


def test_images_between_the_words(folder: Path):
    """Tokens before all images pass cross-attention layers unchanged; later ones see the last run of images."""
    one, two, three = IMAGES
    prompts = [
        ([*words(5), IMAGE, *words(4, 1)], [one], words(3, 2)),
        ([IMAGE, *words(3, 3), IMAGE, IMAGE, *words(4, 4)], [one, two, three], words(3, 5)),
        ([*words(2, 6), IMAGE, IMAGE, *words(2, 7), IMAGE], [two, one, three], words(2, 8)),
    ]
    check(folder, ref.as_original(model()), prompts)
    found, expected = (ref.logits(m, *prompts[0][:2]) for m in (model(), ref.as_original(model())))
    assert np.abs(found - expected).max() > 100 * TOLERANCE, "transformers differs for these tokens"


def test_a_text_without_images_equals_a_plain_llama(folder: Path):
    check(folder, model(), [(words(20), [], words(5, 1))])


def test_images_and_their_order_change_logits():
    ids, (one, two, three) = [IMAGE, IMAGE, *words(6)], IMAGES
    expected = ref.logits(model(), ids, [one, two])
    for images in ([two, one], [one, three]):
        assert np.abs(ref.logits(model(), ids, images) - expected).max() > 100 * TOLERANCE
    for option in ("cross_attn_attn_gate", "cross_attn_mlp_gate", "k_norm.weight", "q_norm.weight"):
        changed = ref.filled(option, 1.0)(model())
        assert np.abs(ref.logits(changed, ids, [one, two]) - expected).max() > 100 * TOLERANCE, option


def test_checkpoints_before_4_56_name_layer_inputs(tmp_path: Path):
    """Written by transformers before 4.56, like those on the Hub: `intermediate_layers_indices` names layer inputs."""
    names = ref.model(vision={"intermediate_layers_indices": [1, 2]})
    names.save_pretrained(tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    hf["transformers_version"] = "4.45.0.dev0"
    (tmp_path / "config.json").write_text(json.dumps(hf))
    outputs = ref.changed(vision={"intermediate_layers_indices": [0, 1]})(names)
    for found, expected, one in zip(rows(tmp_path), ref.rows(outputs, IMAGES), IMAGES, strict=True):
        own = one.length // mllama.PATCHES
        np.testing.assert_allclose(found[:own], expected[:own], atol=TOLERANCE, rtol=0)


def test_tensor_names_of_transformers(tmp_path: Path, folder: Path):
    model().save_pretrained(tmp_path, save_original_format=False)
    np.testing.assert_array_equal(rows(tmp_path), rows(folder))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    """With a budget smaller than a prompt, so that chunks begin and end among images."""
    settings = dict(max_model_len=128, max_num_batched_tokens=16, block_size=4, check_invariants=True)
    with LLM(folder, skip_tokenizer_init=True, use_tqdm=False, **settings) as made:
        yield made


def ask(ids: list[int], images: Sequence[EncoderInput]) -> dict[str, Any]:
    """A prompt with preprocessed images."""
    if not images:
        return {"prompt_token_ids": ids}
    pixels, canvases = (np.concatenate(parts) for parts in zip(*((one.values, one.numbers) for one in images)))
    return {"prompt_token_ids": ids, "multi_modal_data": {"pixel_values": pixels, "aspect_ratio_ids": canvases[:, 0]}}


MADE = 24


def test_greedy_tokens_of_a_mixed_batch(llm: LLM):
    """With no, one and several images, of all lengths, chunked; a repeated image is not encoded again."""
    one, two, three = IMAGES
    first = [
        ([IMAGE, *words(9)], [one]),
        (words(12, 2), []),
        ([IMAGE, IMAGE, *words(6, 4)], [two, three]),
        ([IMAGE, *words(40, 6)], [three]),
        (words(1, 7), []),
    ]
    between = [
        ([*words(5), IMAGE, *words(30, 1)], [one]),
        ([IMAGE, *words(3, 3), IMAGE, IMAGE, *words(4, 4)], [one, two, three]),
        ([*words(14, 6), IMAGE, IMAGE, *words(2, 7), IMAGE], [two, one, two]),
    ]
    params = SamplingParams(temperature=0, max_tokens=MADE, ignore_eos=True)
    outputs = llm.generate([ask(*prompt) for prompt in first + between], params, use_tqdm=False)
    expected = [ref.greedy(model(), *prompt, MADE) for prompt in first]
    expected += [ref.greedy(ref.as_original(model()), *prompt, MADE) for prompt in between]
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected
    assert len(set(map(tuple, expected))) == len(expected) and max(len(set(made)) for made in expected) > 6
