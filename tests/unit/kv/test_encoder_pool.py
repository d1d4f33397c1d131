"""Feature pool: random workloads against a model, eviction and error cases."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.kv import encoder_pool
from jaxinfer.kv.encoder_pool import FeaturePool
from jaxinfer.kv.pool import PoolInvariantError

SIZES = {bytes([name]): 1 + name % 3 for name in range(6)}
"""Slots each input takes, by digest."""

PROMPTS = st.lists(st.sampled_from(sorted(SIZES)), min_size=1, max_size=4, unique=True)
STEPS = st.lists(st.one_of(PROMPTS, st.integers(0, 5), st.just("forget")), max_size=30)


def take(pool: FeaturePool, *names: int) -> encoder_pool.Held:
    return encoder_pool.hold(pool, {bytes([name]): SIZES[bytes([name])] for name in names})


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 9), STEPS)
def test_a_random_workload(size: int, steps: list):
    """Every held input is in the pool with its own slots; what fits depends on pinned slots alone."""
    pool, held, written = FeaturePool.create(size), [], {}
    for step in steps:
        if step == "forget":
            pool = encoder_pool.forget(pool)
            assert all(entry.pins for entry in pool.entries.values())
        elif isinstance(step, int):
            if step < len(held):
                pool = encoder_pool.release(pool, held.pop(step))
        else:
            wanted = {name: SIZES[name] for name in step}
            pinned = {name for names in held for name in names}
            needed = sum(SIZES[name] for name in pinned | set(wanted))
            found = encoder_pool.hold(pool, wanted)
            assert found.fits == (needed <= size)
            if not found.fits:
                assert found.pool is pool
                continue
            for name in found.new:
                assert len(found.slots[name]) == SIZES[name]
                written |= dict.fromkeys(found.slots[name], name)
            pool = found.pool
            held.append(step)
            for name in {name for names in held for name in names}:
                slots = pool.entries[name].slots
                assert [written[slot] for slot in slots] == [name] * SIZES[name], "its rows are still there"
        encoder_pool.check(pool, held)


def test_hits_and_least_recently_used_eviction():
    pool = FeaturePool.create(4)
    for name in (0, 3, 0):  # one slot each
        found = take(pool, name)
        assert found.new == (() if name in (0,) and pool.entries else (bytes([name]),))
        pool = encoder_pool.release(found.pool, [bytes([name])])
    assert len(pool.free) == 2
    pool = take(pool, 2).pool  # three slots: 3 is older than 0
    assert list(pool.entries) == [bytes([0]), bytes([2])]


def test_pinned_inputs_are_not_evicted():
    pool = take(FeaturePool.create(4), 2).pool
    assert not take(pool, 1).fits  # two slots, one is free
    assert take(encoder_pool.release(pool, [bytes([2])]), 1).fits


def test_a_wanted_input_is_not_evicted_for_another_wanted_one():
    pool = encoder_pool.release(take(FeaturePool.create(3), 0, 1).pool, [bytes([0]), bytes([1])])
    assert not encoder_pool.hold(pool, {bytes([0]): 1, bytes([2]): 3}).fits
    assert encoder_pool.hold(pool, {bytes([0]): 1, bytes([4]): 2}).new == (bytes([4]),)


def test_a_release_too_many_and_a_wrong_count_raise():
    pool = take(FeaturePool.create(3), 0).pool
    with pytest.raises(PoolInvariantError, match="released but not pinned"):
        encoder_pool.release(encoder_pool.release(pool, [bytes([0])]), [bytes([0])])
    with pytest.raises(PoolInvariantError, match="1 pins counted, 0 held"):
        encoder_pool.check(pool, [])
    with pytest.raises(PoolInvariantError, match="feature pool of 3 slots"):
        encoder_pool.check(FeaturePool(3, (0, 1), {}), [])


def test_holding_no_inputs_changes_nothing():
    pool = FeaturePool.create(0)
    assert encoder_pool.hold(pool, {}) == (pool, {}, (), True)
