"""Weights quantised to FP8 as they are loaded, and those that a checkpoint has in FP8 already."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import checkpoint, fp8, loaded
from support.tiny import prompt

from jaxinfer.checkpoint import rules
from jaxinfer.errors import ConfigError
from jaxinfer.kernels.matmul import fp8_matmul
from jaxinfer.loading import weights
from jaxinfer.loading.convert import convert
from jaxinfer.sharding import make_mesh, plan

CONFIG = dict(hidden_size=64, intermediate_size=96, num_attention_heads=8, num_key_value_heads=2, head_dim=16)
FP8 = jnp.float8_e4m3fn


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("fp8")
    plain = checkpoint.write(root / "plain", CONFIG, with_tokenizer=False)
    return {"plain": plain, **{form: fp8.quantise(plain, root / form, form) for form in fp8.STATED}}


def parameters(folder: Path, tp: int = 1, quantization: str | None = "fp8", **how) -> dict[str, jax.Array]:
    module = weights.load(folder, make_mesh(tp), dtype="float32", progress=False, quantization=quantization, **how)
    return {path: param[...] for path, param in rules.parameters(module).items()}


@pytest.mark.parametrize(("tp", "how"), [(1, {}), (2, {}), (4, {}), (3, {"pad_heads": True})])
def test_projections_are_quantised_a_row_at_a_time(tp: int, how: dict, folders):
    """Over any number of devices, with the scale of the whole row; heads and embeddings stay as they are."""
    found, plain = parameters(folders["plain"], tp, **how), parameters(folders["plain"], tp, None, **how)
    assert sum(array.dtype == FP8 for array in found.values()) == 8
    for path, wanted in plain.items():
        if found[path].dtype != FP8:
            np.testing.assert_array_equal(found[path], wanted)
            continue
        codes, scales = fp8_matmul.quantise(np.asarray(wanted))
        np.testing.assert_array_equal(np.asarray(found[path]).view(np.uint8), codes.view(np.uint8))
        own = np.asarray(found[f"{path}_scale"])
        groups = np.abs(np.asarray(wanted)).reshape(*own.shape, -1).max(-1) > 0
        np.testing.assert_array_equal(np.where(groups, own, 0), np.where(groups, scales[..., None], 0))
        assert found[path].sharding.spec == wanted.sharding.spec
    assert not {"embedding.weight_scale", "head.weight_scale"} & found.keys()
    made = plan(folders["plain"], quantization="fp8", dtype="float32", tensor_parallel_size=tp, **how)
    assert made.device_bytes == sum(array.addressable_shards[0].data.nbytes for array in found.values())


@pytest.mark.parametrize("form", fp8.STATED)
def test_codes_of_a_checkpoint_are_kept_where_a_row_has_one_scale(form: str, folders):
    found, kept = parameters(folders[form]), parameters(folders[form], quantization=None)
    exact = parameters(folders[form], quantization="dequantize")
    path = "layers.1.mlp.gate_up.weight"
    same = (np.asarray(found[path]).view(np.uint8) == np.asarray(kept[path]).view(np.uint8)).all()
    assert same == (form != "fp8")
    wanted = np.asarray(exact[path])
    values = np.asarray(found[path]).astype(np.float32) * np.asarray(found[f"{path}_scale"], np.float32)
    assert found[f"{path}_scale"].shape == (*wanted.shape[:-1], 1)
    assert np.abs(values - wanted).max() <= (0 if same else 2**-4 * np.abs(wanted).max())


def test_logits_are_near_those_of_the_weights_over_any_number_of_devices(folders):
    prompts, following = [prompt(20, 0), prompt(7, 1)], [prompt(3, 2), prompt(2, 3)]
    plain = loaded.logits(folders["plain"], prompts, following)
    found = [loaded.logits(folders["plain"], prompts, following, tp=tp, quantization="fp8") for tp in (1, 2)]
    for exact, *both in zip(plain, *found, strict=True):
        for own in both:
            assert 1e-2 < np.linalg.norm(own - exact) / np.linalg.norm(exact) < 0.12


def test_what_cannot_be_in_fp8_is_refused(folders, tmp_path):
    with pytest.raises(ConfigError, match="quantization is 'fp8', which converted folders do not have; .*'int8'"):
        convert(folders["plain"], tmp_path / "made", make_mesh(), quantization="fp8", progress=False)
    convert(folders["plain"], tmp_path / "made", make_mesh(), progress=False)
    with pytest.raises(ConfigError, match="quantization is 'fp8', but .*made is a converted folder, .* in float32"):
        parameters(tmp_path / "made")
    mesh = jax.make_mesh((2, 1), ("fsdp", "model"), (jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:2])
    with pytest.raises(ConfigError, match="'fp8', whose weights cannot be divided over the axis 'fsdp'.*'int8'"):
        weights.load(folders["plain"], mesh, quantization="fp8", progress=False)
