"""Test loading of experts: per-expert, stacked and gpt-oss layouts, int8, and converted folders give the same
weights.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from support import checkpoint
from support.experts import EACH, one_by_one
from support.memory import MemorySource
from support.tiny import config

from jaxinfer.checkpoint import rules
from jaxinfer.checkpoint.gpt_oss_weights import InterleavedExperts
from jaxinfer.checkpoint.packed import matrix
from jaxinfer.checkpoint.quantised import Int8Source
from jaxinfer.checkpoint.weight_table import Rule
from jaxinfer.errors import CheckpointError, ConfigError
from jaxinfer.kernels.matmul import int8_matmul
from jaxinfer.loading import convert, weights
from jaxinfer.sharding import make_mesh
from jaxinfer.sharding.policy import Placement

pytestmark = [pytest.mark.xdist_group("experts"), pytest.mark.slow]

HF = {family: config(family) | {"num_hidden_layers": 1} for family in EACH}
WAYS: Mapping[str, Any] = {
    "one": (1, {}),
    "sharded": (4, {}),
    "by experts": (2, {"*.mlp": "experts"}),
    "replicated": (2, {"*.mlp": "replicate"}),
}


@pytest.fixture(scope="module")
def stacked(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Return a checkpoint of each family with stacked experts."""
    return {
        family: checkpoint.write(tmp_path_factory.mktemp(family), HF[family], with_tokenizer=False) for family in EACH
    }


def load(folder: Path, way: str, quantization: str | None = None) -> dict[str, nnx.Param]:
    tp, placement = WAYS[way]
    how = dict(quantization=quantization, placement=Placement(placement), progress=False)
    return rules.parameters(weights.load(folder, make_mesh(tp), **how))


def assert_same(found: Mapping[str, nnx.Param], expected: Mapping[str, nnx.Param]) -> None:
    assert found.keys() == expected.keys()
    for path, param in expected.items():
        ours, theirs = found[path].get_value(), param.get_value()
        assert (ours.dtype, ours.shape, ours.sharding) == (theirs.dtype, theirs.shape, theirs.sharding), path
        np.testing.assert_array_equal(ours, theirs, path)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", EACH)
def test_one_by_one_they_are_what_they_are_in_stacks(family: str, way: str, stacked, tmp_path: Path):
    each = one_by_one(family, stacked[family], tmp_path / "each")
    assert_same(load(each, way), load(stacked[family], way))
    assert_same(load(each, way, "int8"), load(stacked[family], way, "int8"))


@pytest.mark.parametrize("way", WAYS)
def test_each_device_holds_its_part_of_every_expert_or_all_of_its_own(way: str, stacked):
    (tp, _), name = WAYS[way], "model.layers.0.mlp.experts."
    params, content = load(stacked["qwen3_moe"], way), load_file(stacked["qwen3_moe"] / "model.safetensors")
    gate, up = np.split(content[name + "gate_up_proj"], 2, axis=1)
    down, experts, ffn = content[name + "down_proj"], gate.shape[0], gate.shape[1]
    for device in range(tp):
        own, part = slice(None), slice(None)
        if way == "by experts":
            own = slice(device * experts // tp, (device + 1) * experts // tp)
        elif way == "sharded":
            part = slice(device * ffn // tp, (device + 1) * ffn // tp)
        held = {path: params[f"layers.0.mlp.{path}.weight"].get_value() for path in ("gate_up", "down")}
        shards = {
            path: next(np.asarray(s.data) for s in value.addressable_shards if s.device.id == device)
            for path, value in held.items()
        }
        np.testing.assert_array_equal(shards["gate_up"][:, 0], np.concatenate([gate[own, part], up[own, part]], axis=1))
        np.testing.assert_array_equal(shards["down"], down[own][..., part])


@pytest.mark.parametrize("way", ["one", "by experts"])
def test_int8_is_each_experts_rows_quantised(way: str, stacked):
    plain, found = load(stacked["mixtral"], way), load(stacked["mixtral"], way, "int8")
    for path in ("layers.0.mlp.gate_up.weight", "layers.0.mlp.down.weight"):
        values, scales = int8_matmul.quantise_weight(np.asarray(plain[path][...]), found[path].get_metadata()["block"])
        np.testing.assert_array_equal(found[path][...], values)
        np.testing.assert_array_equal(found[f"{path}_scale"][...], scales)
    assert found["layers.0.mlp.router.weight"].dtype == np.float32


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("sharded", "one"),
        ("one", "sharded"),
        ("by experts", "sharded"),
        ("sharded", "by experts"),
        ("by experts", "by experts"),
    ],
)
def test_a_converted_folder_gives_them_back_laid_out_otherwise(before, after, quantization, stacked, tmp_path: Path):
    tp, placement = WAYS[before]
    out, source = tmp_path / "out", stacked["qwen3_moe"]
    how = dict(placement=Placement(placement), quantization=quantization, progress=False)
    convert.convert(source, out, make_mesh(tp), **how)
    if after != before:
        placement = WAYS[after][1] or {"*.mlp": "shard"}
        found = weights.load(out, make_mesh(WAYS[after][0]), placement=Placement(placement), progress=False)
    else:
        found = weights.load(out, make_mesh(tp), progress=False)
    assert_same(rules.parameters(found), load(source, after, quantization))


def spoilt(source: Path, folder: Path, change: Any) -> Path:
    made = one_by_one("qwen3_moe", source, folder)
    content = load_file(made / "model.safetensors")
    change(content, "model.layers.0.mlp.experts.")
    save_file(content, made / "model.safetensors")
    return made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c, name: c.pop(f"{name}3.up_proj.weight"),
            r"lacks 1 tensor.*'model.layers.0.mlp.experts.3.up_proj.weight'",
        ),
        (
            lambda c, name: c.update({f"{name}8.up_proj.weight": c[f"{name}3.up_proj.weight"]}),
            r"1 tensor.* not know: .*8.up_proj",
        ),
        (
            lambda c, name: c.update({f"{name}0.down_proj.weight": np.zeros((3, 3), np.float32)}),
            r"experts.0.down_proj.weight': expected shape \[32, 24\], found \[3, 3\]",
        ),
        (
            lambda c, name: c.update({f"{name}down_proj": np.zeros((8, 32, 24), np.float32)}),
            r"8 tensor\(s\) this model does not know",
        ),
        (lambda c, name: c.pop("model.layers.0.mlp.gate.weight"), r"lacks 1 tensor.*'model.layers.0.mlp.gate.weight'"),
    ],
)
def test_what_is_missing_extra_or_misshaped_is_named(change, message: str, stacked, tmp_path: Path):
    with pytest.raises(CheckpointError, match=message):
        load(spoilt(stacked["qwen3_moe"], tmp_path / "spoilt", change), "one")


def test_a_stack_of_another_number_of_experts_is_named(stacked, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(HF["qwen3_moe"] | {"num_experts": 4}))
    (tmp_path / "model.safetensors").symlink_to(stacked["qwen3_moe"] / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'model.layers.0.mlp.(experts|gate).*expected shape \[4, .*found \[8, "):
        load(tmp_path, "one")


def test_a_table_that_fills_a_stack_twice_or_not_wholly_is_refused(stacked):
    family, parsed = weights.parse(HF["qwen3_moe"])
    wanted = rules.parameters(weights.abstract(family, parsed, np.dtype("float32"), make_mesh()))
    content, target = load_file(stacked["qwen3_moe"] / "model.safetensors"), "layers.0.mlp.down.weight"
    shape = content["model.layers.0.mlp.experts.down_proj"].shape[1:]
    for more in ({}, {"x": Rule("x", target, index=0)}):
        table = [rule for rule in family.weight_rules(parsed) if more or rule.target != target] + list(more.values())
        held = {name: value for name, value in content.items() if more or "experts.down_proj" not in name}
        source = MemorySource(held | {name: np.zeros(shape, np.float32) for name in more})
        with pytest.raises(CheckpointError, match=f"fills '{target}' from .*, not wholly or not once"):
            rules.plan(wanted, table, source)


EXPERTS, WIDTH, FFN = 3, 64, 32
NAME = "m.experts."


def gpt_oss(packed: bool) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return a checkpoint of gpt-oss experts, and its values as stacks of `[out, in]`, gate rows before up rows."""
    rng, kept, plain = np.random.default_rng(0), {}, {}
    for name, out, inner in (("gate_up_proj", 2 * FFN, WIDTH), ("down_proj", WIDTH, FFN)):
        if packed:
            nibbles = rng.integers(0, 16, (EXPERTS, out, inner)).astype(np.uint8)
            scales = rng.integers(115, 133, (EXPERTS, out, inner // 32)).astype(np.uint8)
            pairs = nibbles.reshape(EXPERTS, out, inner // 32, 16, 2)
            kept |= {f"{NAME}{name}_blocks": pairs[..., 0] | pairs[..., 1] << 4, f"{NAME}{name}_scales": scales}
            sizes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[nibbles & 7]
            values = np.where(nibbles & 8, -sizes, sizes) * np.repeat(2.0 ** (scales.astype(int) - 127), 32, axis=-1)
        else:
            values = rng.standard_normal((EXPERTS, out, inner)).astype(ml_dtypes.bfloat16)
            kept[NAME + name] = np.ascontiguousarray(values.swapaxes(1, 2))
        bias = rng.standard_normal((EXPERTS, out)).astype(np.float32)
        kept[f"{NAME}{name}_bias"] = bias
        for key, value in (("", values), ("_bias", bias)):
            turned = (
                np.concatenate([value[:, ::2], value[:, 1::2]], axis=1) if out == 2 * FFN and "gate" in name else value
            )
            plain[NAME + name + key] = turned.astype(np.float32)
    return kept | {"m.router.weight": np.ones((EXPERTS, WIDTH), np.float32)}, plain


@pytest.mark.parametrize("packed", [False, True], ids=["bfloat16", "mxfp4"])
def test_gpt_oss_experts_are_read_as_stacks_of_rows(packed: bool):
    kept, plain = gpt_oss(packed)
    source = InterleavedExperts(MemorySource(kept))
    assert sorted(source.names()) == sorted([*plain, "m.router.weight"])
    np.testing.assert_array_equal(source.read("m.router.weight"), 1)
    for name, value in plain.items():
        assert source.info(name).shape == value.shape
        np.testing.assert_array_equal(source.read(name).astype(np.float32), value)
        rng = np.random.default_rng(1)
        for _ in range(20):
            part = tuple(slice(*sorted(rng.integers(0, size + 1, 2).tolist())) for size in value.shape)
            np.testing.assert_array_equal(source.read(name, part).astype(np.float32), value[part], str(part))


def test_mxfp4_is_quantised_to_int8_from_its_own_numbers():
    kept, plain = gpt_oss(packed=True)
    name = f"{NAME}gate_up_proj"
    source = Int8Source(InterleavedExperts(MemorySource(kept)), {name: 16})
    values, scales = int8_matmul.quantise_weight(plain[name], 16)
    np.testing.assert_array_equal(source.read(name, (slice(1, 2), slice(3, 9))), scales[1:2, 3:9])
    np.testing.assert_array_equal(source.read(name, (slice(1, 2), slice(3, 40), slice(5, 50))), values[1:2, 3:40, 5:50])


def test_mxfp4_is_what_transformers_makes_of_it():
    torch = pytest.importorskip("torch", reason="the reference; it comes with the extra `test`")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    kept, plain = gpt_oss(packed=True)
    blocks, scales = (torch.tensor(kept[f"{NAME}down_proj_{kind}"]) for kind in ("blocks", "scales"))
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)  # [E, in, out]
    np.testing.assert_array_equal(theirs.transpose(1, 2).numpy(), plain[f"{NAME}down_proj"])


def test_blocks_and_scales_that_do_not_fit_are_named():
    kept, _ = gpt_oss(packed=True)
    kept[f"{NAME}down_proj_scales"] = kept[f"{NAME}down_proj_scales"][:, 1:]
    source = InterleavedExperts(MemorySource(kept))
    with pytest.raises(
        CheckpointError, match=r"down_proj_blocks of shape .* and m.experts.down_proj_scales .* do not fit"
    ):
        source.info(f"{NAME}down_proj")
    del kept[f"{NAME}gate_up_proj_scales"]
    assert f"{NAME}gate_up_proj_blocks" in InterleavedExperts(MemorySource(kept)).names(), (
        "left for the table to refuse"
    )


def test_mxfp4_of_a_family_that_does_not_read_it_is_refused(tmp_path: Path):
    for family in EACH:
        (tmp_path / "config.json").write_text(
            json.dumps(HF[family] | {"quantization_config": {"quant_method": "mxfp4"}})
        )
        with pytest.raises(ConfigError, match="quantization_config"):
            load(tmp_path, "one")


def test_the_sixteen_numbers_of_four_bits():
    expected = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert matrix.SIGNED_E2M1.tolist() == [*expected, *[-value for value in expected]]
    assert matrix.E2M1_PAIRS[0x2A].tolist() == [-1.0, 1.0], "the lower half of a byte comes first"
