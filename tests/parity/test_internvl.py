"""InternVL against transformers: tower, projector, logits of prompts with images, for both kinds of checkpoints."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from support import internvl, loaded
from support.internvl import PLACEHOLDER, feature_index, tiles, words

pytest.importorskip("torch", reason="the reference of the parity tests; it comes with the extra `test`")

from support import internvl_reference as ref

from jaxinfer import functional
from jaxinfer.checkpoint.rules import parameters
from jaxinfer.functional import Program
from jaxinfer.layers.mlp import ACTIVATIONS
from jaxinfer.models.base import FeatureRows

pytestmark = [pytest.mark.xdist_group("internvl"), pytest.mark.slow]

TOLERANCE = 1e-4
"""Absolute tolerance in float32; ignoring an option must change the rows by 100 times as much."""
IMAGE = [PLACEHOLDER] * 4
"""Tokens of one tile."""

Change = Callable[[ref.Model], ref.Model]


@dataclass(frozen=True)
class Case:
    """A model with some options enabled."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `internvl.config`."""
    without: Mapping[str, Change] = field(default_factory=dict)
    """Option -> the reference of a program that ignores it."""
    side: int = 28
    """Side of a tile in pixels."""


def tower(**changes: Any) -> dict[str, Any]:
    return {"vision": changes}


def other_activation(name: str) -> dict[str, Change]:
    return {"activation": ref.changed(vision={"hidden_act": name})}


WEIGHTS = {
    f"{name} {value}": ref.filled(name, value)
    for name, value in {
        "cls_token": 0.0,
        "position_embeddings": 0.0,
        "projection.bias": 0.0,
        "lambda_1": 1.0,
        "lambda_2": 1.0,
        "layernorm_before.weight": 1.0,
        "layernorm_before.bias": 0.0,
        "layernorm_after.weight": 1.0,
        "layernorm_after.bias": 0.0,
        "projection_layer.bias": 0.0,
        "fc1.bias": 0.0,
        "fc2.bias": 0.0,
        "projector.layer_norm.weight": 1.0,
        "projector.layer_norm.bias": 0.0,
        "linear_1.bias": 0.0,
        "linear_2.bias": 0.0,
    }.items()
}

CASES = {
    "plain": Case(
        {},
        {
            **WEIGHTS,
            "layer_norm": ref.changed(vision={"norm_type": "rms_norm"}),
            **other_activation("silu"),
            "order of the shuffle": ref.down_the_columns,
        },
    ),
    "rms_norm, norm of q and k": Case(
        tower(norm_type="rms_norm", use_qk_norm=True),
        {
            "norm of q and k": ref.changed(vision={"use_qk_norm": False}),
            "whole width": ref.a_head_apart,
            "weight of q's": ref.filled("q_norm.weight", 1.0),
            "weight of k's": ref.filled("k_norm.weight", 1.0),
        },
    ),
    "epsilons": Case(
        tower(layer_norm_eps=0.1, use_qk_norm=True),
        {"of layers": ref.changed(vision={"layer_norm_eps": 1e-6}), "of q and k": ref.normed(0.1)},
    ),
    "bias of q, k and v": Case(
        tower(attention_bias=True, hidden_act="gelu_pytorch_tanh"),
        {
            **{
                f"of {part}": ref.filled(f"vision_tower.encoder.layer.0.attention.{part}_proj.bias", 0.0)
                for part in "qv"
            },
            **other_activation("relu"),
        },
    ),
    "relu": Case(tower(hidden_act="relu"), other_activation("gelu")),
    "silu": Case(tower(hidden_act="silu"), other_activation("gelu")),
    "last norm": Case(tower(use_mean_pooling=False), {"it": ref.changed(vision={"use_mean_pooling": True})}),
    "no positions": Case(tower(use_absolute_position_embeddings=False)),
    "layer before the last": Case(
        tower(num_hidden_layers=3, use_mean_pooling=False) | {"vision_feature_layer": -2},
        {"layer": ref.changed(vision_feature_layer=-1)},
    ),
    "first layer": Case({"vision_feature_layer": 1}, {"layer": ref.changed(vision_feature_layer=-1)}),
    "larger tiles": Case({"image_seq_length": 9}, {"bicubic": ref.bilinear}, side=42),
    "smaller tiles": Case(
        tower(image_size=[42, 42]) | {"image_seq_length": 4}, {"bicubic": ref.bilinear, "edges": ref.antialiased}
    ),
    "blocks of four, another projector": Case(
        {"downsample_ratio": 0.25, "image_seq_length": 1, "projector_hidden_act": "relu"},
        {"activation": ref.changed(projector_hidden_act="gelu")},
    ),
}


@cache
def model(name: str) -> ref.Model:
    return ref.model(**CASES[name].changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a case, with tensor names as on the Hub."""

    @cache
    def saved(name: str) -> Path:
        made = tmp_path_factory.mktemp("internvl")
        model(name).save_pretrained(made)
        return made

    return saved


@partial(jax.jit, static_argnums=0)
def _encode(program: Program, params: list[jax.Array], pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Outputs of the tower and of the projector."""
    return program.module(params).vision_tower(pixels), functional.encode(program, params, pixels)


@pytest.mark.parametrize("name", CASES)
def test_the_tower_and_the_projector_equal_transformers(name, folder):
    program, params = loaded.load(folder(name))
    pixels = tiles(3, CASES[name].side)
    assert program.features.shape == pixels.shape[1:]
    found, rows = _encode(program, params, pixels)
    assert rows.shape[1] == program.features.rows
    if model(name).config.vision_feature_layer == -1:
        np.testing.assert_allclose(found, ref.tower(model(name), pixels), rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(rows, ref.rows(model(name), pixels), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_ignoring_an_option_changes_the_rows(name):
    pixels = tiles(3, CASES[name].side)
    whole = ref.rows(model(name), pixels)
    for option, change in CASES[name].without.items():
        moved = np.abs(ref.rows(change(model(name)), pixels) - whole).max()
        assert moved > 100 * TOLERANCE, option


def test_every_option_has_a_case():
    options = [internvl.config(**case.changes)["vision_config"] for case in CASES.values()]
    # gelu_new is gelu_pytorch_tanh, swish is silu, and relu2 is tested with the family that has it (Nemotron-H).
    assert {found["hidden_act"] for found in options} | {"gelu_new", "swish", "relu2"} == set(ACTIVATIONS)
    for option in ("norm_type", "use_qk_norm", "attention_bias", "layer_norm_eps", "image_size"):
        assert len({str(found[option]) for found in options}) > 1, option


PROMPTS = [
    [*words(3), *IMAGE, *words(5, 1), *IMAGE, *IMAGE, *words(2, 2)],
    words(9, 3),
    [*IMAGE, *words(4, 4)],
    words(1, 5),
]
"""With three tiles, one of them next to another; with none; an image before all text; a single token."""
COUNTS = (3, 0, 1, 0)
"""Number of tiles of each prompt."""
FOLLOWING = [words(3, 10), words(2, 11), words(3, 12), words(1, 13)]
"""Tokens fed to decode steps after each prompt."""


def expected(reference: ref.Model, pixels: np.ndarray) -> list[np.ndarray]:
    parts = np.split(pixels, np.cumsum(COUNTS)[:-1])
    return [
        ref.logits(reference, ids + after, part if len(part) else None)
        for ids, after, part in zip(PROMPTS, FOLLOWING, parts, strict=True)
    ]


def found_logits(folder: Path, pixels: np.ndarray, **how: Any) -> list[np.ndarray]:
    program, params = loaded.load(folder, **how)
    _, rows = _encode(program, params, pixels)
    features = FeatureRows(rows.reshape(-1, rows.shape[-1]), feature_index(PROMPTS, loaded.PROMPT_TOKENS))
    return loaded.logits(folder, PROMPTS, FOLLOWING, features=features, **how)


TEXT = {
    "qwen2": {},
    "llama": {"model_type": "llama", "attention_bias": True},
    "qwen3": {"model_type": "qwen3"},
    "tied": {"head_dim": 8},
}


@cache
def speaking(name: str) -> ref.Model:
    return ref.model(text=TEXT[name], tie_word_embeddings=name == "tied")


@pytest.mark.parametrize("name", TEXT)
def test_logits_at_every_position_equal_transformers(name, tmp_path):
    reference, pixels = speaking(name), tiles(4)
    reference.save_pretrained(tmp_path)
    for ours, theirs in zip(found_logits(tmp_path, pixels), expected(reference, pixels), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
    moved = [np.abs(a - b).max() for a, b in zip(expected(reference, tiles(4, seed=1)), expected(reference, pixels))]
    assert (np.array(moved) > 1e-2).tolist() == [True, False, True, False]


@pytest.mark.parametrize("name", ["rms_norm, norm of q and k"])
def test_the_state_dict_is_taken_and_given_back(name, folder):
    loaded.assert_same_by_name(folder(name), {path: v.numpy() for path, v in model(name).state_dict().items()})


def test_both_formats_of_transformers_are_the_same_weights(tmp_path):
    reference = model("rms_norm, norm of q and k")
    for own in (True, False):
        reference.save_pretrained(tmp_path / str(own), save_original_format=own)
    (ours, values), (theirs, others) = (loaded.load(tmp_path / str(own)) for own in (True, False))
    assert ours.tree == theirs.tree
    for value, other in zip(values, others, strict=True):
        np.testing.assert_array_equal(value, other)


@dataclass(frozen=True)
class Original:
    """A checkpoint with the original tensor names."""

    vision: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Attributes of its config.json."""
    reference: Change = lambda model: model
    """Makes transformers behave like the original's own code."""
    text: Mapping[str, Any] = field(default_factory=dict)


ORIGINALS = {
    "layer_norm, bias": Original({"attention_bias": True}),
    "rms_norm, norm of q and k": Original(
        {"norm_type": "rms_norm", "use_qk_norm": True, "layer_norm_eps": 0.1}, reference=ref.normed(0.1)
    ),
    "ps_version v1": Original(fields={"ps_version": "v1"}, reference=ref.down_the_columns),
    "ps_version by default": Original(fields={"ps_version": None}, reference=ref.down_the_columns),
    "select_layer": Original(fields={"select_layer": -2}, reference=ref.changed(vision_feature_layer=-2)),
    "llama": Original(text={"model_type": "llama"}),
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_an_original_checkpoint_equals_transformers(name, tmp_path):
    case, pixels = ORIGINALS[name], tiles(4)
    made = ref.model(vision=case.vision, text=case.text)
    saved, reference = ref.save_original(made, tmp_path, **case.fields), case.reference(made)
    program, params = loaded.load(saved)
    assert program.features.placeholder == PLACEHOLDER  # from the tokenizer's files
    np.testing.assert_allclose(_encode(program, params, pixels)[1], ref.rows(reference, pixels), rtol=0, atol=TOLERANCE)
    if case.reference is not ref.down_the_columns:
        for ours, theirs in zip(found_logits(saved, pixels), expected(reference, pixels), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def test_an_original_checkpoint_with_larger_tiles(tmp_path):
    made = ref.model()
    saved, pixels = ref.save_original(made, tmp_path, force_image_size=42), tiles(2, 42)
    program, params = loaded.load(saved)
    assert program.features.shape == (3, 42, 42) and program.features.rows == 9
    np.testing.assert_allclose(_encode(program, params, pixels)[1], ref.rows(made, pixels), rtol=0, atol=TOLERANCE)


def test_int8_is_of_the_language_model_alone(tmp_path):
    reference, pixels = speaking("qwen2"), tiles(4)
    reference.save_pretrained(tmp_path)
    program, params = loaded.load(tmp_path, quantization="int8")
    kinds = {path: str(param.dtype) for path, param in parameters(program.module(params)).items()}
    quantised = {path for path, kind in kinds.items() if kind == "int8"}
    assert {path.split(".")[0] for path in quantised} == {"language_model"}
    assert "language_model.layers.1.mlp.down.weight" in quantised
    np.testing.assert_allclose(_encode(program, params, pixels)[1], ref.rows(reference, pixels), rtol=0, atol=TOLERANCE)
    found = found_logits(tmp_path, pixels, quantization="int8")
    for ours, theirs in zip(found, expected(reference, pixels), strict=True):
        assert np.abs(ours - theirs).mean() < 0.1 * np.abs(theirs).mean()
