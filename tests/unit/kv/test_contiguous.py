"""Contiguous cache: location of rows, pending fork copies, and accounting checks."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.kv import contiguous
from jaxinfer.kv.contiguous import Regions, RowManager
from jaxinfer.kv.groups import KindGroups
from jaxinfer.kv.interface import CacheManager
from jaxinfer.kv.manager import BlockManager
from jaxinfer.kv.pool import PoolInvariantError
from jaxinfer.kv.spec import Kind, Window

P = 4
KINDS = (KindGroups(Kind()), KindGroups(Window(6), 1, 2))
NOTHING = np.empty(0, np.int32)


def manager(rows=4, width=5, kinds=KINDS):
    return RowManager(Regions(rows, width, 3), P, kinds)


def admit(made, row, length=0):
    assert made.admit(row, made.lookup(NOTHING, [], b""), length)
    made.tables.lengths[row] = length


def copies(made, rows=()):
    sources, targets = made.grow(np.array(rows, int))
    made.check()
    return list(zip(sources.tolist(), targets.tolist(), strict=True))


@pytest.mark.parametrize("xp", [np, jnp])
def test_rows_are_disjoint_and_contiguous(xp):
    regions = Regions(rows=3, width=5, groups=2)
    tables = regions.tables(xp.arange(3), 5)
    assert isinstance(tables, np.ndarray) == (xp is np) and tables.shape == (2, 3, 5)
    assert np.asarray(tables).ravel().tolist() == list(range(regions.blocks))
    np.testing.assert_array_equal(regions.tables(xp.array([2, 0, 3]), 2), np.asarray(tables)[:, [2, 0, 2], :2])


def test_read_lengths_double_up_to_the_whole_row():
    assert [*Regions(1, 20).widths(2)] == [2, 4, 8, 16, 20]
    assert [*Regions(1, 16).widths(4)] == [4, 8, 16]
    assert [*Regions(1, 3).widths(4)] == [3]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 12])
def test_fill_and_read_round_trip_and_leave_other_blocks_unchanged(length):
    regions, given = Regions(4, 3), np.random.default_rng(0).normal(size=(2, 2, length, 8))
    given = jnp.asarray(given, jnp.float32)
    before = jnp.full((regions.blocks, 2, P, 8), jnp.nan)
    table = regions.tables(np.array([3, 1]), 3)[0]
    after = contiguous.fill(before, given, table)
    np.testing.assert_array_equal(contiguous.read(after, table, length), given)
    blocks = -(-length // P)
    written = np.isfinite(np.asarray(after)).all(axis=(1, 2, 3))
    assert np.flatnonzero(written).tolist() == [*range(3, 3 + blocks), *range(9, 9 + blocks)]


def test_both_caches_implement_the_cache_manager_protocol():
    assert isinstance(manager(), CacheManager)
    assert isinstance(BlockManager(8, 2, 4, P), CacheManager)


def test_an_admitted_row_has_its_whole_capacity():
    made = manager()
    admit(made, 2, 20)
    assert made.extend(2, 16, 20) and copies(made, [2]) == []
    assert made.pool == (60, 15)
    made.free(2)
    assert made.pool == (60, 0) and made.tables.lengths[2] == 0
    assert made.lookup(NOTHING, [], b"").reason == "a contiguous cache has no prefix cache"


def test_a_fork_copies_written_blocks_of_every_group_before_the_next_step():
    made = manager()
    admit(made, 0, 6)
    made.fork(0, 3)
    assert made.tables.lengths[3] == 6
    # Two blocks of the row in each group; a group has 4 rows of 5 blocks.
    assert copies(made, [0, 3]) == [(g * 20 + b, g * 20 + 15 + b) for g in range(3) for b in range(2)]
    assert copies(made, [0, 3]) == []


def test_forks_of_forks_copy_the_original_row_and_freed_forks_copy_nothing():
    made = manager()
    admit(made, 0, 1)
    made.fork(0, 1)
    made.fork(1, 2)
    made.fork(2, 3)
    made.free(2)
    assert copies(made) == [(g * 20, g * 20 + 5 * row) for row in (1, 3) for g in range(3)]


def test_a_row_is_not_admitted_while_a_fork_still_copies_it():
    made = manager()
    admit(made, 0, 3)
    made.fork(0, 1)
    made.free(0)
    hit = made.lookup(NOTHING, [], b"")
    assert not made.admit(0, hit, 4)
    assert len(copies(made)) == 3
    assert made.admit(0, hit, 4)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda made: made.tables.lengths.__setitem__(1, 21), "row 1 has 21 positions .* of 20 reserved"),
        (lambda made: made.tables.lengths.__setitem__(2, 1), r"row 2 has 1 positions .* \[0, 0\] blocks in use"),
        (lambda made: made._forks.__setitem__(3, 1), r"row 3 has 0 positions .* pending copies: \{3: 1\}"),
    ],
)
def test_check_names_the_inconsistent_row(harm, message):
    made = manager()
    admit(made, 1, 20)
    made.check()
    harm(made)
    with pytest.raises(PoolInvariantError, match=message):
        made.check()
