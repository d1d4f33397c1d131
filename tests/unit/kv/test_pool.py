"""Block pool against a plain Python model, consumed values, transactions, and errors for misuse and corruption."""

import copy
import subprocess
import sys
from array import array
from collections import Counter, OrderedDict

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxinfer.errors import CapacityError, JaxInferError
from jaxinfer.kv.pool import (
    BlockPool,
    PoolInvariantError,
    allocate,
    begin,
    cached_ids,
    commit,
    publish,
    release,
    reset_published,
    rollback,
    share,
    touch,
    unpublish,
)
from jaxinfer.kv.pool_check import check

NUM_BLOCKS = 6
WIDTH = 8

FUNCTIONS = {f.__name__: f for f in (share, release, publish, unpublish, touch)}


def pool_with_cached(num_blocks: int, released: list[int]) -> BlockPool:
    """Make a pool whose blocks `released` are cached, in this order, and whose other blocks are held once."""
    pool, ids, _, _ = allocate(BlockPool.create(num_blocks), num_blocks)
    return release(publish(pool, ids), released)


def test_blocks_are_handed_out_from_zero_and_the_last_freed_first() -> None:
    pool = BlockPool.create(5)
    pool, ids, evicted, ok = allocate(pool, 3)
    assert ok is True and ids.tolist() == [0, 1, 2] and evicted.size == 0
    assert ids.dtype == np.int32 and evicted.dtype == np.int32
    pool = release(pool, [0, 2])
    pool, ids, _, _ = allocate(pool, 3)
    assert ids.tolist() == [2, 0, 3]
    assert (pool.num_free, pool.num_cached, pool.num_held) == (1, 0, 4)
    assert all(type(n) is int for n in (pool.num_free, pool.num_cached, pool.num_held))


def test_an_allocation_that_does_not_fit_leaves_the_pool_unchanged() -> None:
    pool, _, _, _ = allocate(BlockPool.create(4), 2)
    after, ids, evicted, ok = allocate(pool, 3)
    assert ok is False and after is pool and ids.size == 0 and evicted.size == 0
    check(pool, [[0, 1]])


def test_zero_blocks_always_fit() -> None:
    pool, held, _, _ = allocate(BlockPool.create(1), 1)
    after, ids, evicted, ok = allocate(pool, 0)
    assert ok is True and ids.size == 0 and evicted.size == 0
    check(after, [held])


def test_free_blocks_go_before_cached_ones_and_those_oldest_release_first() -> None:
    pool = pool_with_cached(6, [4, 1, 3])
    pool = release(unpublish(pool, [5]), [5])
    assert cached_ids(pool).tolist() == [4, 1, 3]
    pool, ids, evicted, ok = allocate(pool, 3)
    assert ok and ids.tolist() == [5, 4, 1] and evicted.tolist() == [4, 1]
    assert not pool.published[[4, 1]].any() and pool.published[3]
    assert cached_ids(pool).tolist() == [3]


def test_a_cached_block_that_is_shared_leaves_the_queue_and_rejoins_it_at_the_end() -> None:
    pool = pool_with_cached(4, [0, 1, 2])
    pool = share(pool, [0, 0, -1])
    assert pool.refs[0] == 2 and cached_ids(pool).tolist() == [1, 2] and pool.num_cached == 2
    pool = release(pool, [0, -1])
    assert cached_ids(pool).tolist() == [1, 2]
    pool = release(pool, [0])
    assert cached_ids(pool).tolist() == [1, 2, 0]
    check(pool, [[3]])


def test_duplicates_count_and_the_last_entry_decides_the_order() -> None:
    pool, ids, _, _ = allocate(BlockPool.create(3), 3)
    pool = share(publish(pool, ids), [1, 1])
    pool = release(pool, [1, 1, 0, 1, 2])
    assert cached_ids(pool).tolist() == [0, 1, 2] and pool.num_held == 0
    check(pool, [])


def test_minus_one_is_not_the_last_block() -> None:
    pool, ids, _, _ = allocate(BlockPool.create(3), 3)
    pool = publish(pool, [-1])
    assert not pool.published.any()
    pool = release(share(pool, [-1]), [2, -1, -1])
    assert pool.refs.tolist() == [1, 1, 0] and pool.num_free == 1
    pool = unpublish(pool, [-1])
    check(pool, [ids[:2], [-1, -1]])


def test_an_unpublished_block_becomes_free_when_it_was_cached_or_is_released() -> None:
    pool = pool_with_cached(4, [0, 1, 2])
    pool = unpublish(pool, [1, 1, 3, -1])
    assert cached_ids(pool).tolist() == [0, 2] and pool.num_free == 1
    check(pool, [[3]])
    pool = release(pool, [3])
    assert pool.num_free == 2


def test_reset_makes_every_cached_block_free_and_keeps_what_is_held() -> None:
    pool = reset_published(pool_with_cached(5, [0, 1, 2]))
    assert (pool.num_free, pool.num_cached, pool.num_held) == (3, 0, 2) and not pool.published.any()
    check(pool, [[3], [4]])
    pool = release(pool, [3, 4])
    assert pool.num_free == 5


@pytest.mark.parametrize("name", [*FUNCTIONS, "allocate", "reset_published", "begin"])
def test_a_consumed_value_cannot_be_used(name: str) -> None:
    pool = pool_with_cached(5, [0, 1, 2])
    if name == "allocate":
        after = allocate(pool, 2)[0]
    else:
        after = (FUNCTIONS | {"reset_published": reset_published, "begin": begin})[name](
            pool, *[[3]] * (name in FUNCTIONS)
        )
    assert after is not pool
    for use in (lambda: pool.num_free, lambda: pool.refs, lambda: allocate(pool, 1), lambda: share(pool, [3])):
        with pytest.raises(PoolInvariantError, match="block pool is consumed, version [0-9]+ is current"):
            use()
    assert "consumed" in repr(pool) and "of 5 blocks" in repr(after)


def test_a_rollback_makes_the_value_before_the_transaction_current_again() -> None:
    pool = pool_with_cached(4, [2, 0])
    trial = release(share(begin(pool), [0]), [1, 0])
    trial, ids, _, _ = allocate(trial, 2)
    assert ids.tolist() == [2, 1]
    with pytest.raises(PoolInvariantError, match="a transaction of the block pool is already open"):
        begin(trial)
    assert rollback(trial) is pool
    with pytest.raises(PoolInvariantError, match="consumed"):
        commit(trial)
    check(pool, [[1, 3]])
    assert cached_ids(pool).tolist() == [2, 0] and pool.num_free == 0


def test_the_queue_stays_in_order_when_many_cached_blocks_are_shared_again() -> None:
    rng = np.random.default_rng(0)
    pool = pool_with_cached(9, list(range(8)))
    order = list(range(8))
    for _ in range(200):
        some = rng.permutation(8)[: rng.integers(1, 4)]
        pool = release(share(pool, some), some)
        order = [i for i in order if i not in some] + some.tolist()
        assert cached_ids(pool).tolist() == order
        check(pool, [[8]])
        trial, ids, _, _ = allocate(begin(pool), 8)
        assert ids.tolist() == order
        pool = rollback(trial)


def test_eviction_skips_a_long_run_of_stale_entries() -> None:
    pool = pool_with_cached(80, list(range(80)))
    back = list(range(19))
    pool = release(share(pool, back), back)
    pool, ids, _, _ = allocate(pool, 2)
    assert ids.tolist() == [19, 20]
    assert cached_ids(pool).tolist() == [*range(21, 80), *back]


def test_the_queue_of_a_pool_of_one_block() -> None:
    pool = pool_with_cached(1, [0])
    for _ in range(5):
        pool = release(share(pool, [0]), [0])
        check(pool, [])
    _, ids, evicted, ok = allocate(pool, 1)
    assert ok and ids.tolist() == [0] and evicted.tolist() == [0]


def test_work_does_not_depend_on_the_number_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No operation but `create`, `reset_published` and `check` reads or writes a whole array."""
    pool = pool_with_cached(4000, list(range(2000)))
    state, touched = pool.state, Counter()

    class Counting(list):
        def __getitem__(self, at):
            found = super().__getitem__(at)
            touched["read"] += len(found) if isinstance(at, slice) else 1
            return array("i", found) if isinstance(at, slice) else found

        def __setitem__(self, at, value):
            touched["written"] += 1
            super().__setitem__(at, value)

    for name in ("refs", "published", "free", "follower", "predecessor"):
        monkeypatch.setattr(state, name, Counting(getattr(state, name)))
    pool, ids, _, _ = allocate(begin(pool), 4)
    pool = publish(share(pool, [*ids.tolist(), 7]), ids)
    pool = rollback(unpublish(touch(release(pool, [7, *ids.tolist()]), [7, 8]), [8]))
    pool = release(pool, [3000])
    assert pool.num_available == 2001 and 0 < touched["read"] + touched["written"] < 500


@pytest.mark.parametrize(
    ("function", "ids", "words"),
    [
        (share, [1], "block 1 is shared while free"),
        (share, [0, 9], "block 9 does not exist: the pool has 3 blocks"),
        (release, [1], "block 1 is released more often than it is held"),
        (release, [0, 0], "block 0 is released more often than it is held"),
        (publish, [2], "block 2 is published while not held"),
    ],
)
def test_misuse_on_the_host_names_the_block(function, ids: list[int], words: str) -> None:
    pool, _, _, _ = allocate(BlockPool.create(3), 1)
    with pytest.raises(PoolInvariantError, match=words):
        function(pool, ids)
    check(pool, [[0]])


def test_errors_of_arguments() -> None:
    with pytest.raises(CapacityError, match="num_blocks must be at least 1, got 0"):
        BlockPool.create(0)
    with pytest.raises(ValueError, match="n must be non-negative, got -1"):
        allocate(BlockPool.create(1), -1)
    assert issubclass(PoolInvariantError, JaxInferError) and issubclass(PoolInvariantError, RuntimeError)


@pytest.mark.parametrize(
    ("name", "at", "value", "words"),
    [
        ("refs", 3, 2, r"count differs.*block 3 \(count 2, table entries 1"),
        ("refs", 5, -1, "negative count: block 5"),
        ("refs", 3, 0, "stack differs from free: block 3"),
        ("published", 5, True, "stack differs from free: block 5"),
        ("published", 0, False, "list differs from cached: block 0"),
        ("free", 0, 4, "stack differs from free: block 4"),
        ("follower", 6, 1, "list differs from cached: block 0"),
        ("predecessor", 1, 6, "links of the list differ: block 1"),
        ("num_free", None, 1, "free 1 [+] cached 2 [+] held 2 of 6 blocks"),
        ("num_cached", None, 1, "free 2 [+] cached 1 [+] held 2 of 6 blocks"),
    ],
)
def test_check_raises_with_the_accounting(name: str, at: int | None, value: int, words: str) -> None:
    pool, ids, _, _ = allocate(BlockPool.create(6), 4)
    pool = release(publish(pool, ids[:2]), ids[:2])
    check(pool, [[2, -1], [3]])
    if at is None:
        setattr(pool.state, name, value)
    else:
        getattr(pool.state, name)[at] = value
    with pytest.raises(PoolInvariantError, match=words):
        check(pool, [[2, -1], [3]])


@pytest.mark.parametrize("tables", [[], [[2]], [[2, 3], [3]], [[2, 3, 0]], [[2, 3, 6]]])
def test_check_counts_the_table_entries(tables: list[list[int]]) -> None:
    pool, ids, _, _ = allocate(BlockPool.create(6), 4)
    pool = release(publish(pool, ids[:2]), ids[:2])
    with pytest.raises(PoolInvariantError, match="free 2 [+] cached 2 [+] held 2 of 6 blocks"):
        check(pool, tables)


class PlainPool:
    """Reference pool built from Python containers."""

    def __init__(self, size: int) -> None:
        self.free = list(range(size - 1, -1, -1))
        self.cached: OrderedDict[int, None] = OrderedDict()
        self.refs: Counter[int] = Counter()
        self.published: set[int] = set()

    def allocate(self, n: int) -> tuple[list[int], list[int], bool]:
        if n > len(self.free) + len(self.cached):
            return [], [], False
        taken = [self.free.pop() for _ in range(min(n, len(self.free)))]
        evicted = [self.cached.popitem(last=False)[0] for _ in range(n - len(taken))]
        self.published -= set(evicted)
        self.refs.update(taken + evicted)
        return taken + evicted, evicted, True

    def share(self, ids: list[int]) -> None:
        for i in ids:
            self.cached.pop(i, None)
            self.refs[i] += 1

    def release(self, ids: list[int]) -> None:
        for i in ids:
            self.refs[i] -= 1
        dead = [i for at, i in enumerate(ids) if not self.refs[i] and i not in ids[at + 1 :]]
        self.free += [i for i in dead if i not in self.published]
        self.cached.update((i, None) for i in dead if i in self.published)

    def publish(self, ids: list[int]) -> None:
        self.published |= set(ids)

    def unpublish(self, ids: list[int]) -> None:
        self.published -= set(ids)
        for i in ids:
            if i in self.cached:
                del self.cached[i]
                self.free.append(i)

    def touch(self, ids: list[int]) -> None:
        for i in ids:
            if i in self.cached:
                self.cached.move_to_end(i)

    def reset_published(self) -> None:
        self.free += self.cached
        self.cached.clear()
        self.published.clear()


def padded(ids: list[int], gaps: list[bool]) -> np.ndarray:
    """Return the ids with -1 before some of them, int32."""
    return np.array([j for i, gap in zip(ids, gaps, strict=False) for j in ([-1, i] if gap else [i])], np.int32)


def draw_ids(data: st.DataObject, plain: PlainPool, name: str) -> list[int]:
    """Draw ids that the function accepts in the current state."""
    held = sorted(i for i, n in plain.refs.items() if n > 0)
    if name == "release":
        entries = data.draw(st.permutations(sorted(plain.refs.elements())))
        return entries[: data.draw(st.integers(0, WIDTH))]
    allowed = {
        "share": held + sorted(plain.cached),
        "publish": held,
        "unpublish": list(range(NUM_BLOCKS)),
        "touch": list(range(NUM_BLOCKS)),
    }
    return data.draw(st.lists(st.sampled_from(allowed[name]), max_size=WIDTH)) if allowed[name] else []


class Both:
    """The pool and its plain model, changed together."""

    def __init__(self) -> None:
        self.pool, self.plain = BlockPool.create(NUM_BLOCKS), PlainPool(NUM_BLOCKS)

    def apply(self, data: st.DataObject, name: str) -> None:
        """Apply an operation with drawn arguments."""
        if name == "allocate":
            n = data.draw(st.integers(0, NUM_BLOCKS + 1))
            self.pool, *found = allocate(self.pool, n)
            assert [found[0].tolist(), found[1].tolist(), found[2]] == list(self.plain.allocate(n))
        elif name == "reset_published":
            self.pool = reset_published(self.pool)
            self.plain.reset_published()
        else:
            ids = draw_ids(data, self.plain, name)
            gaps = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
            self.pool = FUNCTIONS[name](self.pool, padded(ids, gaps))
            getattr(self.plain, name)(ids)
        self.compare()

    def compare(self) -> None:
        state = self.pool.state
        assert state.free[: state.num_free].tolist() == self.plain.free
        assert cached_ids(self.pool).tolist() == list(self.plain.cached)
        assert np.flatnonzero(self.pool.published).tolist() == sorted(self.plain.published)
        check(self.pool, [list(self.plain.refs.elements())])


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_the_pool_agrees_with_plain_python_and_a_rollback_undoes_everything(data: st.DataObject) -> None:
    both = Both()
    names = st.lists(st.sampled_from(["allocate", "reset_published", *FUNCTIONS]), min_size=1, max_size=12)
    for transaction in data.draw(st.lists(st.sampled_from(["none", "commit", "rollback"]), min_size=1, max_size=4)):
        pool, plain = both.pool, copy.deepcopy(both.plain)
        both.pool = pool if transaction == "none" else begin(pool)
        for name in data.draw(names):
            both.apply(data, name)
        if transaction == "commit":
            both.pool = commit(both.pool)
        elif transaction == "rollback":
            both.pool, both.plain = rollback(both.pool), plain
            assert both.pool is pool
        both.compare()


def test_import_starts_no_backend() -> None:
    code = (
        "import jaxinfer.kv.pool, jaxinfer.kv.prefix; from jax._src import xla_bridge;"
        "jaxinfer.kv.pool.BlockPool.create(4); assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
