"""InternVL's vision tower sharded, replicated, mixed and data-parallel gives the same as on one device."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from support import internvl
from support.lowering import collectives
from support.plans import on_cpu

from jaxinfer import functional
from jaxinfer.functional import Program
from jaxinfer.loading import weights
from jaxinfer.sharding import axes, placement
from jaxinfer.sharding.collectives import DECODE, ENCODE
from jaxinfer.sharding.policy import Placement

pytestmark = pytest.mark.xdist_group("internvl")

TILES = 3
"""Number of tiles per call: not divisible by the axis `data`."""


@dataclass(frozen=True)
class Case:
    """A mesh and a placement."""

    model: int
    data: int | None = None
    patterns: Mapping[str, str] = field(default_factory=dict)
    heads: int = 8
    pad_heads: bool = False
    expected: Mapping[str, int] = field(default_factory=dict)
    """Collectives of the program for two layers: four or six all-reduces of the tower, one of the projector."""

    @property
    def mesh(self) -> Mesh:
        """Mesh of virtual devices."""
        sizes = {axes.MODEL: self.model} if self.data is None else {axes.DATA: self.data, axes.MODEL: self.model}
        count = int(np.prod(list(sizes.values())))
        kinds = (AxisType.Auto,) * len(sizes)
        return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=jax.devices()[:count])


ATTENTION, TOWER, ALL = (
    dict.fromkeys(patterns, "replicate")
    for patterns in (["vision_tower.*.attention"], ["vision_tower"], ["vision_tower", "projector"])
)

CASES = {
    "sharded": Case(8, expected={"all-reduce": 7}),
    "sharded over two": Case(2, expected={"all-reduce": 7}),
    "attention replicated, mlp sharded": Case(8, patterns=ATTENTION, expected={"all-reduce": 3}),
    "mlp replicated": Case(8, patterns={"vision_tower.*.mlp": "replicate"}, expected={"all-reduce": 5}),
    "tower replicated": Case(8, patterns=TOWER, expected={"all-reduce": 1}),
    "all replicated": Case(8, patterns=ALL),
    "over images": Case(1, 8, expected={"all-gather": 1}),
    "over images, replicated over model": Case(2, 4, ALL, expected={"all-gather": 1}),
    "over images, sharded over model": Case(4, 2, expected={"all-reduce": 7, "all-gather": 1}),
    "heads of zeroes": Case(8, heads=4, pad_heads=True, expected={"all-reduce": 7}),
}


def config(heads: int) -> dict:
    """A tower with everything that is hard to shard: q and k norms over the whole width, biases."""
    vision = dict(use_qk_norm=True, attention_bias=True, num_attention_heads=heads)
    return internvl.config(vision=vision, text={"num_attention_heads": 8})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    return cache(lambda heads: internvl.write(tmp_path_factory.mktemp("vision"), config(heads)))


_encode = jax.jit(functional.encode, static_argnums=0)


def load(saved: Path, case: Case) -> tuple[Program, list[jax.Array]]:
    how = dict(placement=Placement(case.patterns), pad_heads=case.pad_heads)
    return functional.split(weights.load(saved, case.mesh, progress=False, **how), case.mesh)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_each_placement_is_single_and_has_the_collectives_of_the_plan(name, folder):
    case = CASES[name]
    saved = folder(case.heads)
    program, params = load(saved, case)
    pixels = internvl.tiles(TILES)
    compiled = _encode.lower(program, params, pixels).compile()
    one, whole = load(saved, Case(1))
    found = np.asarray(compiled(params, pixels))
    np.testing.assert_allclose(found, np.asarray(_encode(one, whole, pixels)), rtol=0, atol=2e-5)
    made = placement.plan(program.module(params), case.mesh, itemsize=4)
    counted = collectives(compiled.as_text())
    assert counted == Counter(case.expected) == on_cpu(made, ENCODE)
    decoding = {exchange.module.split(".")[0] for exchange in made.exchanges if DECODE in exchange.steps}
    assert decoding <= {"language_model"}


@pytest.mark.slow
def test_data_parallel_devices_compute_only_their_own_tiles(folder):
    def work(case: Case, count: int) -> float:
        program, params = load(folder(8), case)
        return _encode.lower(program, params, internvl.tiles(count)).compile().cost_analysis()["flops"]

    assert work(CASES["over images"], 8) == pytest.approx(work(CASES["all replicated"], 1), rel=0.05)


@pytest.mark.slow
def test_norms_per_shard_would_change_results(folder, monkeypatch):
    """Shows why the sum over shards is needed."""
    from jaxinfer.layers import vision

    saved, pixels = folder(8), internvl.tiles(1)
    expected = np.asarray(_encode(*load(saved, Case(1)), pixels))
    alone = vision.normalise_together
    monkeypatch.setattr(vision, "normalise_together", lambda *parts, over: alone(*parts, over=None))
    program, params = load(saved, Case(2))
    other = np.asarray(jax.jit(partial(functional.encode, program))(params, pixels))
    assert np.abs(other - expected).max() > 1e-2


def test_a_vision_tower_that_does_not_divide_is_an_error_with_the_remedies(folder):
    from jaxinfer.errors import ConfigError

    with pytest.raises(ConfigError, match=r"vision_tower\.layers\.0\.attention.*25 .*8.*pad_heads") as error:
        hf = internvl.config(vision=dict(num_attention_heads=25, hidden_size=50, intermediate_size=64))
        weights.abstract(*weights.parse(hf), jnp.dtype("float32"), Case(8).mesh)
    assert "placement={'vision_tower.layers.*.attention': 'replicate'}" in str(error.value)
