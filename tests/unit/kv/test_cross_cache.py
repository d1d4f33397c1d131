"""Blocks of encoder inputs: allocated, shared, hit and released beside those of the sequences."""

import numpy as np
import pytest

from jaxinfer.kv.cross_cache import Encoded
from jaxinfer.kv.digests import root
from jaxinfer.kv.groups import KindGroups, blocks_needed, layout, longest
from jaxinfer.kv.manager import BlockManager
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


def test_self_and_cross_attention_share_arrays_and_cross_groups_come_last():
    made = layout((Cross(2, 8), Full(2, 8), Full(2, 8), Cross(2, 8)))
    assert [kind.kind.encoded for kind in made.kinds] == [False, True] and len(made.array_specs) == 2
    assert [place.group for place in made.places] == [1, 0, 0, 1]
    assert [place.array for place in made.places] == [0, 0, 1, 1]


def test_blocks_needed_includes_encoder_positions():
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


def test_inputs_written_in_the_same_step_are_shared_and_later_hit():
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


def test_unwritten_blocks_are_a_miss():
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
def test_a_different_input_is_a_miss(other: Encoded):
    """Other content, length or salt; and other content with an equal digest."""
    manager = make()
    admit(manager, 0, content(9))
    assert manager.lookup_encoded(other).missing, "before it is written"
    manager.publish_encoded(0)
    assert manager.lookup_encoded(other).missing and not manager.lookup_encoded(content(9)).missing


def test_an_input_with_an_evicted_block_is_a_miss():
    manager = make(blocks=1 + 2 * 3)
    admit(manager, 0, content(9))
    manager.publish_encoded(0)
    manager.free(0)
    hit = manager.lookup(TOKENS[:0], [], ROOT)
    assert manager.admit(1, hit, 2 * P, encoded=manager.lookup_encoded(None)), "evicts one of its blocks"
    assert manager.lookup_encoded(content(9)).missing == 6, "before the index knows"
    manager.take_evicted()
    assert manager.lookup_encoded(content(9)).missing == 6
    manager.free(1)
    assert admit(manager, 2, content(9)) and manager.encoded.writes(2) is not None


def test_an_admission_that_does_not_fit_with_its_input_allocates_nothing():
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
    assert len(targets) == 1, "copies the sequence's partial block, not the input's, which is never written"
    assert int(manager.pool.num_held) == 2 + 2 * 2
    assert manager.tables.at(rows, np.array([0, 0])).shape == (1, 2), "decode only gets tables of groups that grow"
    manager.tables.lengths[:2] += 1
    manager.grow(rows)
    np.testing.assert_array_equal(manager.tables.blocks[1:, 0], manager.tables.blocks[1:, 1])
    for row in range(2):
        manager.free(row)
    manager.check()


def test_no_hits_without_prefix_caching():
    manager = make(prefix_caching=False)
    admit(manager, 0, content(9))
    manager.publish_encoded(0)
    assert admit(manager, 1, content(9)) and manager.encoded.writes(1) is not None
    for row in range(2):
        manager.free(row)
    assert int(manager.pool.num_cached) == 0


def test_cross_attention_beside_a_sliding_window():
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
