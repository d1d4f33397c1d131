"""The engine on the device: both implementations of attention give the same tokens, and the cache stays where it is."""

import jax
import pytest
from support import tiny

from jaxinfer.engine.runner.runner import Runner
from jaxinfer.functional import split
from jaxinfer.kernels.attention import choose as attention
from jaxinfer.loading import weights
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.sharding import make_mesh

LENGTHS = (1, 3, 4, 15, 16, 17, 40, 61)
NEW = 24


OWN = "own"
"""The device's own implementation, beside XLA's."""


@pytest.fixture(scope="module")
def runners(device: str) -> dict[str, Runner]:
    """A float32 model with each implementation; on a GPU the device's own is the Triton kernel, or the tests fail."""
    mesh, own = make_mesh(), attention.TRITON if device == "gpu" else attention.AUTO
    module = weights.random(tiny.CONFIG | {"architectures": [tiny.ARCHITECTURES["llama"]]}, mesh)
    return {
        name: Runner(*split(module, mesh, attention_kernel=kernel), tiny.shapes())
        for name, kernel in ((attention.XLA, attention.XLA), (OWN, own))
    }


def generate(runner: Runner, **host: bool) -> list[list[list[int]]]:
    """Greedy tokens of prompts around the ends of blocks and chunks."""
    requests = [
        tiny.make_request(str(i), tiny.prompt(length, i), SamplingParams(temperature=0, max_tokens=NEW))
        for i, length in enumerate(LENGTHS)
    ]
    return tiny.run(tiny.make_engine(runner, **host), requests)


def test_the_kernels_choose_the_same_tokens(runners: dict[str, Runner]):
    assert generate(runners[OWN]) == generate(runners[attention.XLA])


def test_samples_do_not_depend_on_what_is_shared(runners: dict[str, Runner]):
    runner, params = runners[OWN], SamplingParams(temperature=1.0, seed=3, n=2, max_tokens=NEW)
    engine = tiny.make_engine(runner)
    # A request at a time, so that the second finds the blocks of the first.
    twice = [tiny.run(engine, [tiny.make_request(str(i), tiny.prompt(37, 5), params)])[0] for i in range(2)]
    alone = tiny.make_engine(runner, prefix_caching=False, block_sharing=False)
    assert twice == tiny.run(alone, [tiny.make_request("alone", tiny.prompt(37, 5), params)]) * 2


def test_the_cache_keeps_its_addresses(runners: dict[str, Runner]):
    runner = runners[OWN]
    engine = tiny.make_engine(runner)
    first = jax.tree.leaves(runner.cache)
    before = [array.unsafe_buffer_pointer() for array in first]
    tiny.run(engine, [tiny.make_request("one", tiny.prompt(21), SamplingParams(temperature=0, max_tokens=NEW))])
    assert all(array.is_deleted() for array in first)
    assert [array.unsafe_buffer_pointer() for array in jax.tree.leaves(runner.cache)] == before
