"""A request's tokens do not depend on the requests that run with it."""

from dataclasses import replace

import pytest
from support.cases import EDGES, GREEDY, SEEDED, alone, mixed, requests
from support.tiny import ROWS, make_engine, make_request, prompt, random_runner, run

from jaxinfer.sampling_params import SamplingParams

pytestmark = pytest.mark.xdist_group("llama")


@pytest.mark.slow
def test_prompts_differ_and_so_do_their_continuations():
    """Otherwise the tests below could not fail."""
    results = alone(random_runner(), requests(EDGES, GREEDY)) + alone(random_runner(), requests(EDGES, SEEDED))
    assert len({tuple(tokens) for (tokens,) in results}) == len(results)
    assert all(len(set(tokens)) > 2 for (tokens,) in results)


def test_batched_is_alone_at_every_length():
    runner = random_runner()
    assert run(make_engine(runner), mixed(EDGES)) == alone(runner, mixed(EDGES))


def test_more_requests_than_rows():
    runner = random_runner()
    lengths = [3 + i % 7 for i in range(3 * ROWS)]
    assert run(make_engine(runner), mixed(lengths)) == alone(runner, mixed(lengths))


def test_the_order_of_arrival_does_not_matter():
    runner = random_runner()
    wanted = mixed(EDGES)
    assert run(make_engine(runner), wanted[::-1]) == alone(runner, wanted)[::-1]


def test_requests_that_arrive_while_others_run():
    runner = random_runner()
    engine, wanted = make_engine(runner), mixed(EDGES)
    for request in wanted:
        engine.add(request)
        engine.step()
        engine.step()
    while engine.has_work:
        engine.step()
    assert [[s.output_ids.tolist() for s in r.sequences] for r in wanted] == alone(runner, wanted)


OTHERS = (
    dict(temperature=1.0),
    dict(temperature=0),
    dict(temperature=0.7, top_k=5, top_p=0.9),
    dict(temperature=0.7, presence_penalty=1.0, logit_bias={5: 2.0}),
)
"""Sampling of the requests beside a seeded one: each level of the sampler."""


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("place", [0, 15, 31])
def test_a_seed_gives_the_same_tokens_alone_and_preempted_among_31_others(n, place):
    runner, seeded = random_runner(), replace(SEEDED, n=n)
    [expected] = alone(runner, [make_request("one", prompt(9, 50), seeded)])
    assert len(set(map(tuple, expected))) == n
    batch = [
        make_request(str(i), prompt(5 + i % 9, i), SamplingParams(**OTHERS[i % 4], seed=i, max_tokens=6 + i % 7))
        for i in range(31)
    ]
    one = make_request("one", prompt(9, 50), seeded)
    batch.insert(place, one)
    # The blocks of three sequences: the youngest of the running ones is preempted again and again.
    engine = make_engine(runner, pool_blocks=15)
    assert run(engine, batch)[place] == expected
    assert one.preemptions > 0 if place == 15 else engine.scheduler.preempted > 0


def test_another_seed_gives_other_tokens():
    runner = random_runner()
    warm = [SamplingParams(temperature=1, seed=seed, max_tokens=8) for seed in range(4)]
    results = run(make_engine(runner), [make_request(str(p.seed), prompt(9), p) for p in warm])
    assert len({tuple(tokens) for (tokens,) in results}) == 4
