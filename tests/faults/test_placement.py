"""Meshes, placements and sizes that do not fit, met through `LLM`: named before a weight is read."""

import shutil
from pathlib import Path

import jax
import pytest
from support import checkpoint

from jaxinfer import LLM, SamplingParams
from jaxinfer.errors import ConfigError
from jaxinfer.loading import weights
from jaxinfer.sharding import make_mesh
from jaxinfer.sharding.policy import Placement

pytestmark = [pytest.mark.xdist_group("placed"), pytest.mark.slow]

HEADS = r"layers.0.attention: axis 'heads' of size 4 \(2 kv heads\) does not divide over mesh axis 'model' of size 3"


@pytest.fixture(scope="module")
def unreadable(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose weights raise when they are opened."""
    copy = tmp_path_factory.mktemp("unreadable")
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    (copy / "model.safetensors").write_bytes(b"no header")
    return copy


def user_mesh(**sizes: int) -> jax.sharding.Mesh:
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(mesh=user_mesh(tp=2)), "mesh: axis 'tp' of size 2 is unknown"),
        (dict(mesh=user_mesh(data=2)), "mesh: there is no axis 'model'"),
        (dict(mesh=user_mesh(data=2, model=2)), "mesh: axis 'data' of size 2 divides the images of a vision tower"),
        (dict(mesh=user_mesh(model=2), tensor_parallel_size=4), "tensor_parallel_size is 4, but axis 'model'.* size 2"),
        (dict(tensor_parallel_size=9), "tensor_parallel_size is 9, but JAX sees 8"),
        (dict(tensor_parallel_size=3), HEADS),
        (dict(mesh=user_mesh(model=3)), HEADS),
        (
            dict(
                tensor_parallel_size=3, placement={"*.attention": "replicate"}, hf_overrides={"intermediate_size": 50}
            ),
            "layers.0.mlp: projection 'gate' of 50 columns does not divide .* of size 3",
        ),
        (
            dict(placement={"*.atention": "replicate"}),
            r"placement: '\*.atention' matches no module; modules: embedding",
        ),
        (
            dict(placement={"*.mlp": "shard", "layers.0": "replicate", "layers.?.mlp": "replicate"}),
            r"placement: 'layers.0.mlp' is matched by '\*.mlp' \(shard\) and by 'layers.\?.mlp'",
        ),
        (dict(placement={"*.qkv": "shard"}), "'layers.0.attention.qkv', which is part of a module placed as a whole"),
        (dict(placement={"*": "both"}), r"placement: the tactic of '\*' is 'both'"),
        (dict(hf_overrides={"intermediate_size": 0}), "intermediate_size"),
        (dict(hf_overrides={"num_attention_heads": -4}), "num_attention_heads"),
        (dict(hf_overrides={"vocab_size": 10**15}), "vocab_size"),
        (dict(hf_overrides={"architectures": ["T5Model"]}), "'T5Model'.* not supported; supported: .*LlamaForCausalLM"),
    ],
)
def test_what_does_not_fit_is_named_before_a_weight_is_read(unreadable: Path, settings: dict, message: str):
    live = len(jax.live_arrays())
    with pytest.raises(ConfigError, match=message):
        LLM(unreadable, use_tqdm=False, **settings)
    assert len(jax.live_arrays()) <= live + 2  # a key to initialise with, never a weight


def test_a_module_runs_on_the_mesh_that_it_was_loaded_for(folder: Path):
    module = weights.load(folder, make_mesh(2), progress=False)
    with pytest.raises(
        ConfigError, match=r"are on a mesh of {'model': 2} over devices \[0, 1\], but .* {'model': 1} over"
    ):
        LLM(module)


def test_a_users_mesh_and_placement_give_the_tokens_of_one_device(make_llm, llm):
    prompts = ["hello world, the cat", "sat on", "the mat"]
    greedy = SamplingParams(temperature=0, max_tokens=12)
    expected = [output.outputs[0].token_ids for output in llm.generate(prompts, greedy, use_tqdm=False)]
    with make_llm(mesh=user_mesh(model=4), placement={"*.attention": "replicate", "head": "replicate"}) as placed:
        assert placed.config.tensor_parallel_size == 4
        found = [output.outputs[0].token_ids for output in placed.generate(prompts, greedy, use_tqdm=False)]
    assert found == expected


def test_three_devices_share_four_heads_with_padding(folder: Path, make_llm, llm):
    greedy = SamplingParams(temperature=0, max_tokens=12)
    with make_llm(tensor_parallel_size=3, pad_heads=True) as padded:
        shapes = {len(param.sharding.device_set) for param in padded._engine.runner.params}
        found = padded.generate("hello world", greedy, use_tqdm=False)[0].outputs[0].token_ids
    assert shapes == {3}
    assert found == llm.generate("hello world", greedy, use_tqdm=False)[0].outputs[0].token_ids


def test_replaced_weights_of_a_placed_model_are_never_met_in_its_cache(make_llm, llm, tmp_path: Path):
    """Prefixes computed with the old weights are forgotten, and the new ones lie as the old did."""
    other = checkpoint.write(tmp_path, seed=3, scale=4.0)
    prompt, greedy = "hello world, the cat sat on the mat", SamplingParams(temperature=0, max_tokens=12)
    placement = {"*.mlp": "replicate"}
    with make_llm(tensor_parallel_size=2, placement=placement) as placed, LLM(other, use_tqdm=False) as single:
        before = placed.generate(prompt, greedy, use_tqdm=False)[0]
        placed.update_weights(weights.load(other, make_mesh(2), progress=False, placement=Placement(placement)))
        after = placed.generate(prompt, greedy, use_tqdm=False)[0]
        assert after.num_cached_tokens == 0
        assert after.outputs[0].token_ids == single.generate(prompt, greedy, use_tqdm=False)[0].outputs[0].token_ids
        assert after.outputs[0].token_ids != before.outputs[0].token_ids
