"""What a plan says of a step's collectives is what the compiled step has, on eight virtual devices."""

import pytest
from support.plans import CASES, compiled, on_cpu, payloads, planned

from jaxinfer.sharding import make_mesh

pytestmark = [pytest.mark.xdist_group("plan"), pytest.mark.slow]


@pytest.mark.parametrize("case", CASES)
def test_a_decode_step_has_the_collectives_of_the_plan(case: str):
    assert compiled(case, "decode", make_mesh(8)).collectives == on_cpu(planned(case, 8), "decode")


@pytest.mark.parametrize("case", ["sharded", "mlp replicated", "tied"])
def test_a_prefill_step_has_the_collectives_of_the_plan(case: str):
    assert compiled(case, "prefill", make_mesh(8)).collectives == on_cpu(planned(case, 8), "prefill")


def test_a_step_on_fewer_devices_has_them_too_and_one_on_one_device_none():
    assert compiled("sharded", "decode", make_mesh(2)).collectives == on_cpu(planned("sharded", 2), "decode")
    assert planned("sharded", 1).exchanges == ()
    assert not compiled("sharded", "decode", make_mesh(1)).collectives


def test_what_is_added_up_is_as_wide_as_the_plan_says():
    made = planned("attention replicated", 8)
    widths = [e.collective.width for e in made.exchanges if e.collective.kind == "all-reduce"]
    found = payloads(compiled("attention replicated", "decode", make_mesh(8)).executable.as_text())
    assert sorted(width for _, _, width in found) == sorted(widths)
