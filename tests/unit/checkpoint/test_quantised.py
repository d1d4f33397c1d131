"""Test int8 loading: it gives the same bits as loading first and quantising afterwards."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import checkpoint
from support.tiny import ARCHITECTURES

from jaxinfer.checkpoint import rules
from jaxinfer.checkpoint.quantised import Int8Source
from jaxinfer.checkpoint.safetensors import SafetensorsReader
from jaxinfer.checkpoint.weight_table import Rule
from jaxinfer.errors import CheckpointError
from jaxinfer.kernels.matmul import int8_matmul
from jaxinfer.loading import weights
from jaxinfer.sharding import make_mesh

pytestmark = pytest.mark.slow

HEADS = dict(vocab_size=97, num_attention_heads=4, num_key_value_heads=2)
"""Odd vocabulary size, so that the head has padding rows on several devices."""


def write(folder: Path, family: str = "llama", **changes: object) -> Path:
    changes = HEADS | {"architectures": [ARCHITECTURES[family]]} | changes
    return checkpoint.write(folder, changes, with_tokenizer=False)


def load(folder: Path, tp: int = 1, quantization: str | None = "int8"):
    return rules.parameters(weights.load(folder, make_mesh(tp), quantization=quantization, progress=False))


@pytest.mark.parametrize(
    ("family", "tp", "tied"),
    [
        ("llama", 1, False),
        ("llama", 2, True),
        ("llama", 4, False),
        ("phi3", 1, False),
        ("phi3", 2, False),
        ("qwen2", 4, True),
    ],
)
def test_int8_weights_are_the_weights_quantised(family, tp, tied, tmp_path):
    folder = write(tmp_path, family, tie_word_embeddings=tied)
    plain, found = load(folder, tp, None), load(folder, tp)
    quantised = {path for path, param in found.items() if param.dtype == np.int8}
    matrices = {path for path, param in plain.items() if param.ndim > 1 and path.endswith("weight")}
    assert quantised == matrices - (set() if tied else {"embedding.weight"})
    assert set(found) == set(plain) | {f"{path}_scale" for path in quantised}
    for path, param in plain.items():
        values = np.asarray(param[...])
        if path in quantised:
            expected, scales = int8_matmul.quantise_weight(values, found[path].get_metadata()["block"])
            np.testing.assert_array_equal(found[f"{path}_scale"][...], scales, path)
            assert found[f"{path}_scale"].dtype == np.float32 and (scales > 0).any()
        else:
            expected = values
        np.testing.assert_array_equal(found[path][...], expected, path)
        assert found[path][...].sharding == param[...].sharding


def test_bfloat16_and_float16_are_quantised_from_their_own_values(tmp_path):
    folder = write(tmp_path, dtype="bfloat16")
    content = load_file(folder / "model.safetensors")
    for stored in (ml_dtypes.bfloat16, np.float16):
        save_file({name: value.astype(stored) for name, value in content.items()}, folder / "model.safetensors")
        found = load(folder)["head.weight"][...]
        expected, _ = int8_matmul.quantise_weight(content["lm_head.weight"].astype(stored).astype(np.float32), 32)
        np.testing.assert_array_equal(found, expected)


def test_a_weight_that_is_not_a_number_stays_one_in_its_row(tmp_path):
    folder = write(tmp_path)
    content = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    content[name][5, 7] = np.nan
    save_file(content, folder / "model.safetensors")
    for tp in (1, 2):
        scales = np.asarray(load(folder, tp)["layers.0.mlp.down.weight_scale"][...])
        assert np.flatnonzero(np.isnan(scales)).tolist() == [5]


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_a_tensor_that_is_missing_or_unknown_is_an_error_still(change, tmp_path):
    folder = write(tmp_path)
    content = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del content[name]
    else:
        name += "_scale"
        content[name] = np.ones(48, np.float32)
    save_file(content, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"'{name}'"):
        load(folder)


def test_no_rule_may_fill_the_scales(tmp_path):
    folder = write(tmp_path)
    model_family, config = weights.parse(checkpoint.CONFIG | HEADS)
    mesh = make_mesh()
    module = weights.abstract(model_family, config, np.dtype("float32"), mesh, quantization="int8")
    table = [
        Rule(r.source, "head.weight_scale" if r.target == "norm.scale" else r.target, r.parts)
        for r in model_family.weight_rules(config)
    ]
    with SafetensorsReader(folder) as reader, pytest.raises(CheckpointError, match="fills 'head.weight_scale'"):
        rules.load(module, table, reader, mesh, progress=False)


def test_any_order_of_reading_gives_the_same(tmp_path):
    """Cover partial rows, scales before values, and rows read twice."""
    folder, name = write(tmp_path), "model.layers.0.mlp.down_proj.weight"
    values, scales = int8_matmul.quantise_weight(load_file(folder / "model.safetensors")[name], 8)
    with SafetensorsReader(folder) as reader:
        source = Int8Source(reader, {name: 8})
        np.testing.assert_array_equal(source.read(name, (slice(4, 9),)), scales[4:9])
        np.testing.assert_array_equal(source.read(name, (slice(0, 20), slice(3, 17))), values[:20, 3:17])
        np.testing.assert_array_equal(source.read(name, (slice(10, 32), slice(17, 48))), values[10:, 17:])
        np.testing.assert_array_equal(source.read(name), values)
        np.testing.assert_array_equal(source.read(name, (slice(0, 32),)), scales)


def test_random_weights_are_quantised_ones():
    hf = checkpoint.CONFIG | HEADS
    plain = rules.parameters(weights.random(hf, make_mesh(1), seed=3))
    made = rules.parameters(weights.random(hf, make_mesh(1), quantization="int8", seed=3))
    quantised = [path for path, param in made.items() if param.dtype == np.int8]
    assert len(quantised) == 2 * 4 + 1
    for path in quantised:
        scales = np.asarray(made[f"{path}_scale"][...])[..., None]
        rotated = int8_matmul.rotate_weight(np.asarray(plain[path][...]), made[path].get_metadata()["block"])
        error = np.abs(np.asarray(made[path][...]) * scales - rotated)
        assert (error <= 0.5001 * scales).all()
