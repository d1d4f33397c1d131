"""Blocks of what encoders read: taken, shared, found again, and given back, beside those of the sequences
themselves."""

import numpy as np
import pytest

from jaxinfer.kv.cross_cache import Encoded
from jaxinfer.kv.groups import KindGroups, blocks_needed, layout, longest
from jaxinfer.kv.manager import BlockManager
from jaxinfer.kv.prefix import root
from jaxinfer.kv.spec import Cross, Full, Kind, Window
from jaxinfer.kv.spec import Encoded as EncodedKind

P = 4
KINDS = (KindGroups(Kind(), 0, 1), KindGroups(EncodedKind(), 1, 2))
TOKENS = np.arange(3 * P, dtype=np.int32)
ROOT = root(b"decoder")


def content(length: int, name: bytes = b"a", **changes: bytes) -> Encoded:
    return Encoded(changes.get("salt", b""), changes.get("digest", name), name, length, P)


def make(blocks: int = 40, **how: bool) -> BlockManager:
    return BlockManager(blocks, 4, 16, P, kinds=KINDS, **how)


def admit(manager: BlockManager, row: int, read: Encoded | None, tokens: int = P) -> bool:
    hit = manager.lookup(TOKENS[:0], [], ROOT)
    admitted = manager.admit(row, hit, tokens, encoded=manager.lookup_encoded(read))
    manager.check()
    return admitted


def test_layers_of_both_kinds_share_lanes_and_the_encoders_come_last():
    made = layout((Cross(2, 8), Full(2, 8), Full(2, 8), Cross(2, 8)))
    assert [kind.kind.encoded for kind in made.kinds] == [False, True] and len(made.lanes) == 2
    assert [place.group for place in made.places] == [1, 0, 0, 1]
    assert [place.lane for place in made.places] == [0, 0, 1, 1]


def test_an_encoders_positions_count_beside_the_sequences_own():
    assert blocks_needed(KINDS, 9, P, 100) == 3 and blocks_needed(KINDS, 9, P, 100, 5) == 3 + 2 * 2
    assert longest(KINDS, 7, P, 100, 1000, 5) == 3 * P and longest(KINDS, 7, P, 100, 1000) == 7 * P


@pytest.mark.parametrize("length", [1, P - 1, P, P + 1, 3 * P])
def test_a_row_holds_the_blocks_of_all_positions(length: int):
    manager, blocks = make(), -(-length // P)
    assert admit(manager, 0, content(length)) and manager.tables.read[0] == length
    table = manager.tables.blocks[1:, 0]
    assert (table[:, :blocks] >= 0).all() and (table[:, blocks:] < 0).all()
    assert int(manager.pool.num_held) == 1 + 2 * blocks
    np.testing.assert_array_equal(manager.encoded.writes(0), table[:, :blocks])
    manager.free(0)
    assert int(manager.pool.num_held) == 0 and manager.encoded.writes(0) is None
    manager.check()


def test_what_the_same_step_writes_is_shared_and_later_found():
    manager = make()
    for row in range(2):
        assert admit(manager, row, content(9))
    assert manager.encoded.writes(0) is not None and manager.encoded.writes(1) is None
    np.testing.assert_array_equal(manager.tables.blocks[1:, 0], manager.tables.blocks[1:, 1])
    for row in range(2):
        manager.publish_encoded(row)
    manager.free(0)
    assert admit(manager, 2, content(9)) and manager.encoded.writes(2) is None
    np.testing.assert_array_equal(manager.tables.blocks[1:, 2], manager.tables.blocks[1:, 1])
    assert int(manager.pool.num_held) == 2 + 2 * 3
    for row in (1, 2):
        manager.free(row)
    assert int(manager.pool.num_held) == 0 and int(manager.pool.num_cached) == 2 * 3, "kept until evicted"
    manager.check()


def test_blocks_that_were_not_written_are_not_found():
    manager = make()
    admit(manager, 0, content(9))
    manager.free(0)
    assert admit(manager, 1, content(9)) and manager.encoded.writes(1) is not None


@pytest.mark.parametrize(
    "other",
    [
        content(9, b"b"),
        content(8),
        content(9, salt=b"other"),
        content(9, b"b", digest=b"a"),
    ],
)
def test_another_input_is_not_found(other: Encoded):
    """Of another content, length or salt; or of another content whose digest is the same."""
    manager = make()
    admit(manager, 0, content(9))
    assert manager.lookup_encoded(other).missing, "before it is written"
    manager.publish_encoded(0)
    assert manager.lookup_encoded(other).missing and not manager.lookup_encoded(content(9)).missing


def test_an_input_of_which_a_block_was_evicted_is_computed_again():
    manager = make(blocks=1 + 2 * 3)
    admit(manager, 0, content(9))
    manager.publish_encoded(0)
    manager.free(0)
    hit = manager.lookup(TOKENS[:0], [], ROOT)
    assert manager.admit(1, hit, 2 * P, encoded=manager.lookup_encoded(None)), "one block of it goes"
    assert manager.lookup_encoded(content(9)).missing == 6, "before the index knows"
    manager.take_evicted()
    assert manager.lookup_encoded(content(9)).missing == 6
    manager.free(1)
    assert admit(manager, 2, content(9)) and manager.encoded.writes(2) is not None


def test_a_sequence_that_does_not_fit_with_its_input_takes_nothing():
    manager = make(blocks=5)
    assert not admit(manager, 0, content(9)) and int(manager.pool.num_held) == 0
    assert admit(manager, 0, content(8))


def test_forks_share_an_input_and_never_copy_it():
    manager = make()
    admit(manager, 0, content(6), tokens=P - 1)
    manager.publish_encoded(0)
    manager.tables.lengths[0] = P - 1
    manager.fork(0, 1)
    rows = np.array([0, 1])
    sources, targets = manager.grow(rows)
    assert len(targets) == 1, "the partial block of the sequences; not that of the input, which nobody writes"
    assert int(manager.pool.num_held) == 2 + 2 * 2
    assert manager.tables.at(rows, np.array([0, 0])).shape == (1, 2), "decode is told of blocks that grow alone"
    manager.tables.lengths[:2] += 1
    manager.grow(rows)
    np.testing.assert_array_equal(manager.tables.blocks[1:, 0], manager.tables.blocks[1:, 1])
    for row in range(2):
        manager.free(row)
    manager.check()


def test_without_a_prefix_cache_nothing_is_found():
    manager = make(prefix_caching=False)
    admit(manager, 0, content(9))
    manager.publish_encoded(0)
    assert admit(manager, 1, content(9)) and manager.encoded.writes(1) is not None
    for row in range(2):
        manager.free(row)
    assert int(manager.pool.num_cached) == 0


def test_beside_a_window():
    kinds = (KindGroups(Window(P), 0, 1), KindGroups(EncodedKind(), 1, 1))
    manager = BlockManager(20, 2, 8, P, kinds=kinds)
    hit = manager.lookup(TOKENS[:0], [], ROOT)
    assert manager.admit(0, hit, 3 * P, P, manager.lookup_encoded(content(9)))
    for start in (0, P, 2 * P):
        manager.extend(0, start, start + P)
        manager.tables.lengths[0] = start + P
        manager.check()
    assert (manager.tables.blocks[1, 0] >= 0).sum() == 3 and int(manager.pool.num_held) == 3 + 2
    manager.free(0)


def test_what_the_device_is_to_know():
    manager = make()
    admit(manager, 0, content(9))
    group, row, column, block = manager.tables.take_unsent()
    assert sorted(zip(group.tolist(), column.tolist(), strict=True)) == [
        (0, 0),
        *((g, c) for g in (1, 2) for c in range(3)),
    ]
    np.testing.assert_array_equal(manager.tables.blocks[group, row, column], block)
