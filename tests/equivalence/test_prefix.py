"""Reusing the blocks of prefixes changes no token."""

import pytest
from support.cases import EDGES, GREEDY, SEEDED, alone
from support.tiny import BLOCK, CHUNK, make_engine, make_request, prompt, random_runner, run

pytestmark = pytest.mark.xdist_group("llama")

SHARED = prompt(2 * CHUNK, 70)


def branches(lengths=EDGES, params=(GREEDY, SEEDED)):
    """Prompts that share a prefix of each of these lengths and then diverge (the shorter ones share nothing)."""
    made = []
    for i, length in enumerate(lengths):
        ids = SHARED[:length] + prompt(i % 4, 80 + i)
        made.append(make_request(str(i), ids, params[i % len(params)]))
    return made


@pytest.mark.parametrize("budget", [5, CHUNK])
def test_hits_change_nothing(budget):
    runner = random_runner()
    engine = make_engine(runner, budget=budget)
    run(engine, [make_request("first", SHARED, GREEDY)])
    wanted = branches()
    assert run(engine, wanted) == alone(runner, wanted)
    for request in wanted:
        shared = next(
            (i for i, (a, b) in enumerate(zip(request.prompt.tolist(), SHARED, strict=False)) if a != b),
            min(len(SHARED), len(request.prompt)),
        )
        expected = min(shared, len(request.prompt) - 1) // BLOCK * BLOCK
        assert request.cached_tokens >= expected


def test_prefix_caching_off_equals_on():
    runner = random_runner()
    on, off = (make_engine(runner, prefix_caching=way) for way in (True, False))
    # One runner's cache serves one engine at a time; each run starts and ends with nothing held.
    assert [run(on, branches()), run(on, branches())] == [run(off, branches())] * 2


def test_the_same_prompt_again_reuses_all_but_the_last_token():
    runner = random_runner()
    engine = make_engine(runner)
    for length in EDGES:
        first, second = (make_request(f"{length}{i}", prompt(length, 200 + length), SEEDED) for i in "ab")
        assert run(engine, [first]) == run(engine, [second]) == alone(runner, [first])[:1]
        assert second.cached_tokens == (length - 1) // BLOCK * BLOCK


def test_generated_tokens_are_reused_as_well():
    """A conversation: the next prompt begins with the last prompt and its answer."""
    runner = random_runner()
    engine = make_engine(runner)
    ids = prompt(CHUNK + 3, 90)
    for turn in range(3):
        request = make_request(f"turn {turn}", ids, GREEDY)
        [[made]] = run(engine, [request])
        assert [[made]] == alone(runner, [request])[0:1]
        if turn:
            known = len(ids) - len(added)  # noqa: F821
            assert request.cached_tokens >= (known - 1) // BLOCK * BLOCK
        added = prompt(3, 95 + turn)
        ids = ids + made + added


@pytest.mark.slow
def test_many_prompts_with_one_prefix_in_one_step():
    runner = random_runner()
    engine = make_engine(runner)
    wanted = [make_request(str(i), SHARED[: 2 * BLOCK] + [3 + i], GREEDY) for i in range(64)]
    assert run(engine, wanted) == alone(runner, wanted)
    assert sum(r.cached_tokens > 0 for r in wanted) > 32


@pytest.mark.parametrize("pool_blocks", [5, 8])
def test_evicted_prefixes_are_computed_again(pool_blocks):
    runner = random_runner()
    engine = make_engine(runner, pool_blocks=pool_blocks)
    short = GREEDY.__class__(temperature=0, max_tokens=3)
    sent = [prompt(3 * BLOCK + 1, 300 + i) for i in (0, 1, 0, 2, 0, 0, 1)]
    for i, ids in enumerate(sent):
        request = make_request(str(i), ids, short)
        assert run(engine, [request]) == alone(runner, [request])


def test_another_salt_is_never_a_hit():
    runner = random_runner()
    engine = make_engine(runner)
    mine, yours, mine_again = (
        make_request(str(i), SHARED, GREEDY, salt=salt) for i, salt in enumerate((b"mine", b"yours", b"mine"))
    )
    results = [run(engine, [request]) for request in (mine, yours, mine_again)]
    assert results == [alone(runner, [mine])] * 3
    assert [r.cached_tokens > 0 for r in (mine, yours, mine_again)] == [False, False, True]
