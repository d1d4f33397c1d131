"""Pool and prefix index used as by a scheduler: random sequences over a cache of a few blocks.

The cache is simulated by lists of cells: a cell holds the salt and all tokens up to its own, which the keys and values
at a position depend on. Each rule is a whole step: try it in a transaction, then commit it or roll it back.
"""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxinfer.kv import pool as kv
from jaxinfer.kv import prefix
from jaxinfer.kv.digests import root
from jaxinfer.kv.pool_check import check

P = 2
Cell = tuple[int, ...]


@dataclass
class Sequence:
    """A toy sequence; the keys and values of all its tokens are in the cache."""

    salt: int
    tokens: list[int]
    table: list[int] = field(default_factory=list)

    def cell(self, position: int) -> Cell:
        return (self.salt, *self.tokens[: position + 1])

    @property
    def root(self) -> bytes:
        return root(b"%d" % self.salt)


class PoolMachine(RuleBasedStateMachine):
    """Steps over a pool of 2 to 9 blocks, with two token ids and two salts, so that prefixes often coincide."""

    digest = staticmethod(prefix.block_digest)

    @initialize(num_blocks=st.integers(2, 9))
    def start(self, num_blocks: int) -> None:
        self.real_digest, prefix.block_digest = prefix.block_digest, self.digest
        self.pool = kv.BlockPool.create(num_blocks)
        self.index = prefix.PrefixIndex(P)
        self.cells: list[list[Cell]] = [[()] * P for _ in range(num_blocks)]
        self.running: list[Sequence] = []
        self.prompts: list[tuple[list[int], int]] = []
        self.earlier = self.pool

    def teardown(self) -> None:
        if hasattr(self, "running"):
            prefix.block_digest = self.real_digest
            self.pool = kv.release(self.pool, [i for seq in self.running for i in seq.table])
            assert self.pool.num_held == 0
            check(self.pool, [])

    # Rules.

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9), salt=st.integers(0, 1))
    def add(self, tokens: list[int], salt: int) -> None:
        """Share the longest published prefix, allocate blocks for the rest, write and publish them."""
        self.prompts.append((tokens, salt))
        seq = Sequence(salt, tokens)
        array = np.array(tokens, np.int32)
        digests = self.index.chain(array, seq.root)[: (len(tokens) - 1) // P]
        hits = []
        for node in self.index.match(digests, array, seq.root).nodes:
            if not node.ids[0]:
                break
            hits += node.ids[0]
        trial = kv.share(kv.begin(self.pool), hits)
        trial, ids, evicted, ok = kv.allocate(trial, -(-len(tokens) // P) - len(hits))
        if not ok:
            assert trial.num_available < -(-len(tokens) // P) - len(hits)
            assert kv.rollback(trial) is self.pool
            return
        self.commit(kv.commit(trial), evicted)
        seq.table = hits + ids.tolist()
        self.running.append(seq)
        for position in range(len(hits) * P, len(tokens)):
            self.write(seq, position)
        self.publish(seq, range(len(hits), len(tokens) // P))

    @precondition(lambda self: self.prompts)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), max_size=3))
    def add_longer(self, data: st.DataObject, more: list[int]) -> None:
        """Admit a previous prompt, or one that extends it."""
        tokens, salt = data.draw(st.sampled_from(self.prompts))
        self.add(tokens + more, salt)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), token=st.integers(0, 1))
    def append(self, data: st.DataObject, token: int) -> None:
        """Write one token to a new block, to the row's own block, or to a copy of a shared one."""
        seq = self.draw_one(data)
        position = len(seq.tokens)
        new_block = position % P == 0
        copy = not new_block and self.pool.refs[seq.table[-1]] > 1
        if new_block or copy:
            trial, ids, evicted, ok = kv.allocate(self.pool, 1)
            if not ok:
                return
            if copy:
                self.cells[ids[0]] = list(self.cells[seq.table[-1]])
                trial = kv.release(trial, [seq.table.pop()])
            self.commit(trial, evicted)
            seq.table.append(int(ids[0]))
        seq.tokens.append(token)
        self.write(seq, position)
        if (position + 1) % P == 0:
            self.publish(seq, [position // P])

    @precondition(lambda self: self.running)
    @rule(data=st.data(), times=st.integers(1, 3))
    def fork(self, data: st.DataObject, times: int) -> None:
        seq = self.draw_one(data)
        self.pool = kv.share(self.pool, seq.table * times)
        self.running += [Sequence(seq.salt, list(seq.tokens), list(seq.table)) for _ in range(times)]

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        seq = self.draw_one(data)
        self.running = [other for other in self.running if other is not seq]
        self.pool = kv.release(self.pool, seq.table[::-1])

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def release_several(self, data: st.DataObject) -> None:
        """End several sequences in one step; their blocks are released in any order."""
        gone = data.draw(st.integers(1, len(self.running)))
        ids = [i for seq in self.running[:gone] for i in seq.table]
        del self.running[:gone]
        self.pool = kv.release(self.pool, data.draw(st.permutations(ids)))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def slide(self, data: st.DataObject) -> None:
        """Advance a window: blocks behind it leave the table, and stay cached if published."""
        seq = self.draw_one(data)
        behind = data.draw(st.integers(0, len(seq.table) - 1))
        self.pool = kv.release(self.pool, seq.table[:behind])
        seq.table[:behind] = [-1] * behind

    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        """Touch cached blocks."""
        ids = data.draw(st.lists(st.integers(0, self.pool.num_blocks - 1), max_size=4))
        order = [i for i in kv.cached_ids(self.pool).tolist() if i not in ids]
        self.pool = kv.touch(self.pool, ids)
        assert kv.cached_ids(self.pool).tolist()[: len(order)] == order

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def find_bad(self, data: st.DataObject) -> None:
        """Withdraw the blocks of a row found bad after publishing."""
        seq = self.draw_one(data)
        self.index.evict(seq.table)
        self.pool = kv.unpublish(self.pool, seq.table)

    @rule()
    def reset(self) -> None:
        self.index.clear()
        self.pool = kv.reset_published(self.pool)

    # Helpers of the rules.

    def draw_one(self, data: st.DataObject) -> Sequence:
        return self.running[data.draw(st.integers(0, len(self.running) - 1))]

    def commit(self, pool: kv.BlockPool, evicted: np.ndarray) -> None:
        self.index.evict(evicted)
        self.pool = pool

    def write(self, seq: Sequence, position: int) -> None:
        block = seq.table[position // P]
        assert self.pool.refs[block] == 1, "a shared block is written"
        assert not self.pool.published[block], "a published block is written"
        self.cells[block][position % P] = seq.cell(position)

    def publish(self, seq: Sequence, numbers: range | list[int]) -> None:
        """Enter these blocks in the index, then publish the new ones in the pool."""
        tokens = np.array(seq.tokens, np.int32)
        digests = self.index.chain(tokens, seq.root)
        new = [
            seq.table[n]
            for n in numbers
            if self.index.insert(
                digests[n], digests[n - 1] if n else seq.root, tokens[n * P : (n + 1) * P], (seq.table[n],)
            )
        ]
        self.pool = kv.publish(self.pool, new)

    # Invariants after every rule.

    @invariant()
    def counts_add_up(self) -> None:
        check(self.pool, [seq.table for seq in self.running])
        self.index.check(self.pool)

    @invariant()
    def earlier_values_are_consumed(self) -> None:
        if self.earlier is not self.pool:
            with pytest.raises(kv.PoolInvariantError, match="consumed"):
                kv.cached_ids(self.earlier)
        self.earlier = self.pool

    @invariant()
    def every_sequence_reads_its_own_tokens(self) -> None:
        for seq in self.running:
            for position in range(len(seq.tokens)):
                block = seq.table[position // P]
                assert block < 0 or self.cells[block][position % P] == seq.cell(position)

    @invariant()
    def published_blocks_hold_what_their_digest_says(self) -> None:
        for block in np.flatnonzero(self.pool.published).tolist():
            salt, *tokens = self.cells[block][-1]
            digests = self.index.chain(np.array(tokens, np.int32), root(b"%d" % salt))
            assert self.index._owners[block].digest == digests[-1]
            assert self.cells[block] == [(salt, *tokens[:-1]), (salt, *tokens)]


class CollidingMachine(PoolMachine):
    """The same with equal digests for all blocks: hits must be correct or not happen."""

    digest = staticmethod(lambda parent, tokens, extra: bytes(32))


# A busy machine is no fault of the pool's.
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], stateful_step_count=40)
TestPool = pytest.mark.slow(PoolMachine.TestCase)
TestPool.settings = settings(UNTIMED, max_examples=200)
TestColliding = CollidingMachine.TestCase
TestColliding.settings = settings(UNTIMED, max_examples=40)
