"""What a plan says of a step's collectives is what the program for eight H100s has, compiled with none present."""

from collections.abc import Mapping

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support import internvl
from support.lowering import abstract_model, collectives, h100_mesh, require_cuda_compiler
from support.plans import CASES, compiled, on_gpu, payloads, planned

from jaxinfer import functional
from jaxinfer.sharding import plan
from jaxinfer.sharding.policy import Placement

pytestmark = [pytest.mark.xdist_group("h100"), pytest.mark.usefixtures("cuda_compiler")]


@pytest.fixture(scope="module")
def cuda_compiler() -> None:
    require_cuda_compiler()


ELSEWHERE = ("all replicated", "int8", "tied")
"""Cases that `test_steps`, or the case "tied, int8", compiles for an H100 as well; `tests/equivalence/test_plan.py` has
all of them on a CPU."""


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in ELSEWHERE])
def test_a_decode_step_has_the_collectives_of_the_plan(case: str):
    assert compiled(case, "decode", h100_mesh(8)).collectives == on_gpu(planned(case, 8), "decode")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sharded", "attention replicated"])
def test_a_prefill_step_has_the_collectives_of_the_plan(case: str):
    assert compiled(case, "prefill", h100_mesh(8)).collectives == on_gpu(planned(case, 8), "prefill")


@pytest.mark.slow
@pytest.mark.parametrize(
    "placement", [{}, {"vision_tower.*.attention": "replicate"}], ids=["sharded", "attention replicated"]
)
def test_a_vision_tower_has_the_collectives_of_the_plan(placement: Mapping[str, str]):
    vision = {"use_qk_norm": True, "hidden_size": 512}  # heads of 64: XLA's GEMMs find no tiles for heads of 4
    hf = internvl.config(vision=vision, text={"num_attention_heads": 8}, dtype="bfloat16")
    mesh = h100_mesh(8)
    program, params = abstract_model(hf, mesh, placement=Placement(placement))
    whole = NamedSharding(mesh, PartitionSpec())
    tiles = jax.ShapeDtypeStruct(internvl.tiles(2).shape, "float32", sharding=whole)
    text = jax.jit(functional.encode, static_argnums=0).lower(program, params, tiles).compile().as_text()
    assert collectives(text) == on_gpu(plan(hf, tensor_parallel_size=8, placement=placement), "encode")


@pytest.mark.slow
def test_what_is_added_up_has_the_bytes_of_the_plan():
    made = planned("mlp replicated", 8)
    found = payloads(compiled("mlp replicated", "decode", h100_mesh(8)).executable.as_text())
    assert {kind for kind, _, _ in found} == {"bf16"}
    token = sum(e.row_bytes for e in made.exchanges if e.collective.kind == "all-reduce")
    assert sum(2 * width for _, _, width in found) == token
