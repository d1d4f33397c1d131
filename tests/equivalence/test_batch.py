"""A request's tokens do not depend on the requests that run with it."""

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


def test_one_seed_gives_the_same_tokens_in_a_batch_of_one_and_of_eight():
    runner = random_runner()
    one = make_request("one", prompt(9, 50), SEEDED)
    others = [make_request(str(i), prompt(5 + i, i), SamplingParams(seed=i, max_tokens=12)) for i in range(7)]
    [expected] = alone(runner, [make_request("one", prompt(9, 50), SEEDED)])
    for place in (0, 4, 7):
        one = make_request("one", prompt(9, 50), SEEDED)
        again = [make_request(r.id, r.prompt.tolist(), r.params) for r in others]
        batch = [*again[:place], one, *again[place:]]
        assert run(make_engine(runner), batch)[place] == expected


def test_another_seed_gives_other_tokens():
    runner = random_runner()
    warm = [SamplingParams(temperature=1, seed=seed, max_tokens=8) for seed in range(4)]
    results = run(make_engine(runner), [make_request(str(p.seed), prompt(9), p) for p in warm])
    assert len({tuple(tokens) for (tokens,) in results}) == 4
