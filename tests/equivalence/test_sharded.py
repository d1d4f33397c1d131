"""A model over several devices gives what it gives on one: the same checkpoint, read for each mesh."""

from functools import cache

import numpy as np
import pytest
from support import checkpoint
from support.cases import EDGES, alone, mixed
from support.tiny import CONFIG, make_engine, make_request, prompt, run, shapes

from jaxinfer.checkpoint.rules import parameters
from jaxinfer.engine.runner import Runner
from jaxinfer.functional import split
from jaxinfer.models import loading
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.sharding import make_mesh

pytestmark = pytest.mark.xdist_group("sharded")

HEADS = CONFIG | dict(architectures=["LlamaForCausalLM"], num_attention_heads=8)
"""Eight query heads, two of keys and values: over four and eight devices the latter are repeated."""


@pytest.fixture(scope="session")
def sharded(tmp_path_factory):
    """The checkpoint's runner over `tp` devices; the vocabulary of 97 is padded on all but one."""
    folder = checkpoint.write(tmp_path_factory.mktemp("sharded"), HEADS, with_tokenizer=False)

    @cache
    def runner(tp: int) -> Runner:
        mesh = make_mesh(tp)
        program, params = split(loading.load(folder, mesh, progress=False), mesh)
        return Runner(program, params, shapes())

    return runner


def test_the_checkpoint_read_for_one_device_holds_the_weights_written(sharded, tmp_path):
    """Two meshes that agree could both be wrong."""
    made = parameters(loading.random(HEADS, make_mesh(1), dtype="float32"))
    read = parameters(sharded(1).program.module(sharded(1).params))
    assert made.keys() == read.keys()
    for path in made:
        np.testing.assert_array_equal(made[path][...], read[path][...])


@pytest.mark.parametrize("tp", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)])
def test_sharded_is_single(sharded, tp):
    greedy = SamplingParams(temperature=0, max_tokens=10)

    def wanted():
        return [make_request(str(i), prompt(length, i), greedy) for i, length in enumerate(EDGES)]

    expected = run(make_engine(sharded(1)), wanted())
    assert run(make_engine(sharded(tp)), wanted()) == expected
    assert run(make_engine(sharded(tp), pool_blocks=13, budget=7), wanted()) == expected


@pytest.mark.slow
@pytest.mark.parametrize("tp", [2, 8])
def test_sampling_over_a_padded_vocabulary(sharded, tp):
    assert run(make_engine(sharded(tp)), mixed(EDGES)) == run(make_engine(sharded(1)), mixed(EDGES))


@pytest.mark.slow
def test_forks_over_devices(sharded):
    params = SamplingParams(temperature=0.3, seed=5, n=3, max_tokens=10)
    one, four = (make_request("all", prompt(18), params) for _ in range(2))
    assert run(make_engine(sharded(4)), [four]) == alone(sharded(1), [one])
