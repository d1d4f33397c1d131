"""Block pool: NumPy, jitted jnp and a plain Python model compared, and errors for misuse and corruption."""

import dataclasses
import subprocess
import sys
from collections import Counter, OrderedDict
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxinfer.errors import CapacityError, JaxInferError
from jaxinfer.kv.pool import (
    BlockPool,
    PoolInvariantError,
    allocate,
    cached_ids,
    check,
    publish,
    release,
    reset_published,
    share,
    touch,
    unpublish,
)

NUM_BLOCKS = 6
WIDTH = 8

FUNCTIONS = {f.__name__: f for f in (allocate, share, release, publish, unpublish, touch, reset_published)}
JITTED = {name: jax.jit(f, static_argnames="width" if f is allocate else ()) for name, f in FUNCTIONS.items()}


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
    after, ids, evicted, ok = allocate(pool, 2, width=1)
    assert ok is False and after is pool and ids.tolist() == [-1] and evicted.tolist() == [-1]


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


def test_a_width_pads_ids_and_evicted() -> None:
    pool = pool_with_cached(4, [2, 0])
    _, ids, evicted, ok = allocate(pool, 1, width=3)
    assert ok and ids.tolist() == [2, -1, -1] and evicted.tolist() == [2, -1, -1]


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
    assert release(pool, [3]).num_free == 2


def test_reset_makes_every_cached_block_free_and_keeps_what_is_held() -> None:
    pool = reset_published(pool_with_cached(5, [0, 1, 2]))
    assert (pool.num_free, pool.num_cached, pool.num_held) == (3, 0, 2) and not pool.published.any()
    check(pool, [[3], [4]])
    pool = release(pool, [3, 4])
    assert pool.num_free == 5


def test_functions_do_not_modify_their_argument() -> None:
    pool = pool_with_cached(5, [0, 1, 2])
    before = jax.tree.map(np.copy, pool)
    allocate(pool, 2)
    share(pool, [0, 3])
    release(pool, [3, 4])
    publish(pool, [4])
    unpublish(pool, [0, 4])
    touch(pool, [0, 4])
    reset_published(pool)
    jax.tree.map(np.testing.assert_array_equal, pool, before)
    with pytest.raises(dataclasses.FrozenInstanceError):
        pool.num_free = 0


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
        _, ids, _, _ = allocate(pool, 8)
        assert ids.tolist() == order


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


def test_eviction_does_not_read_the_whole_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 4000
    pool = pool_with_cached(size, list(range(size)))
    read = []
    arange = np.arange

    def recording(*args, **kwargs):
        result = arange(*args, **kwargs)
        read.append(result.size)
        return result

    monkeypatch.setattr(np, "arange", recording)
    allocate(pool, 4)
    assert sum(read) <= 16


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


def test_errors_of_arguments() -> None:
    with pytest.raises(CapacityError, match="num_blocks must be at least 1, got 0"):
        BlockPool.create(0)
    with pytest.raises(ValueError, match="n must be non-negative, got -1"):
        allocate(BlockPool.create(1), -1)
    with pytest.raises(ValueError, match="width must be given"):
        jax.jit(allocate)(BlockPool.create(1, jnp), 1)
    assert issubclass(PoolInvariantError, JaxInferError) and issubclass(PoolInvariantError, RuntimeError)


def with_changed(pool: BlockPool, name: str, at: int, value: int | bool) -> BlockPool:
    array = getattr(pool, name).copy()
    array[at] = value
    return dataclasses.replace(pool, **{name: array})


@pytest.mark.parametrize(
    ("corrupt", "words"),
    [
        (lambda p: with_changed(p, "refs", 3, 2), r"count differs.*block 3 \(count 2, table entries 1"),
        (lambda p: with_changed(p, "refs", 5, -1), "negative count: block 5"),
        (lambda p: with_changed(p, "refs", 3, 0), "stack differs from free: block 3"),
        (lambda p: with_changed(p, "published", 5, True), "stack differs from free: block 5"),
        (lambda p: with_changed(p, "published", 0, False), "queue differs from cached: block 0"),
        (lambda p: with_changed(p, "free", 0, 4), "stack differs from free: block 4"),
        (lambda p: with_changed(p, "slot", 0, -1), "queue differs from cached: block 0"),
        (lambda p: with_changed(p, "slot", 3, 1), "slot of a block that is not cached: block 3"),
        (lambda p: dataclasses.replace(p, num_free=1), "free 1 [+] cached 2 [+] held 2 of 6 blocks"),
        (lambda p: dataclasses.replace(p, num_cached=1), "free 2 [+] cached 1 [+] held 2 of 6 blocks"),
        (lambda p: dataclasses.replace(p, head=p.head + 1), "queue differs from cached: block 0"),
    ],
)
def test_check_raises_with_the_accounting(corrupt, words: str) -> None:
    pool, ids, _, _ = allocate(BlockPool.create(6), 4)
    pool = release(publish(pool, ids[:2]), ids[:2])
    check(pool, [[2, -1], [3]])
    with pytest.raises(PoolInvariantError, match=words):
        check(corrupt(pool), [[2, -1], [3]])


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
        for at, i in enumerate(ids):
            if i in self.cached and i not in ids[at + 1 :]:
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


def padded(ids: list[int], gaps: Sequence[bool]) -> np.ndarray:
    """Return the ids with -1 inserted before some of them and padding at the end: [WIDTH]."""
    out: list[int] = []
    room = WIDTH - len(ids)
    for i, gap in zip(ids, gaps, strict=False):
        if gap and room:
            out.append(-1)
            room -= 1
        out.append(i)
    return np.array(out + [-1] * room, np.int32)


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


@dataclasses.dataclass
class Three:
    """The same pool in three versions: NumPy, jnp under jit, and plain Python."""

    host: BlockPool
    device: BlockPool
    plain: PlainPool

    def allocate(self, n: int) -> None:
        self.host, *out = allocate(self.host, n, WIDTH)
        self.device, *device_out = JITTED["allocate"](self.device, n, width=WIDTH)
        jax.tree.map(np.testing.assert_array_equal, out, device_out)
        ids, evicted, ok = self.plain.allocate(n) if n <= WIDTH else ([], [], False)
        assert [i for i in out[0].tolist() if i >= 0] == ids
        assert [i for i in out[1].tolist() if i >= 0] == evicted
        assert out[2] is ok
        self.compare()

    def apply(self, name: str, ids: list[int], gaps: Sequence[bool] = (False,) * WIDTH) -> None:
        arg = padded(ids, gaps)
        self.host, self.device = FUNCTIONS[name](self.host, arg), JITTED[name](self.device, arg)
        getattr(self.plain, name)(ids)
        self.compare()

    def reset(self) -> None:
        self.host, self.device = reset_published(self.host), JITTED["reset_published"](self.device)
        self.plain.reset_published()
        self.compare()

    def compare(self) -> None:
        jax.tree.map(np.testing.assert_array_equal, self.host, self.device)
        assert self.host.free[: self.host.num_free].tolist() == self.plain.free
        assert cached_ids(self.host).tolist() == cached_ids(self.device).tolist() == list(self.plain.cached)
        assert np.flatnonzero(self.host.published).tolist() == sorted(self.plain.published)
        tables = [list(self.plain.refs.elements())]
        check(self.host, tables)
        check(self.device, tables)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_numpy_jitted_jnp_and_plain_python_agree(data: st.DataObject) -> None:
    all_blocks = list(range(NUM_BLOCKS))
    gaps = st.lists(st.booleans(), min_size=WIDTH, max_size=WIDTH)
    pools = Three(BlockPool.create(NUM_BLOCKS), BlockPool.create(NUM_BLOCKS, jnp), PlainPool(NUM_BLOCKS))
    pools.allocate(NUM_BLOCKS)
    pools.apply("publish", all_blocks)
    pools.apply("release", data.draw(st.permutations(all_blocks))[data.draw(st.integers(0, NUM_BLOCKS)) :])
    for name in data.draw(st.lists(st.sampled_from(list(FUNCTIONS)), min_size=1, max_size=30)):
        if name == "reset_published":
            pools.reset()
        elif name == "allocate":
            pools.allocate(data.draw(st.integers(0, NUM_BLOCKS) | st.just(WIDTH + 1)))
        else:
            pools.apply(name, draw_ids(data, pools.plain, name), data.draw(gaps))


def test_more_than_the_width_does_not_fit_under_jit_either() -> None:
    pool = BlockPool.create(NUM_BLOCKS, jnp)
    after, ids, evicted, ok = jax.jit(allocate, static_argnames="width")(pool, 3, width=2)
    assert not ok and ids.tolist() == [-1, -1] and evicted.tolist() == [-1, -1]
    jax.tree.map(np.testing.assert_array_equal, after, pool)


def test_each_function_compiles_once() -> None:
    pool = BlockPool.create(NUM_BLOCKS, jnp)
    step = jax.jit(lambda pool, n, ids: share(release(allocate(pool, n, WIDTH)[0], ids), ids))
    for n in (1, 3):
        pool = step(pool, n, np.full(WIDTH, -1, np.int32))
    assert step._cache_size() == 1


def test_import_starts_no_backend() -> None:
    code = (
        "import jaxinfer.kv.pool, jaxinfer.kv.prefix; from jax._src import xla_bridge;"
        "jaxinfer.kv.pool.BlockPool.create(4); assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
