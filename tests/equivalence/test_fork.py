"""Samples of a request share blocks without changing tokens."""

import pytest
from support.cases import EDGES, SEEDED, alone
from support.tiny import BLOCK, CHUNK, ROWS, make_engine, make_request, prompt, random_runner, run

from jaxinfer.engine.engine import Engine
from jaxinfer.sampling_params import SamplingParams

pytestmark = pytest.mark.xdist_group("llama")


def sampled(n: int, **fields: object) -> SamplingParams:
    return SamplingParams(**dict(temperature=0.3, seed=11, max_tokens=10) | fields, n=n)


def forks(lengths=EDGES, n=3):
    return [make_request(str(i), prompt(length, i), sampled(n)) for i, length in enumerate(lengths)]


@pytest.mark.parametrize("budget", [3, CHUNK])
def test_forked_is_separate(budget):
    runner = random_runner()
    expected = alone(runner, forks())
    assert run(make_engine(runner, budget=budget), forks()) == expected
    assert run(make_engine(runner, budget=budget, block_sharing=False), forks()) == expected
    assert any(len({tuple(tokens) for tokens in samples}) > 1 for samples in expected)


def test_a_sample_is_a_lone_run_with_its_seed_and_index():
    runner = random_runner()
    for length in (BLOCK, CHUNK + 1):
        [samples] = run(make_engine(runner), [make_request("all", prompt(length), sampled(4))])
        for index, tokens in enumerate(samples):
            lone = make_request("lone", prompt(length), sampled(4))
            lone.sequences = [lone.sequences[index]]
            assert run(make_engine(runner), [lone]) == [[tokens]]


def test_forks_share_the_prompt_and_copy_what_they_write():
    runner = random_runner()
    engine = make_engine(runner)
    length = 2 * BLOCK + 2
    request = make_request("all", prompt(length), sampled(4))
    engine.add(request)
    engine.step()
    tables = engine.manager.tables
    rows = [s.row for s in request.sequences]
    assert engine.manager.pool.num_held == 3, "after the prefill all tables refer to the same blocks"
    engine.step()
    assert int(engine.manager.pool.num_held) == 2 + 4, "each writes its own copy of the last"
    assert len({int(tables.blocks[0, row, 2]) for row in rows}) == 4
    assert len({int(tables.blocks[0, row, 1]) for row in rows}) == 1
    while engine.has_work:
        engine.step()


def test_more_samples_than_rows():
    runner = random_runner()
    wanted = make_request("all", prompt(CHUNK - 1), sampled(2 * ROWS + 3))
    assert run(make_engine(runner), [wanted]) == alone(runner, [wanted])


@pytest.mark.slow
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("pool_blocks", [12, 15])
def test_forks_that_are_preempted(pool_blocks, caching):
    runner = random_runner()
    engine = make_engine(runner, pool_blocks=pool_blocks, prefix_caching=caching)
    assert run(engine, forks(n=4)) == alone(runner, forks(n=4))
    assert engine.scheduler.preempted > 0


def test_forks_of_a_hit():
    runner = random_runner()
    engine = make_engine(runner)
    for _ in range(2):
        wanted = forks()
        assert run(engine, wanted) == alone(runner, wanted)
    assert wanted[-1].cached_tokens > 0


def start(engine: Engine, n: int = 3):
    request = make_request("all", prompt(BLOCK + 2), sampled(n))
    engine.add(request)
    for _ in range(3):
        engine.step()
    return request


def test_a_sample_that_ends_early_leaves_the_others_intact():
    """As when a fork's parent is aborted: its blocks also belong to its children."""
    runner = random_runner()
    engine = make_engine(runner)
    [expected] = alone(runner, [make_request("all", prompt(BLOCK + 2), sampled(3))])
    request = start(engine)
    engine.endings.finish(request.sequences[0], "abort")
    newcomers = [make_request(f"n{i}", prompt(CHUNK, 40 + i), SEEDED) for i in range(3)]
    assert run(engine, newcomers) == alone(runner, newcomers)
    assert [s.output_ids.tolist() for s in request.sequences[1:]] == expected[1:]
