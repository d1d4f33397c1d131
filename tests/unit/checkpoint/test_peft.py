"""Reading adapters as PEFT saves them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxinfer.checkpoint import peft
from jaxinfer.errors import CheckpointError

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj"], "lora_dropout": 0.1}
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.10.self_attn.v_proj"


def tensors(rank: int = 2, prefix: str = "base_model.model.", adapter: str = "", module: str = Q) -> dict[str, Any]:
    where = f"{prefix}{module}.lora_"
    return {
        f"{where}A{adapter}.weight": np.ones((rank, 6), np.float32),
        f"{where}B{adapter}.weight": np.full((4, rank), 0.5, np.float32),
    }


def write(folder: Path, config: dict[str, Any] = CONFIG, **files: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(files.get("tensors", tensors()), folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("form", [{}, {"adapter": ".default"}, {"prefix": ""}, {"prefix": "module.base_model.model."}])
def test_a_folder_and_its_tensors_are_the_same_adapter(tmp_path: Path, form: dict[str, str]):
    made = tensors(**form)
    for found in (peft.read(write(tmp_path, tensors=made), None, "it"), peft.read(made, CONFIG, "it")):
        assert list(found) == [Q] and found[Q].rank == 2 and found[Q].scale == 4.0
        assert found[Q].a.shape == (2, 6) and found[Q].b.shape == (4, 2)


@pytest.mark.parametrize(
    ("fields", "scales"),
    [
        ({}, (4.0, 4.0)),
        ({"use_rslora": True}, (8 / 2**0.5, 8 / 2**0.5)),
        ({"alpha_pattern": {"v_proj": 6}}, (4.0, 3.0)),
        ({"alpha_pattern": {r"^model.layers.\d+.self_attn.q_proj": 2, "self_attn.v_proj": 1}}, (1.0, 0.5)),
        ({"alpha_pattern": {"proj": 6, "layers.0.self_attn.v_proj": 6}}, (4.0, 4.0)),
    ],
)
def test_scales_are_those_of_peft(fields: dict[str, Any], scales: tuple[float, float]):
    found = peft.read(tensors() | tensors(module=V), CONFIG | fields, "it")
    assert (found[Q].scale, found[V].scale) == pytest.approx(scales)


def test_ranks_differ_by_module():
    found = peft.read(
        tensors() | tensors(rank=3, module=V), CONFIG | {"rank_pattern": {"10.self_attn.v_proj": 3}}, "it"
    )
    assert (found[V].rank, found[V].scale) == (3, pytest.approx(8 / 3))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_parameters": ["experts.down_proj"]}, "adapters of experts"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"a_new_field": 3}, "a_new_field = 3"),
        ({"r": 0}, "r must be a positive integer"),
        ({"lora_alpha": "8"}, "lora_alpha must be a positive number"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern"),
        ({"alpha_pattern": {"(a+)+": 2}}, "without repeated groups"),
        ({"alpha_pattern": {"(": 2}}, "alpha_pattern has the pattern"),
        ({"r": 4}, "says rank 4"),
    ],
)
def test_unsupported_configurations_are_named(fields: dict[str, Any], said: str):
    with pytest.raises(CheckpointError, match="it: ") as caught:
        peft.read(tensors(), CONFIG | fields, "it")
    assert said in str(caught.value)


def test_unsupported_tensors_are_named(tmp_path: Path):
    one, nan = tensors(), tensors()
    nan[f"base_model.model.{Q}.lora_B.weight"][1, 1] = np.nan
    embedding = "base_model.model.model.embed_tokens.lora_embedding_A"
    for given, said in (
        (one | {embedding: np.ones((2, 2), np.float32)}, embedding),
        ({name: value for name, value in one.items() if "lora_A" in name}, "has lora_A and no lora_B"),
        (nan, "lora_B.weight': expected finite values, found 1"),
        (one | tensors(adapter=".other"), "two tensors are lora_A"),
        ({}, "no tensors"),
    ):
        with pytest.raises(CheckpointError) as caught:
            peft.read(given, CONFIG, "it")
        assert said in str(caught.value), said
    for given, config in ((one, None), (3, None), (tmp_path, CONFIG)):
        with pytest.raises(TypeError):
            peft.read(given, config, "it")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        peft.read(tmp_path, None, "it")
