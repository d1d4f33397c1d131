"""Models with sliding windows: sharing, prefix hits, releases, copies, preemption and sharding change no token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import checkpoint
from support.cases import EDGES, GREEDY, SEEDED, alone, mixed, poison
from support.tiny import (
    BLOCK,
    CHUNK,
    CONFIG,
    HYBRIDS,
    ROWS,
    hybrid_runner,
    make_engine,
    make_request,
    prompt,
    run,
    shapes,
    window_of,
)

from jaxinfer.engine.runner.runner import Runner
from jaxinfer.functional import split
from jaxinfer.kv import groups as kv_groups
from jaxinfer.loading import weights
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.sharding import make_mesh

QUICK = "alternating"


def every(*names):
    """These hybrids, or all; one of them in the quick tier."""
    return pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=[pytest.mark.xdist_group(name), *[pytest.mark.slow] * (name != QUICK)])
            for name in names or HYBRIDS
        ],
    )


MOST = ("alternating", "five to one")
CHUNKED = "chunks of six"
"""Windows that do not slide; their ends are those of blocks only every third time."""


def edges(name):
    """`EDGES`, and prompt lengths around the window's end."""
    window = window_of(name)
    return sorted({*EDGES, *(n for n in (window - 1, window, window + 1) if 0 < n < 3 * CHUNK)})


def blocks_for(runner, tokens, chunk=CHUNK):
    return kv_groups.blocks_needed(runner.program.layout.kinds, tokens, BLOCK, chunk)


def longest(name):
    return max(edges(name)) + GREEDY.max_tokens


def poison_unused(engine):
    """Write NaN to every block that is neither held nor in the prefix index."""
    pool = engine.manager.pool
    unused = np.zeros((engine.runner.shapes.num_blocks, 1, 1, 1), bool)
    unused[: pool.num_blocks, 0, 0, 0] = (pool.refs == 0) & ~pool.published
    engine.runner.cache = jax.tree.map(lambda a: jnp.where(unused, jnp.nan, a), engine.runner.cache)


@pytest.mark.slow
@every()
def test_batched_equals_alone_and_hits_equal_cold_runs(name):
    runner = hybrid_runner(name)
    wanted, engine = mixed(edges(name)), make_engine(runner)
    expected = alone(runner, wanted)
    assert len({tuple(tokens) for (tokens,) in expected}) == len(wanted), (
        "all requests must differ, or the test cannot fail"
    )
    poison(runner)
    assert run(engine, wanted) == expected
    again = mixed(edges(name))
    assert run(engine, again) == expected
    assert [r.cached_tokens for r in again] == [(len(r.prompt) - 1) // BLOCK * BLOCK for r in again]


@every(*MOST, CHUNKED)
@pytest.mark.parametrize("budget", [1, 5, CHUNK - 1])
def test_chunked_is_whole(name, budget):
    runner = hybrid_runner(name)
    assert run(make_engine(runner, budget=budget), mixed(edges(name))) == alone(runner, mixed(edges(name)))


@every()
def test_decode_steps_at_once_and_windows_that_move_meanwhile(name):
    runner = hybrid_runner(name)
    wanted = mixed(edges(name)[-ROWS:])
    assert run(make_engine(runner, decode_steps=8), wanted) == alone(runner, wanted)


@every(*MOST, "all sliding", CHUNKED)
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("spare", [0, 7, 30])
def test_preempted_equals_not_preempted(name, spare, caching):
    runner = hybrid_runner(name)
    pool = blocks_for(runner, longest(name)) + spare
    engine = make_engine(runner, pool_blocks=pool, prefix_caching=caching)
    wanted = mixed(edges(name))
    poison(runner)
    for request in wanted:
        engine.add(request)
    while engine.has_work:
        engine.step()
        poison_unused(engine)
    assert [[s.output_ids.tolist() for s in r.sequences] for r in wanted] == alone(runner, wanted)
    assert engine.scheduler.preempted > 0 or spare == 30


def forks(name, n=3):
    params = SamplingParams(temperature=0.3, seed=11, max_tokens=10, n=n)
    return [make_request(str(i), prompt(length, i), params) for i, length in enumerate(edges(name)[::2])]


@every(*MOST)
@pytest.mark.parametrize("host", [dict(), dict(budget=5), dict(decode_steps=8), dict(block_sharing=False)])
def test_forked_is_separate(name, host):
    runner = hybrid_runner(name)
    expected = alone(runner, forks(name))
    assert run(make_engine(runner, **host), forks(name)) == expected
    assert any(len({tuple(tokens) for tokens in samples}) > 1 for samples in expected)


@every("five to one")
def test_forks_that_are_preempted(name):
    runner = hybrid_runner(name)
    engine = make_engine(runner, pool_blocks=blocks_for(runner, longest(name)) + 9)
    assert run(engine, forks(name, 4)) == alone(runner, forks(name, 4))
    assert engine.scheduler.preempted > 0


@every("five to one")
def test_forks_share_every_group_and_copy_the_last_block_of_each_once(name):
    runner = hybrid_runner(name)
    engine, groups = make_engine(runner), runner.program.layout.groups
    request = make_request("all", prompt(2 * BLOCK + 2), SamplingParams(temperature=0.3, seed=1, n=4, max_tokens=10))
    engine.add(request)
    engine.step()
    assert int(engine.manager.pool.num_held) == 3 * groups, "after the prefill all tables refer to the same blocks"
    plan = engine.scheduler.schedule()
    assert len(plan.copies[0]) == 3 * groups, "one batch for all groups; the last to write keeps its own"
    tables, rows = engine.manager.tables.blocks, [s.row for s in request.sequences]
    assert all(len(set(tables[group, rows, 2].tolist())) == 4 for group in range(groups))
    assert all(len(set(tables[group, rows, 1].tolist())) == 1 for group in range(groups))


@every(*MOST, "window of one", CHUNKED)
def test_prefixes_that_diverge(name):
    """Prompts that diverge anywhere from a cached one; every hit covers all blocks that both share."""
    runner, shared = hybrid_runner(name), prompt(3 * CHUNK, 70)
    engine = make_engine(runner, pool_blocks=runner.shapes.num_blocks)
    run(engine, [make_request("first", shared, GREEDY)])
    wanted = [
        make_request(str(i), shared[:length] + prompt(1 + i % 4, 80 + i), (GREEDY, SEEDED)[i % 2])
        for i, length in enumerate(edges(name))
    ]
    assert run(engine, wanted) == alone(runner, wanted)
    for request in wanted:
        common = next(i for i, (a, b) in enumerate(zip(request.prompt.tolist(), [*shared, -1], strict=False)) if a != b)
        assert request.cached_tokens >= min(common, len(request.prompt) - 1) // BLOCK * BLOCK


@every(*MOST, CHUNKED)
def test_prompts_that_arrive_together_compute_what_they_share_once(name):
    runner, shared = hybrid_runner(name), prompt(2 * CHUNK + BLOCK, 71)
    engine = make_engine(runner)
    wanted = [make_request(str(i), [*shared, *prompt(1 + i % 3, 200 + i)], GREEDY) for i in range(20)]
    assert run(engine, wanted) == alone(runner, wanted)
    assert [r.cached_tokens for r in wanted] == [0] + [len(shared)] * 19


@every("five to one")
def test_evicted_prefixes_are_computed_again(name):
    runner = hybrid_runner(name)
    short = SamplingParams(temperature=0, max_tokens=3)
    for spare in (0, 6, 13):
        engine = make_engine(runner, pool_blocks=blocks_for(runner, CHUNK + 4) + spare)
        for i, seed in enumerate((0, 1, 0, 2, 0, 0, 1)):
            request = make_request(str(i), prompt(CHUNK + 1, 300 + seed), short)
            assert run(engine, [request]) == alone(runner, [request])
            poison_unused(engine)


@every("all sliding")
def test_a_long_sequence_holds_a_window_a_chunk_and_a_block(name):
    runner, window = hybrid_runner(name), window_of(name)
    engine = make_engine(runner, budget=CHUNK)
    request = make_request("long", prompt(80), SamplingParams(temperature=0, max_tokens=40))
    [expected] = alone(runner, [request])
    engine.add(request)
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, int(engine.manager.pool.num_held))
    assert [s.output_ids.tolist() for s in request.sequences] == expected
    assert most <= -(-(window + CHUNK) // BLOCK) + 1


@pytest.mark.slow
@every(*MOST, CHUNKED)
def test_sharded_is_single(name, tmp_path):
    folder = checkpoint.write(tmp_path, CONFIG | HYBRIDS[name], with_tokenizer=False)

    def runner(tp):
        mesh = make_mesh(tp)
        program, params = split(weights.load(folder, mesh, progress=False), mesh)
        return Runner(program, params, shapes(groups=program.layout.groups))

    expected, two = run(make_engine(runner(1)), mixed(edges(name))), runner(2)
    assert run(make_engine(two), mixed(edges(name))) == expected
    assert run(make_engine(two, pool_blocks=blocks_for(two, longest(name)) + 5), mixed(edges(name))) == expected
