"""Weights of 4-bit and FP8 checkpoints stay as they are: their values are those that the loader dequantises to."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from support import checkpoint, four_bits, fp8, loaded
from support.kept import CODES, assert_kept, parameters
from support.tiny import prompt

from jaxinfer.checkpoint import rules
from jaxinfer.checkpoint.safetensors import SafetensorsReader
from jaxinfer.config import EngineConfig
from jaxinfer.errors import CheckpointError, ConfigError
from jaxinfer.functional import training
from jaxinfer.loading import weights
from jaxinfer.loading.convert import convert
from jaxinfer.loading.update import WeightTable
from jaxinfer.sharding import make_mesh, plan

FORMS = {
    "gptq": dict(group=16),
    "gptq symmetric": dict(group=32, symmetric=True),
    "awq": dict(group=16),
    "compressed-tensors": dict(group=16, dtype="bfloat16"),
    "compressed-tensors symmetric": dict(group=32, symmetric=True),
}
CONFIG = dict(hidden_size=64, intermediate_size=96, num_attention_heads=8, num_key_value_heads=2, head_dim=16)
"""Sizes that groups and the numbers of devices divide, with kv heads that four devices repeat."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("four-bits")
    plain = checkpoint.write(root / "plain", CONFIG, with_tokenizer=False)
    made = {name: four_bits.quantise(plain, root / name, name.split()[0], **how) for name, how in FORMS.items()}
    return {
        "plain": plain,
        "partly": four_bits.quantise(plain, root / "partly", "awq", group=16, skip="k_proj"),
        **made,
        **{f"{form} in FP8": fp8.quantise(plain, root / f"{form} in FP8", form) for form in fp8.STATED},
    }


@pytest.mark.parametrize("form", FORMS)
def test_packed_weights_are_the_dequantised_ones(form: str, folders):
    assert_kept(folders[form], 1)
    found = parameters(folders[form])
    assert ("layers.0.mlp.down.weight_zero" in found) == ("symmetric" not in form)
    assert found["layers.0.mlp.down.weight_scale"].dtype == FORMS[form].get("dtype", "float16")
    bytes_of = {path: array.nbytes for path, array in found.items() if path.startswith("layers.0.mlp.down")}
    group, stored = FORMS[form]["group"], 3 if "symmetric" not in form else 2
    assert sum(bytes_of.values()) == 64 * 96 // 2 + stored * 64 * 96 // group


@pytest.mark.parametrize("form", fp8.STATED)
def test_fp8_weights_are_the_dequantised_ones(form: str, folders):
    """Rows of a block have its scale each."""
    folder = folders[f"{form} in FP8"]
    assert_kept(folder, 1)
    found = parameters(folder)
    codes, scales = found["layers.0.mlp.down.weight"], found["layers.0.mlp.down.weight_scale"]
    with SafetensorsReader(folder) as reader:
        stored = reader.read("model.layers.0.mlp.down_proj.weight")
    np.testing.assert_array_equal(np.asarray(codes).view(np.uint8), stored.view(np.uint8))
    assert scales.shape == (64, 96 // fp8.BLOCK[1] if form == "fp8" else 1) and scales.dtype == (
        jnp.bfloat16 if form == "compressed-tensors" else jnp.float32
    )


@pytest.mark.parametrize(
    ("form", "tp", "how"),
    [
        ("awq", 2, {}),
        ("awq", 4, {}),
        ("awq", 3, {"pad_heads": True}),
        ("awq", 2, {"replicate": True}),
        ("fp8 in FP8", 4, {}),
        ("fp8 in FP8", 3, {"pad_heads": True}),
    ],
)
def test_devices_hold_their_own_part(form: str, tp: int, how: dict, folders):
    """Also with repeated kv heads, heads of padding, and replicated modules."""
    if how.get("replicate"):
        how = {"placement": weights.Placement({"layers.*.attention": "replicate"})}
    assert_kept(folders[form], tp, **how)


def test_logits_are_those_of_the_dequantised_weights(folders):
    prompts, following = [prompt(20, 0), prompt(7, 1)], [prompt(3, 2), prompt(2, 3)]
    cases = ("gptq", 1), ("compressed-tensors symmetric", 1), ("awq", 2), ("fp8 in FP8", 2), ("modelopt in FP8", 1)
    for form, tp in cases:
        ours = loaded.logits(folders[form], prompts, following, tp=tp)
        theirs = loaded.logits(folders[form], prompts, following, tp=tp, quantization="dequantize")
        for own, wanted in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(own, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
            assert not (own == np.roll(own, 1, axis=0)).all()


def test_a_fused_weight_with_a_part_that_is_not_quantised_is_dequantised(folders):
    found, plain = parameters(folders["partly"]), parameters(folders["plain"])
    assert found["layers.0.attention.qkv.weight"].dtype == jnp.float32
    assert found["layers.0.attention.out.weight"].dtype == found["layers.1.mlp.gate_up.weight"].dtype == jnp.uint8
    keys = slice(128, 160)
    whole, qkv = (one["layers.0.attention.qkv.weight"][0] for one in (plain, found))
    np.testing.assert_array_equal(qkv[keys], whole[keys])
    assert 0 < np.abs(qkv[:128] - whole[:128]).max() < 0.2


def test_groups_are_cut_where_shards_are_smaller(folders, tmp_path):
    """96 columns over two devices are 48 a device, which groups of 32 do not divide: they are kept as groups of 16."""
    folder = folders["gptq symmetric"]
    assert_kept(folder, 2)
    found = parameters(folder, 2)
    assert parameters(folders["compressed-tensors in FP8"], 2)["layers.0.mlp.down.weight_scale"].shape == (64, 2)
    assert found["layers.0.mlp.down.weight_scale"].shape == (64, 96 // 16)
    assert found["layers.0.attention.qkv.weight_scale"].shape[-1] == 64 // 32


def test_packed_weights_are_not_trained(folders):
    module = weights.load(folders["awq"], make_mesh(), progress=False)
    with pytest.raises(ConfigError, match="are codes.*quantization='dequantize'"):
        training.prepare(module)
    with pytest.raises(ConfigError, match="are codes, which have no gradients"):
        training.prepare(weights.load(folders["fp8 in FP8"], make_mesh(), progress=False))
    training.prepare(weights.load(folders["awq"], make_mesh(), progress=False, quantization="dequantize"))


@pytest.mark.parametrize(("group", "kept"), [(-1, True), (32, False)])
def test_the_order_of_columns_matters_only_with_several_groups(group: int, kept: bool):
    quantised = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": True}
    made = plan(checkpoint.CONFIG | CONFIG | {"dtype": "bfloat16", "quantization_config": quantised})
    assert ("uint8" in {row.dtype for row in made.rows}) == kept


@pytest.mark.parametrize(
    ("form", "how"),
    [
        ("compressed-tensors", dict()),
        ("compressed-tensors", dict(tensor_parallel_size=2)),
        ("compressed-tensors", dict(quantization="dequantize")),
        ("fp8 in FP8", dict(tensor_parallel_size=2)),
        ("compressed-tensors in FP8", dict()),
        ("modelopt in FP8", dict(quantization="modelopt")),
    ],
)
def test_the_plan_counts_packed_bytes(form: str, how: dict, folders, tmp_path):
    """Read from the tensors, and from config.json alone as for a model that is not fetched yet."""
    folder = folders[form]
    mesh, kept = make_mesh(how.get("tensor_parallel_size", 1)), how.get("quantization") != "dequantize"
    module = weights.load(folder, mesh, dtype="bfloat16", progress=False, quantization=how.get("quantization"))
    found = rules.parameters(module).values()
    held = sum(array[...].addressable_shards[0].data.nbytes for array in found)
    made = plan(folder, dtype="bfloat16", **how)
    assert made.device_bytes == held
    assert any(row.dtype in map(np.dtype, CODES) for row in made.rows) == kept
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"})
    )
    assert plan(tmp_path, **how).device_bytes == held


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ("gptq", r"quantization is 'gptq', but the checkpoint is quantised with 'awq' \(quantization_config\)"),
        (
            "fp4",
            "None or int8, fp8, dequantize, awq, gptq, compressed-tensors, modelopt, mxfp4, got 'fp4'",
        ),
    ],
)
def test_other_formats_are_refused(quantization: str, message: str, folders):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(quantization=quantization)
        weights.load(folders["awq"], make_mesh(), quantization=quantization)
    with pytest.raises(ConfigError, match="quantization is 'awq', but the checkpoint has no quantised weights"):
        weights.load(folders["plain"], make_mesh(), quantization="awq")
    assert parameters(folders["awq"], quantization="awq").keys() == parameters(folders["awq"]).keys()


def test_other_quantisations_apply_to_the_dequantised_values(folders):
    found = parameters(folders["awq"], quantization="int8")
    assert found["layers.0.mlp.down.weight"].dtype == jnp.int8
    assert parameters(folders["awq"], quantization="dequantize")["layers.0.mlp.down.weight"].dtype == jnp.float32


@pytest.mark.parametrize(("form", "bits"), [("awq", 4), ("fp8 in FP8", 8)])
def test_packed_weights_are_not_replaced_or_returned_by_name(form: str, bits: int, folders):
    program, params = loaded.load(folders[form])
    table = WeightTable(program, params)
    name = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(CheckpointError, match=f"'{name}' is kept in {bits} bits.*quantization='dequantize'"):
        table.prepare({name: np.zeros((64, 96), np.float32)}, partial=True)
    with pytest.raises(ConfigError, match=f"'layers.0.attention.out.weight' and others are in {bits} bits; .*'jax"):
        next(iter(table.tensors(params)))
    norm = {"model.norm.weight": np.full(64, 2, np.float32)}
    changed = list(params)
    table.apply(table.prepare(norm, partial=True), changed)
    assert sum(new is not old for new, old in zip(changed, params, strict=True)) == 1
    state = table.state(params)
    table.apply(table.prepare(state), changed)
    for new, old in zip(changed, params, strict=True):
        np.testing.assert_array_equal(new, old)


def test_a_converted_folder_has_the_dequantised_weights(folders, tmp_path):
    convert(folders["awq"], tmp_path / "made", make_mesh(), progress=False)
    found, expected = parameters(tmp_path / "made"), parameters(folders["awq"], quantization="dequantize")
    for path, wanted in expected.items():
        np.testing.assert_array_equal(found[path], wanted)
    again = parameters(tmp_path / "made", quantization="dequantize")
    assert again.keys() == found.keys()
    with pytest.raises(ConfigError, match="quantization is 'awq', but .*made is a converted folder, .* in float32"):
        parameters(tmp_path / "made", quantization="awq")
    assert plan(tmp_path / "made").device_bytes == sum(array.nbytes for array in found.values())
