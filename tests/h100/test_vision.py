"""InternVL's encoder compiled for H100s with none present: the collectives of the plan, attention without scores."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support import internvl
from support.lowering import abstract_model, collectives, compile_lowered, h100_mesh, require_cuda_compiler
from support.plans import on_gpu

from jaxinfer import functional
from jaxinfer.engine.runner.encode_steps import encode_step
from jaxinfer.loading import weights
from jaxinfer.sharding import placement
from jaxinfer.sharding.collectives import ENCODE
from jaxinfer.sharding.policy import Placement

pytestmark = [pytest.mark.xdist_group("h100"), pytest.mark.usefixtures("cuda_compiler"), pytest.mark.slow]


@pytest.fixture(scope="module")
def cuda_compiler() -> None:
    require_cuda_compiler()


@pytest.mark.parametrize(
    ("patterns", "reduces"), [({}, 7), ({"vision_tower.*.attention": "replicate"}, 3), ({"*": "replicate"}, 0)]
)
def test_encoding_has_the_collectives_of_the_plan(patterns: Mapping[str, str], reduces: int):
    vision = dict(use_qk_norm=True, hidden_size=128, intermediate_size=256, norm_type="rms_norm")
    hf = internvl.config(vision=vision, text={"num_attention_heads": 8}, dtype="bfloat16")
    mesh = h100_mesh(8)
    program, params = abstract_model(hf, mesh, placement=Placement(patterns))
    whole = NamedSharding(mesh, PartitionSpec())
    pixels = jax.ShapeDtypeStruct((3, *program.features.shape), jnp.bfloat16, sharding=whole)
    compiled = jax.jit(functional.encode, static_argnums=0).lower(program, params, pixels).compile()
    found = collectives(compiled.as_text())
    module = weights.abstract(*weights.parse(hf), jnp.dtype("bfloat16"), mesh, placement=Placement(patterns))
    assert found == on_gpu(placement.plan(module, mesh, itemsize=2), ENCODE)
    assert found == ({"all-reduce": reduces} if reduces else {})


TILES = 12
INTERNVIT = dict(
    hidden_size=1024, intermediate_size=4096, num_attention_heads=16, image_size=[448, 448], patch_size=[14, 14]
)
"""InternViT-300M with two layers."""


def test_tiles_attend_without_scores_and_loops():
    """Scores of 12 tiles of 1025 tokens would take 807 MB."""
    mesh = h100_mesh(1)
    hf = internvl.config(INTERNVIT, {"num_attention_heads": 8}, dtype="bfloat16", image_seq_length=256)
    program, params = abstract_model(hf, mesh)
    array = partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
    assert program.features.shape == (3, 448, 448)
    pool = array((2 * TILES * program.features.rows, program.feature_width), jnp.bfloat16)
    inputs = array((TILES, *program.features.shape), jnp.bfloat16), array((TILES,), jnp.int32)
    compiled = compile_lowered(
        jax.jit(partial(encode_step, program), donate_argnums=1).lower(params, pool, *inputs), [pool]
    )
    assert compiled.launched_alone == [] and compiled.command_buffers == 1 and "kWhile" not in compiled.thunks
    assert compiled.kernels.count("attend") == 2
    assert compiled.temporary_bytes < 200 << 20
