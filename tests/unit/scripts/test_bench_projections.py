"""`scripts/bench.py projections` on toys: what is one product and what is several, and what the figures are made of."""

from collections.abc import Callable

import numpy as np
import pytest
from benchmarks import calls, projections
from benchmarks.projections import APART, FUSED, UNFUSED, Bench
from support.lowering import require_cuda_compiler

from jaxinfer.kernels.matmul import choose as matmul
from jaxinfer.sharding import make_mesh

pytestmark = pytest.mark.xdist_group("bench")

TOYS = {name: projections.smaller(projections.smaller(group)) for name, group in projections.GROUPS.items()}
M = 4


@pytest.fixture(autouse=True)
def two_copies(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(calls, "copies_of", lambda size, rows: 2)


@pytest.mark.parametrize(("name", "apart", "fused"), [("kda", 8, 2), ("qkv", 3, 1)])
def test_products_are_as_many_as_the_variant_says(name: str, apart: int, fused: int):
    bench = Bench(TOYS[name], make_mesh(1), "float32", matmul.XLA)
    made = {variant: bench.calls(variant, M) for variant in (UNFUSED, FUSED, APART)}
    assert [made[variant].products for variant in (UNFUSED, FUSED, APART)] == [apart, fused, apart]
    # Each call has weights of its own, and the variants have as many.
    assert len({sum(leaf.size for own in one.arguments[1] for leaf in own) for one in made.values()}) == 1
    first, second = made[FUSED].arguments[1]
    assert not np.array_equal(first[-1], second[-1])


def test_shapes_are_those_of_the_source():
    kda = projections.GROUPS["kda"]
    assert str(kda) == "2304 -> 1024, 1024, 1024, 8, 128, 128; 128 -> 1024, 1024"
    assert projections.PUBLISHED["unfused_ms@kda_m8192"] == 1.03
    found = projections.published({"unfused_ms@kda_m4096": 1.0, "fused_ms@kda_m4096": 1.0})
    assert found["unfused_over_fused@kda_m4096"] == 0.57 / 0.50 and "fused_ms@kda_m8192" not in found
    assert found["unfused_over_fused@kda_decode"] == pytest.approx(38.8 / 11.7)


def test_ratios_are_those_within_a_round(monkeypatch: pytest.MonkeyPatch):
    found = {UNFUSED: [6.0, 4.0], FUSED: [2.0, 2.0], APART: [3.0, 1.0]}
    monkeypatch.setattr(projections, "in_turns", lambda runs, repeats, seconds: dict(found))
    bench = Bench(TOYS["qkv"], make_mesh(1), "float32", matmul.XLA)
    figures = bench.measure(M, 2)
    assert [figures[f"{variant}_ms"] for variant in (UNFUSED, FUSED, APART)] == [5000, 2000, 2000]
    assert [figures[f"unfused_over_fused{kind}"] for kind in ("", "_q25", "_q75")] == [2.5, 2.25, 2.75]
    assert figures["apart_over_fused"] == 1.0


@pytest.mark.slow
def test_the_report_has_every_variant_and_the_source_beside(
    result: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(projections, "GROUPS", TOYS)
    monkeypatch.setattr(calls, "PASS", 0.0)
    monkeypatch.setattr(projections, "SECONDS", 0.0)
    found = result("projections", "kda", "--m", "1", str(M), "--repeats=1", "--checkpoint-dtype=float32")
    figures = found["jaxinfer"]
    for m in (1, M):
        assert all(figures[f"{variant}_ms@kda_m{m}"] > 0 for variant in (UNFUSED, FUSED, APART))
    assert figures["least_unfused_over_fused"] == min(figures[f"unfused_over_fused@kda_m{m}"] for m in (1, M))
    assert found["peers"][projections.SOURCE]["fused_ms@kda_decode"] == 0.0117
    assert found["work"]["shape@kda"] == str(TOYS["kda"])


@pytest.mark.slow
def test_fewer_kernels_are_launched_where_projections_are_fused():
    require_cuda_compiler()
    found = projections.h100()
    # Six products of a KDA layer are one, and two are one batched one, in three layers; three of MLA and MLP are one
    # each.
    assert found["apart_products@h100_decode"] - found["fused_products@h100_decode"] >= 3 * (5 + 1)
    assert found["fused_kernels@h100_decode"] < found["apart_kernels@h100_decode"]
