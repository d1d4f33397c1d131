"""The loader reads the same weights from every format that transformers writes."""

import json
from pathlib import Path

import numpy as np
import pytest
from support import loaded
from support.tiny import ARCHITECTURES, FULL, SLIDING, prompt

torch = pytest.importorskip("torch", reason="the reference of the parity tests; it comes with the extra `test`")

from support import reference as ref

from jaxinfer.checkpoint.hf import read_config
from jaxinfer.loading import weights

FAMILIES = [
    pytest.param(family, marks=[pytest.mark.xdist_group(family), *[pytest.mark.slow] * (family != "llama")])
    for family in ARCHITECTURES
]


def assert_same_weights(found: Path, expected: Path) -> None:
    (program, values), (reference, others) = loaded.load(found), loaded.load(expected)
    assert program.tree == reference.tree
    for value, other in zip(values, others, strict=True):
        np.testing.assert_array_equal(value, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_state_dict_is_taken_and_given_back(family, tmp_path):
    model = ref.model(family)
    state = model.state_dict()
    if family != "llama":  # tensors of torch are checked by programs, arrays of NumPy on the host
        state = {name: tensor.numpy() for name, tensor in state.items()}
    loaded.assert_same_by_name(ref.save(model, tmp_path), state)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_format_has_the_same_weights(family, tmp_path):
    """In float32: several files of bfloat16 tensors with the Hub's names, and one file with transformers' names."""
    model = ref.model(family).bfloat16()
    short = ref.save(model, tmp_path / "short", max_shard_size="10KB", save_original_format=True)
    assert len(list(short.glob("model-*.safetensors"))) > 3
    assert read_config(short)["dtype"] == "bfloat16"
    assert_same_weights(short, ref.save(model.float(), tmp_path / "float32", save_original_format=False))


@pytest.mark.slow
@pytest.mark.xdist_group("llama")
def test_logits_of_a_bfloat16_checkpoint_in_float32_equal_transformers(tmp_path):
    model = ref.model("llama").bfloat16()
    folder = ref.save(model, tmp_path, max_shard_size="10KB")
    ids, after = prompt(17), prompt(2, 1)
    (found,) = loaded.logits(folder, [ids], [after])
    np.testing.assert_allclose(found, ref.logits(model.float(), ids, after), rtol=0, atol=1e-4)


LOCAL = {"gemma3": 2e4, "olmo3": 5e5}
"""Base of the sliding layers' rope; Olmo 3 used to have one for all layers."""


def old_style(values: dict) -> dict:
    """config.json as written by transformers 4: rope at the top level, `torch_dtype`."""
    rope = dict(values.pop("rope_parameters"))
    if FULL in rope:
        local, rope = rope[SLIDING]["rope_theta"], dict(rope[FULL])
        if local != rope["rope_theta"]:
            values["rope_local_base_freq"] = local
    values |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": values.pop("dtype")}
    partial = rope.pop("partial_rotary_factor", None)
    if partial is not None:
        values["partial_rotary_factor"] = partial
    return values | {"rope_scaling": None if rope["rope_type"] == "default" else rope}


# Gemma 4 is newer than transformers 5.
@pytest.mark.parametrize("family", [one for one in FAMILIES if one.values != ("gemma4",)])
def test_a_config_in_the_style_of_transformers_4_says_the_same(family, tmp_path):
    # For Phi-3 and Phi-MoE transformers only supports longrope.
    rope = {"rope_type": "default"} if family in ("phi3", "phimoe") else {"rope_type": "linear", "factor": 2.0}
    rope["rope_theta"] = 5e5
    if family in LOCAL:  # a rope for each kind of layers
        rope = {FULL: rope, SLIDING: {"rope_type": "default", "rope_theta": LOCAL[family]}}
    saved = ref.config(family, rope_parameters=rope)
    saved.architectures = [ARCHITECTURES[family]]
    saved.save_pretrained(tmp_path)
    new = json.loads((tmp_path / "config.json").read_text())
    old = old_style(dict(new))
    assert "rope_parameters" in new and "rope_parameters" not in old
    assert weights.parse(old) == weights.parse(new)
