"""Experts of 4-bit checkpoints stay in 4 bits: those of AWQ, GPTQ and compressed-tensors, and gpt-oss's in MXFP4."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import checkpoint, experts, four_bits, loaded
from support.kept import assert_kept, parameters
from support.tiny import config, prompt

from jaxinfer.checkpoint import rules
from jaxinfer.errors import CheckpointError
from jaxinfer.loading import weights
from jaxinfer.loading.update import WeightTable
from jaxinfer.sharding import make_mesh, plan
from jaxinfer.sharding.policy import Placement

pytestmark = [pytest.mark.xdist_group("experts"), pytest.mark.slow]

FORMS = {
    "qwen3_moe awq": dict(group=16),
    "mixtral gptq": dict(group=16, symmetric=True),
    "qwen3_moe compressed-tensors": dict(group=32, dtype="bfloat16"),
}
OWN: Mapping[str, Any] = {
    "qwen3_moe": dict(moe_intermediate_size=32),
    "mixtral": dict(intermediate_size=32),
    "gpt_oss": dict(intermediate_size=96),
}
WAYS: Mapping[str, Any] = {
    "one": (1, {}),
    "sharded": (2, {}),
    "cut": (4, {}),
    "by experts": (2, {"*.mlp": "experts"}),
    "replicated": (2, {"*.mlp": "replicate"}),
}
"""Devices and placement; shards of gpt-oss cut groups: 48 or 24 columns of `down` are not a multiple of 32."""
GATE_UP, DOWN = "layers.1.mlp.gate_up.weight", "layers.1.mlp.down.weight"
GPT_OSS = json.loads((Path(__file__).parents[2] / "real/configs/gpt-oss-20b.json").read_text()) | {"dtype": "bfloat16"}
LARGE = GPT_OSS | dict(num_hidden_layers=36, num_local_experts=128, layer_types=GPT_OSS["layer_types"][:2] * 18)
"""config.json of gpt-oss-20b, and gpt-oss-120b as far as it differs."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root, made = tmp_path_factory.mktemp("experts"), {}
    for family, own in OWN.items():
        made[family] = checkpoint.write(root / family, config(family) | own, with_tokenizer=False)
    for family in experts.EACH:
        made[f"{family} each"] = experts.one_by_one(family, made[family], root / f"{family} each")
    for name, how in FORMS.items():
        family, form = name.split()
        made[name] = four_bits.quantise(made[f"{family} each"], root / name, form, **how)
    made["partly"] = four_bits.quantise(made["qwen3_moe each"], root / "partly", "awq", group=16, skip="3.up_proj")
    return made | {"gpt_oss mxfp4": experts.mxfp4(made["gpt_oss"], root / "mxfp4")}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*FORMS, "gpt_oss mxfp4"])
def test_packed_experts_are_the_dequantised_ones(name: str, way: str, folders):
    """Two projections of experts in each of two layers, and two of attention where the format has them."""
    tp, placement = WAYS[way]
    assert_kept(folders[name], tp, 4 if "mxfp4" in name else 8, placement=Placement(placement))


def test_mxfp4_takes_seventeen_bytes_for_thirty_two_weights(folders):
    found = parameters(folders["gpt_oss mxfp4"])
    values = found[DOWN].size * 2
    assert found[DOWN].dtype == found[f"{DOWN}_scale"].dtype == jnp.uint8 and f"{DOWN[:-6]}weight_zero" not in found
    assert found[DOWN].nbytes + found[f"{DOWN}_scale"].nbytes == values * 17 // 32
    content = load_file(folders["gpt_oss mxfp4"] / "model.safetensors")
    blocks, scales = (content[f"model.layers.1.mlp.experts.gate_up_proj_{part}"] for part in ("blocks", "scales"))
    for ours, theirs in ((found[GATE_UP], blocks.reshape(*blocks.shape[:2], -1)), (found[f"{GATE_UP}_scale"], scales)):
        np.testing.assert_array_equal(ours[:, 0], np.concatenate([theirs[:, ::2], theirs[:, 1::2]], axis=1))


def test_logits_are_those_of_the_dequantised_experts(folders):
    prompts, following = [prompt(20, 0), prompt(7, 1)], [prompt(3, 2), prompt(2, 3)]
    for name, tp in (("qwen3_moe awq", 1), ("gpt_oss mxfp4", 2)):
        ours = loaded.logits(folders[name], prompts, following, tp=tp)
        theirs = loaded.logits(folders[name], prompts, following, tp=tp, quantization="dequantize")
        for own, wanted in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(own, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
            assert not (own == np.roll(own, 1, axis=0)).all()


def test_a_stack_with_an_expert_that_is_not_quantised_is_dequantised(folders):
    found = parameters(folders["partly"])
    assert found[GATE_UP].dtype == jnp.float32 and found[DOWN].dtype == jnp.uint8


def test_experts_whose_shards_no_group_fits_are_dequantised():
    """24 columns over two devices are 12 a device, which are not a multiple of 8."""
    quantised = four_bits.stated("gptq", 8, True)
    hf = config("qwen3_moe") | {"moe_intermediate_size": 24, "dtype": "bfloat16", "quantization_config": quantised}
    kinds = [{row.path: row.dtype for row in plan(hf, tensor_parallel_size=tp).rows} for tp in (1, 2)]
    assert [(found[DOWN], found[GATE_UP]) for found in kinds] == [("uint8", "uint8"), ("bfloat16", "uint8")]


@pytest.mark.parametrize("quantization", ["dequantize", "int8", "mxfp4"])
def test_other_settings(quantization: str, folders):
    found = parameters(folders["gpt_oss mxfp4"], quantization=quantization)
    assert found[DOWN].dtype == {"dequantize": jnp.float32, "int8": jnp.int8, "mxfp4": jnp.uint8}[quantization]


def test_experts_in_4_bits_are_not_replaced_by_name(folders):
    program, params = loaded.load(folders["gpt_oss mxfp4"])
    name = "model.layers.1.mlp.experts.down_proj"
    with pytest.raises(CheckpointError, match=f"the update: '{name}' is kept in 4 bits.*quantization='dequantize'"):
        WeightTable(program, params).prepare({name: np.zeros((6, 96, 32), np.float32)}, partial=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda blocks, scales: (blocks, scales[:, :, :1]), r"_scales of shape \[6, 32, 1\] do not fit"),
        (lambda blocks, scales: (blocks[:, 1:], scales[:, 1:]), r"expected shape \[6, 32, 96\], found \[6, 31, 96\]"),
        (lambda blocks, scales: (blocks[:, :, :1], scales[:, :, :1]), r"\[6, 32, 96\], found \[6, 32, 32\]"),
    ],
)
def test_experts_of_other_shapes_are_named(change: Any, message: str, folders, tmp_path: Path):
    content = load_file(folders["gpt_oss mxfp4"] / "model.safetensors")
    names = [f"model.layers.0.mlp.experts.down_proj_{part}" for part in ("blocks", "scales")]
    spoilt = zip(names, change(*(content[name] for name in names)), strict=True)
    save_file(content | {name: np.ascontiguousarray(value) for name, value in spoilt}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folders["gpt_oss mxfp4"] / "config.json").read_text())
    with pytest.raises(CheckpointError, match=message):
        weights.load(tmp_path, make_mesh(), progress=False)


@pytest.mark.parametrize(("hf", "size"), [(GPT_OSS, 13_761_264_768), (LARGE, 65_248_815_744)])
def test_a_plan_has_the_bytes_of_the_published_files(hf: Mapping[str, Any], size: int):
    """`total_size` of their model.safetensors.index.json."""
    made = plan(hf)
    assert made.device_bytes == size
    kinds = {row.path.rpartition(".")[0]: row.dtype for row in made.rows if row.path.endswith(".weight")}
    assert {path for path, kind in kinds.items() if kind == "uint8"} == {path for path in kinds if ".mlp." in path} - {
        path for path in kinds if path.endswith("router")
    }


def test_gpt_oss_120b_fits_a_gpu_of_80_gigabytes():
    """With 2 GiB for steps, of the nine tenths that an engine takes, and a cache."""
    made = plan(LARGE, memory=80 * 10**9, step_bytes=2 << 30)
    assert made.tokens > 60_000
    assert plan(LARGE, memory=80 * 10**9, quantization="dequantize").tokens == 0


@pytest.mark.parametrize("name", ["qwen3_moe awq", "gpt_oss mxfp4"])
def test_a_plan_counts_what_devices_hold(name: str, folders):
    """Read from the tensors, and from config.json alone."""
    folder, tp = folders[name], 2
    module = weights.load(folder, make_mesh(tp), dtype="bfloat16", progress=False)
    held = sum(one[...].addressable_shards[0].data.nbytes for one in rules.parameters(module).values())
    assert plan(folder, dtype="bfloat16", tensor_parallel_size=tp).device_bytes == held
    hf = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    assert plan(hf, tensor_parallel_size=tp).device_bytes == held
