"""The block manager as a Hypothesis state machine: what is written where, modelled token by token."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxinfer.kv.manager import BlockManager
from jaxinfer.kv.prefix import root

P, ROWS, WIDTH = 2, 5, 8
ROOT = root(b"salt")


class ManagerMachine(RuleBasedStateMachine):
    """`written[block][offset]` is the whole text up to the token whose keys lie there; a row must read its own."""

    @initialize(blocks=st.integers(4, 30), caching=st.booleans())
    def start(self, blocks, caching):
        self.manager = BlockManager(blocks, ROWS, WIDTH, P, prefix_caching=caching)
        self.written: dict[tuple[int, int], tuple[int, ...]] = {}
        self.texts: dict[int, list[int]] = {}
        self.published: dict[int, int] = {}
        self.device = np.full((ROWS, WIDTH), -7)

    def send(self):
        """What a step tells the device before it runs: the rows that are new."""
        row, column, block = self.manager.tables.take_unsent()
        self.device[row, column] = block

    def write(self, row, position):
        """The step writes a position: never into a block that another names too."""
        block = int(self.manager.tables.blocks[row, position // P])
        assert self.manager.pool.refs[block] == 1, "a shared block is never written"
        self.written[block, position % P] = tuple(self.texts[row][: position + 1])

    @precondition(lambda self: len(self.texts) < ROWS and int(self.manager.pool.num_available))
    @rule(text=st.lists(st.integers(0, 1), min_size=1, max_size=P * 4))
    def admit(self, text):
        manager, row = self.manager, next(r for r in range(ROWS) if r not in self.texts)
        tokens = np.array(text, np.int32)
        hit = manager.lookup(tokens, manager.digests(tokens, ROOT), ROOT)
        assert len(hit.ids) <= (len(text) - 1) // P
        pool, counts = manager.pool, manager.tables.counts.copy()
        if not manager.admit(row, hit, len(text)):
            assert manager.pool is pool and (manager.tables.counts == counts).all(), "all or nothing"
            assert manager.blocks_for(len(text)) - len(hit.ids) > int(pool.num_available) - sum(
                pool.refs[hit.ids] == 0
            )
            return
        self.texts[row], self.published[row] = list(text), len(hit.ids)
        for position in range(len(hit.ids) * P, len(text)):
            self.write(row, position)
        manager.tables.lengths[row] = len(text)

    @precondition(lambda self: self.texts)
    @rule(
        resting=st.sets(st.integers(0, ROWS - 1)), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=2 * P + 1)
    )
    def grow(self, resting, tokens):
        """Decode steps of the rows that do not rest."""
        manager, room = self.manager, P * WIDTH - len(tokens)
        rows = [r for r in sorted(self.texts) if r not in resting and len(self.texts[r]) <= room]
        rows = np.array(rows, np.int64)
        before, pool = manager.tables.blocks.copy(), manager.pool
        copies = manager.grow(rows, len(tokens))
        if copies is None:
            assert manager.pool is pool and (manager.tables.blocks == before).all(), "all or nothing"
            return
        sources, targets = copies
        assert not set(sources.tolist()) & set(targets.tolist())
        assert len(set(targets.tolist())) == len(targets)
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            assert pool.refs[source] > 1, "only what is shared is copied"
            for offset in range(P):
                if (source, offset) in self.written:
                    self.written[target, offset] = self.written[source, offset]
        self.send()
        for row in rows.tolist():
            for token in tokens:
                self.texts[row].append(token)
                position = len(self.texts[row]) - 1
                self.write(row, position)
                # A step names the block it writes, and no other.
                self.device[row, position // P] = manager.tables.blocks[row, position // P]
        manager.tables.lengths[rows] += len(tokens)

    @precondition(lambda self: 0 < len(self.texts) < ROWS)
    @rule(data=st.data())
    def fork(self, data):
        source = data.draw(st.sampled_from(sorted(self.texts)))
        target = next(r for r in range(ROWS) if r not in self.texts)
        self.manager.fork(source, target)
        self.texts[target], self.published[target] = list(self.texts[source]), self.published[source]

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def free(self, data):
        row = data.draw(st.sampled_from(sorted(self.texts)))
        self.manager.free(row)
        del self.texts[row], self.published[row]

    @precondition(lambda self: any(len(text) // P > self.published[row] for row, text in self.texts.items()))
    @rule(data=st.data())
    def publish(self, data):
        row = data.draw(st.sampled_from([r for r, text in self.texts.items() if len(text) // P > self.published[r]]))
        full = len(self.texts[row]) // P
        if self.manager.prefix_caching:
            self.manager.take_evicted()
            tokens = np.array(self.texts[row], np.int32)
            digests = self.manager.digests(tokens, ROOT)
            self.manager.publish(row, tokens[: full * P], digests, ROOT, self.published[row], full)
            self.published[row] = full

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def withdraw(self, data):
        row = data.draw(st.sampled_from(sorted(self.texts)))
        start = data.draw(st.integers(0, self.published[row]))
        self.manager.take_evicted()
        self.manager.withdraw(row, start)
        ids = self.manager.tables.of(row)[start:]
        assert not self.manager.pool.published[ids].any()

    @precondition(lambda self: len(self.manager.index))
    @rule()
    def reset(self):
        self.manager.reset_index()
        assert len(self.manager.index) == 0

    @precondition(lambda self: self.texts)
    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    def several_steps(self, tokens):
        for token in tokens:
            self.grow(set(), [token])
            self.manager.take_evicted()

    @invariant()
    def every_row_reads_its_own_text(self):
        if not hasattr(self, "manager"):
            return
        tables = self.manager.tables
        for row, text in self.texts.items():
            assert int(tables.counts[row]) == self.manager.blocks_for(len(text))
            for position in range(len(text)):
                block = int(tables.blocks[row, position // P])
                assert self.written[block, position % P] == tuple(text[: position + 1])

    @invariant()
    def the_device_knows_every_table(self):
        if hasattr(self, "manager"):
            self.send()
            for row in self.texts:
                known = self.manager.tables.of(row)
                assert self.device[row, : len(known)].tolist() == known.tolist()

    @invariant()
    def the_accounting_adds_up(self):
        if hasattr(self, "manager"):
            self.manager.check()
            assert (int(self.manager.pool.num_held) == 0) == (not self.texts)


TestManager = ManagerMachine.TestCase
TestManager.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def manager(blocks=8):
    return BlockManager(blocks, ROWS, WIDTH, P)


def hit(m, text):
    tokens = np.array(text, np.int32)
    return m.lookup(tokens, m.digests(tokens, ROOT), ROOT)


def admit(m, row, text):
    tokens = np.array(text, np.int32)
    assert m.admit(row, hit(m, text), len(text))
    m.tables.lengths[row] = len(text)
    digests = m.digests(tokens, ROOT)
    m.publish(row, tokens, digests, ROOT, 0, len(text) // P)


def test_a_block_evicted_in_this_step_is_no_hit_before_the_index_knows():
    m = manager(blocks=2)
    admit(m, 0, [1, 2, 3])
    m.free(0)
    assert m.admit(1, hit(m, [7, 7, 7]), 3)
    found = hit(m, [1, 2, 3])
    assert (len(found.ids), found.reason) == (0, "evicted")
    m.take_evicted()
    assert hit(m, [1, 2, 3]).reason == "evicted"


def test_the_last_token_is_always_left_to_compute():
    m = manager()
    admit(m, 0, [1, 2, 3, 4])
    assert [len(hit(m, [1, 2, 3, 4][:n]).ids) for n in range(5)] == [0, 0, 0, 1, 1]
    assert len(hit(m, [1, 2, 3, 4, 5]).ids) == 2


def test_withdrawn_blocks_are_found_no_more_and_the_prefix_before_them_is():
    m = manager()
    admit(m, 0, [1, 2, 3, 4, 5, 6, 7])
    m.withdraw(0, 1)
    assert len(hit(m, [1, 2, 3, 4, 5, 6, 7]).ids) == 1
    m.check()


@pytest.mark.parametrize(("sharers", "writers", "copies"), [(2, 2, 1), (3, 3, 2), (3, 2, 2), (3, 1, 1), (1, 1, 0)])
def test_the_last_to_write_a_shared_block_keeps_it(sharers, writers, copies):
    m = manager()
    admit(m, 0, [1, 2, 3])
    for row in range(1, sharers):
        m.fork(0, row)
    shared = int(m.tables.blocks[0, 1])
    sources, targets = m.grow(np.arange(writers))
    assert sources.tolist() == [shared] * copies and len(targets) == copies
    assert int(m.pool.refs[shared]) == sharers - copies
    m.check()


def test_several_steps_take_their_blocks_at_once():
    m = manager()
    admit(m, 0, [1, 2, 3])
    m.fork(0, 1)
    sources, _ = m.grow(np.array([0, 1]), P + 2)  # positions 3 to 6, in blocks 1 to 3
    assert m.tables.counts[:2].tolist() == [4, 4] and len(sources) == 1
    assert len({*m.tables.blocks[0, 1:4].tolist(), *m.tables.blocks[1, 1:4].tolist()}) == 6
    m.check()


def test_a_row_is_sent_once_and_whole():
    m = manager()
    admit(m, 0, [1, 2, 3])
    m.fork(0, 1)
    admit(m, 2, [4, 5])
    m.free(2)
    rows, columns, blocks = m.tables.take_unsent()
    assert (rows.tolist(), columns.tolist()) == ([0, 0, 1, 1], [0, 1, 0, 1])
    assert blocks.tolist() == m.tables.of(0).tolist() * 2
    assert m.tables.take_unsent().shape == (3, 0)


def test_nothing_changes_where_the_blocks_do_not_suffice():
    m = manager(blocks=2)
    admit(m, 0, [1, 2, 3])
    m.fork(0, 1)
    pool, blocks = m.pool, m.tables.blocks.copy()
    assert m.grow(np.array([0, 1])) is None
    assert m.grow(np.array([1]), P + 2) is None
    assert m.pool is pool and (m.tables.blocks == blocks).all()
