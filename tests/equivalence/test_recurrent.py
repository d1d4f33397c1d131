"""Models with recurrent layers: prefix hits, forks, chunks and preemption change no token, at and around block ends."""

import pytest
from support.cases import EDGES, GREEDY, SEEDED, alone, mixed, poison
from support.tiny import BLOCK, CHUNK, make_engine, make_request, prompt, random_runner, run

from jaxinfer.engine.request import Request
from jaxinfer.kv import groups as kv_groups
from jaxinfer.sampling_params import SamplingParams

pytestmark = pytest.mark.slow
families = pytest.mark.parametrize(
    "family", [pytest.param(family, marks=pytest.mark.xdist_group(family)) for family in ("kimi_linear", "qwen3_next")]
)

SHARED = prompt(2 * CHUNK + 1, 70)


def parting(length: int) -> list[Request]:
    """Three prompts that share a prefix of this length and then diverge."""
    tails = [prompt(3 + i, 80 + i) for i in range(3)]
    return [
        make_request(f"{length}, {i}", SHARED[:length] + tail, (GREEDY, SEEDED)[i % 2]) for i, tail in enumerate(tails)
    ]


@families
def test_hits_equal_cold_runs_at_every_boundary(family):
    """The second prompt reveals where they diverge and leaves a snapshot there; the third resumes from it."""
    runner = random_runner(family)
    for length in EDGES:
        wanted = parting(length)
        expected = alone(runner, wanted)
        assert len({tuple(tokens) for (tokens,) in expected}) == 3, "all requests must differ, or the test cannot fail"
        engine = make_engine(runner)
        poison(runner)
        assert [run(engine, [request])[0] for request in wanted] == expected
        assert wanted[2].cached_tokens == length // BLOCK * BLOCK
        again = parting(length)[2]
        assert run(engine, [again]) == expected[2:]
        assert again.cached_tokens == (len(again.prompt) - 1) // BLOCK * BLOCK, "hit up to its last block boundary"


@families
def test_generated_tokens_are_reused(family):
    runner = random_runner(family)
    for length in (BLOCK - 1, BLOCK, BLOCK + 1, CHUNK):
        engine, first = make_engine(runner), make_request("first", prompt(length, 90), GREEDY)
        [[made]] = run(engine, [first])
        second = make_request("second", first.prompt.tolist() + made + prompt(3, 91), GREEDY)
        assert run(engine, [second]) == alone(runner, [second])
        assert second.cached_tokens == (length + len(made) - 1) // BLOCK * BLOCK


@families
@pytest.mark.parametrize("budget", [1, BLOCK + 1, CHUNK - 1])
def test_chunked_is_whole(family, budget):
    runner = random_runner(family)
    assert run(make_engine(runner, budget=budget), mixed(EDGES)) == alone(runner, mixed(EDGES))


def forks(n: int = 3) -> list[Request]:
    params = SamplingParams(temperature=0.3, seed=11, max_tokens=10, n=n)
    return [make_request(str(i), prompt(length, i), params) for i, length in enumerate(EDGES)]


@families
def test_forked_is_separate(family):
    runner = random_runner(family)
    expected = alone(runner, forks())
    assert any(len({tuple(tokens) for tokens in samples}) > 1 for samples in expected)
    for host in (dict(), dict(budget=5), dict(decode_steps=8), dict(block_sharing=False)):
        engine = make_engine(runner, **host)
        poison(runner)
        assert run(engine, forks()) == expected, host


@families
@pytest.mark.parametrize("caching", [True, False])
def test_preempted_equals_not_preempted(family, caching):
    runner = random_runner(family)
    longest = max(EDGES) + GREEDY.max_tokens
    least = kv_groups.blocks_needed(runner.program.layout.kinds, longest, BLOCK, CHUNK)
    for spare in (0, 4):
        engine = make_engine(runner, pool_blocks=least + spare, prefix_caching=caching)
        poison(runner)
        assert run(engine, mixed(EDGES)) == alone(runner, mixed(EDGES))
        assert engine.scheduler.preempted > 0
    engine = make_engine(runner, pool_blocks=least + 2, prefix_caching=caching)
    assert run(engine, forks(4)) == alone(runner, forks(4))
    assert engine.scheduler.preempted > 0
