"""The faults of `facts`' cache rows on models with windows: aborts, NaN, an exhausted pool, eviction, salts,
collisions."""

import numpy as np
import pytest
from support.cases import GREEDY, alone
from support.tiny import (
    BLOCK,
    CHUNK,
    LENGTH,
    config,
    hybrid_runner,
    make_engine,
    make_request,
    prompt,
    run,
    shapes,
)

from jaxinfer.engine.runner.runner import Runner
from jaxinfer.errors import CapacityError
from jaxinfer.functional import split
from jaxinfer.kv import groups as kv_groups
from jaxinfer.kv import prefix
from jaxinfer.loading import weights
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.sharding import make_mesh

pytestmark = [pytest.mark.xdist_group("alternating"), pytest.mark.slow]

SHARED = prompt(2 * CHUNK, 70)


@pytest.fixture
def runner():
    """Sliding and full layers in turn; the window is less than a chunk."""
    return hybrid_runner("alternating")


@pytest.fixture
def nan_token(runner, monkeypatch):
    """A token id whose embedding is NaN."""
    import jax

    state = jax.tree.unflatten(runner.program.tree, runner.params)
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    place = next(i for i, (path, _) in enumerate(leaves) if "embedding" in jax.tree_util.keystr(path))
    rows = np.array(runner.params[place])
    rows[2] = np.nan
    params = list(runner.params)
    params[place] = jax.device_put(rows, runner.params[place].sharding)
    monkeypatch.setattr(runner, "params", params)
    return 2


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 8])
def test_an_abort_releases_once_and_leaves_the_others(runner, n, steps):
    """While it waits, within its prompt, in flight and while it decodes; by the budget its prompt takes four steps."""
    engine = make_engine(runner, budget=10)
    params = SamplingParams(temperature=0.2, seed=1, n=n, max_tokens=12)
    gone, other = make_request("gone", prompt(35, 1), params), make_request("other", prompt(21, 2), GREEDY)
    expected = alone(runner, [make_request("other", prompt(21, 2), GREEDY)])
    engine.add(gone)
    engine.add(other)
    for _ in range(steps):
        engine.step()
    engine.abort("gone")
    engine.abort("gone")
    while engine.has_work:
        engine.step()
    assert [[s.output_ids.tolist() for s in other.sequences]] == expected
    assert {s.finish_reason for s in gone.sequences} <= {"abort", "length"}
    assert int(engine.manager.pool.num_held) == 0


def test_a_fork_whose_parent_ends(runner):
    params = SamplingParams(temperature=0.3, seed=11, max_tokens=10, n=3)
    [expected] = alone(runner, [make_request("all", prompt(CHUNK + 2), params)])
    engine, request = make_engine(runner), make_request("all", prompt(CHUNK + 2), params)
    engine.add(request)
    for _ in range(4):
        engine.step()
    engine.endings.finish(request.sequences[0], "abort")
    newcomers = [make_request(f"n{i}", prompt(2 * CHUNK, 40 + i), GREEDY) for i in range(3)]
    assert run(engine, newcomers) == alone(runner, newcomers)
    assert [s.output_ids.tolist() for s in request.sequences[1:]] == expected[1:]


@pytest.mark.parametrize("at", [0, 9, 20, 33])
def test_nan_in_a_row_is_that_requests_error_and_no_hit(runner, nan_token, at):
    """The blocks behind the window that were released and cached meanwhile are withdrawn as well."""
    ids = prompt(34, 5)
    ids[at] = nan_token
    engine = make_engine(runner, budget=7)
    bad, good = make_request("bad", ids, GREEDY), make_request("good", prompt(34, 6), GREEDY)
    [expected] = alone(runner, [make_request("good", prompt(34, 6), GREEDY)])
    assert run(engine, [bad, good])[1] == expected
    assert bad.sequences[0].finish_reason == "error" and "finite" in bad.error
    again = make_request("again", [*ids, 5], GREEDY)
    run(engine, [again])
    assert again.cached_tokens <= at // BLOCK * BLOCK
    assert run(engine, [make_request("good", prompt(34, 6), GREEDY)]) == [expected]


def test_64_prompts_with_one_prefix_in_one_step(runner):
    wanted = [make_request(str(i), [*SHARED[: 2 * BLOCK], 3 + i], GREEDY) for i in range(64)]
    assert run(make_engine(runner), wanted) == alone(runner, wanted)
    assert sum(r.cached_tokens == 2 * BLOCK for r in wanted) == 63


def test_another_salt_never_hits_and_says_so(runner):
    engine = make_engine(runner)
    salted = [make_request(str(i), SHARED, GREEDY, salt=salt) for i, salt in enumerate((b"mine", b"yours", b"mine"))]
    results = [run(engine, [request]) for request in salted]
    assert results[0] == results[1] == results[2]
    assert [(r.cached_tokens, r.miss_reason) for r in salted] == [
        (0, "absent"),
        (0, "salt differs"),
        (len(SHARED) - BLOCK, "complete"),
    ]
    assert all([hit.kind for hit in r.hits] == ["sliding(10)", "full"] for r in salted)


def test_below_one_block_and_evicted_windows_are_told(runner):
    engine = make_engine(runner)
    short = make_request("short", prompt(BLOCK), GREEDY)
    run(engine, [short])
    assert short.miss_reason == "below one block"
    first = make_request("first", SHARED, GREEDY)
    run(engine, [first])
    manager = engine.manager
    [sliding] = [k for k, kind in enumerate(manager.kinds) if not kind.kind.keeps_all]
    digests = manager.digests(first.prompt, first.sequences[0].root, [], first.extras)
    node = manager.index.nodes(digests)[3]
    manager._unpublish(list(node.ids[sliding]) + manager.index.evict(node.ids[sliding]))
    parts = make_request("parts", [*SHARED[: 5 * BLOCK], 3, 4], GREEDY)
    assert run(engine, [parts]) == alone(runner, [parts])
    # The window before block 5 begins in block 2; block 3 is gone, and with it all ends but those before it.
    assert (parts.cached_tokens, parts.miss_reason) == (3 * BLOCK, "window evicted")
    assert [(h.kind, h.tokens, h.reason) for h in parts.hits] == [
        ("sliding(10)", 3 * BLOCK, "window evicted"),
        ("full", 5 * BLOCK, "complete"),
    ]


def test_a_forced_hash_collision_is_a_miss(runner, monkeypatch):
    monkeypatch.setattr(prefix, "block_digest", lambda parent, tokens, extra: bytes(32))
    engine = make_engine(runner)
    for seed in (1, 2, 1, 3):
        request = make_request(str(seed), prompt(2 * CHUNK, seed), GREEDY)
        assert run(engine, [request]) == alone(runner, [request])
        assert request.cached_tokens <= BLOCK


@pytest.mark.parametrize("name", ["alternating", "all sliding"])
def test_a_forgotten_prefix_is_never_a_hit(name):
    """As after new weights, while something runs."""
    runner = hybrid_runner(name)
    engine = make_engine(runner)
    first = make_request("first", SHARED, SamplingParams(temperature=0, max_tokens=20))
    engine.add(first)
    for _ in range(6):
        engine.step()
    engine.reset_prefix_cache()
    second = make_request("second", SHARED, GREEDY)
    assert run(engine, [second]) == alone(runner, [second])
    while engine.has_work:
        engine.step()
    assert [[s.output_ids.tolist() for s in first.sequences]] == alone(
        runner, [make_request("first", SHARED, SamplingParams(temperature=0, max_tokens=20))]
    )


def test_a_prompt_that_never_fits_is_refused_and_one_that_just_does_runs(runner):
    """What fits follows from what each kind of layer holds at a time."""
    kinds, long = runner.program.layout.kinds, 100
    blocks = kv_groups.blocks_needed(kinds, long, BLOCK, CHUNK)
    assert blocks < 2 * -(-long // BLOCK), "less than if all layers were full"
    engine = make_engine(runner, pool_blocks=blocks)
    assert engine.capacity.longest == long
    with pytest.raises(CapacityError, match=f"holds {long} tokens"):
        engine.add(make_request("never", [3] * long, GREEDY))
    fits = make_request("fits", prompt(long - 10), GREEDY)
    beside = make_request("beside", prompt(30, 3), GREEDY)
    assert run(engine, [fits, beside]) == alone(runner, [fits, beside])


def test_more_samples_than_the_pool_holds(runner):
    params = SamplingParams(temperature=0.3, seed=4, max_tokens=16, n=12)
    request = make_request("many", prompt(CHUNK + 3), params)
    pool = kv_groups.blocks_needed(runner.program.layout.kinds, CHUNK + 19, BLOCK, CHUNK)
    engine = make_engine(runner, pool_blocks=pool)
    assert run(engine, [request]) == alone(runner, [request])
    assert engine.scheduler.preempted > 0


def test_the_first_of_those_that_share_a_prefix_ends_early(runner):
    """Who waited for its blocks computes them."""
    engine = make_engine(runner, budget=8)
    first, *others = [make_request(str(i), [*SHARED, 3 + i], GREEDY) for i in range(3)]
    for request in (first, *others):
        engine.add(request)
    engine.step()
    assert [s.request.id for s in engine.scheduler.rows.prefilling] == ["0"], "the others wait"
    engine.abort("0")
    while engine.has_work:
        engine.step()
    assert [[s.output_ids.tolist() for s in r.sequences] for r in others] == alone(runner, others)
    assert others[1].cached_tokens == len(SHARED)


@pytest.mark.parametrize(("family", "window"), [("gpt_oss", 1), ("gemma2", 8 * LENGTH)])
def test_odd_windows(family, window):
    """A window of one, where a sink takes part of the only weight there is, and one that no sequence ever fills."""
    mesh = make_mesh(1)
    program, params = split(weights.random(config(family) | {"sliding_window": window}, mesh), mesh)
    runner = Runner(program, params, shapes(groups=program.layout.groups))
    kinds = runner.program.layout.kinds
    forks = SamplingParams(temperature=0.3, seed=3, max_tokens=10, n=2)
    wanted = [make_request(str(i), [*SHARED, 3 + i], forks) for i in range(4)]
    longest = len(SHARED) + 1 + forks.max_tokens
    blocks = kv_groups.blocks_needed(kinds, longest, BLOCK, CHUNK - 5)
    assert blocks == {1: -(-longest // BLOCK) + 4, 8 * LENGTH: 2 * -(-longest // BLOCK)}[window]
    engine = make_engine(runner, pool_blocks=blocks + 5, budget=CHUNK - 5)
    assert run(engine, wanted) == alone(runner, wanted)
    assert engine.scheduler.preempted > 0
    assert sum(request.cached_tokens > 0 for request in wanted) > 1
