"""A row's token does not depend on the sampler level that its neighbours need."""

import pytest
from support.cases import GREEDY, SEEDED, alone
from support.tiny import make_engine, make_request, prompt, random_runner, run

from jaxinfer.sampling_params import SamplingParams

pytestmark = pytest.mark.xdist_group("llama")

NEIGHBOURS = {
    "truncated": SamplingParams(temperature=0.7, top_k=5, top_p=0.9, seed=1, max_tokens=14),
    "edited": SamplingParams(temperature=0.7, presence_penalty=1.0, seed=1, max_tokens=14),
    "logprobs": SamplingParams(temperature=0, logprobs=2, max_tokens=14),
}
MIN_P = SamplingParams(temperature=0.1, min_p=0.2, seed=3, max_tokens=10)
TRUNCATED = SamplingParams(temperature=0.2, top_k=7, top_p=0.8, seed=4, max_tokens=10)


@pytest.mark.parametrize(
    "neighbour", ["truncated", *(pytest.param(n, marks=pytest.mark.slow) for n in ("edited", "logprobs"))]
)
def test_a_neighbours_sampler_level_does_not_change_tokens(neighbour):
    runner = random_runner()
    kinds = (GREEDY, SEEDED, MIN_P, TRUNCATED)
    wanted = [make_request(str(i), prompt(7 + i, 20 + i), params) for i, params in enumerate(kinds)]
    expected = alone(runner, wanted)
    beside = make_request("beside", prompt(6, 30), NEIGHBOURS[neighbour])
    assert run(make_engine(runner), [beside, *wanted])[1:] == expected
