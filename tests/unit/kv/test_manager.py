"""Block manager: a state machine modelling cache contents per token, for full and sliding-window kinds; examples."""

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxinfer.kv import pool as pools
from jaxinfer.kv.digests import root
from jaxinfer.kv.groups import SINGLE, KindGroups, blocks_needed, count
from jaxinfer.kv.manager import BlockManager
from jaxinfer.kv.pool import PoolInvariantError
from jaxinfer.kv.prefix_match import Hit
from jaxinfer.kv.spec import Kind, Window

P, ROWS, WIDTH = 2, 5, 8
ROOT = root(b"salt")


def kinds(*counts, windows=()):
    """Groups of full attention, then of each window, with these counts."""
    found, first = [], 0
    for kind, number in zip([Kind(), *map(Window, windows)], counts, strict=True):
        if number:
            found.append(KindGroups(kind, first, number))
            first += number
    return tuple(found)


HYBRIDS = [
    SINGLE,
    kinds(1, 1, windows=[3]),
    kinds(2, 1, windows=[1]),
    kinds(0, 2, windows=[4]),
    kinds(1, 2, 1, windows=[2, 5]),
]


class ManagerMachine(RuleBasedStateMachine):
    """Model of the cache: `written[block][offset]` is the group and the tokens up to the one whose keys are stored
    there.

    Every row must read its own tokens, as far as its kinds need them.
    """

    @initialize(
        blocks=st.integers(4, 60),
        caching=st.booleans(),
        layout=st.sampled_from(HYBRIDS),
        slots=st.one_of(st.just(0), st.integers(2 * ROWS, 3 * ROWS)),
    )
    def start(self, blocks, caching, layout, slots):
        self.kinds, self.groups = layout, count(layout)
        self.manager = BlockManager(blocks, ROWS, WIDTH, P, prefix_caching=caching, kinds=layout, state_slots=slots)
        self.memory: dict[int, tuple[int, ...]] = {}
        """Maps a slot to the text whose state it holds."""
        self.written: dict[tuple[int, int], tuple[int, ...]] = {}
        self.texts: dict[int, list[int]] = {}
        self.hits: dict[tuple[int, ...], Hit] = {}
        self.read: dict[int, int] = {}
        self.published: dict[int, int] = {}
        self.device = np.full((self.groups, ROWS, WIDTH), -7)

    def send(self):
        """Send the new rows to the device, as before a step."""
        group, row, column, block = self.manager.tables.take_unsent()
        self.device[group, row, column] = block

    def plan(self, decoding=(), steps=0, chunks=()):
        """Run the state steps of a plan: decode `steps` tokens of some rows, prefill others up to a position."""
        states = self.manager.states
        if states is None:
            return
        states.begin()
        moves = [states.step(np.array(decoding, np.int64)) for _ in range(steps)]
        parts = [states.chunk(row, stop) for row, stop in chunks]
        starts = {
            row: int(states.positions[row]) - sum(part.count for part in some) for (row, _), some in zip(chunks, parts)
        }
        written, read = [], []
        for (row, _), some in zip(chunks, parts, strict=True):  # a step runs prefills before decodes
            text, at = (), starts[row]
            for part in some:
                if not part.continues:
                    text = () if part.source < 0 else self.memory[part.source]
                    read.append(part.source)
                assert text == tuple(self.texts[row][:at]), "a chunk starts from its sequence's state"
                at += part.count
                text = self.memory[part.target] = tuple(self.texts[row][:at])
                written.append(part.target)
        assert len(set(written)) == len(written)
        for step, (sources, targets) in enumerate(moves):
            assert not set(written) & {*sources.tolist(), *targets.tolist()}, (
                "no part of a plan writes a slot that another reads"
            )
            assert len(set(targets.tolist())) == len(targets)
            old = [self.memory[slot] for slot in sources.tolist()]
            for row, text, target in zip(decoding, old, targets.tolist(), strict=True):
                length = int(states.positions[row]) - steps + step
                assert text == tuple(self.texts[row][:length]), "a step starts from its sequence's state"
                assert not states.published[target], "a snapshot is never written"
                self.memory[target] = tuple(self.texts[row][: length + 1])

    def write(self, row, position):
        """Write a position; must not write a shared or published block, and must read everything it needs."""
        for group in range(self.groups):
            block = int(self.manager.tables.blocks[group, row, position // P])
            assert self.manager.pool.refs[block] == 1, "a shared block is never written"
            assert not self.manager.pool.published[block], "a published block is never written"
            self.written[block, position % P] = (group, *self.texts[row][: position + 1])
        self.read[row] = position
        self.check_row(row, position)

    def check_row(self, row, position):
        """Check that a written token finds every key it sees in the device's tables."""
        for kind in self.kinds:
            for group in range(kind.first, kind.first + kind.count):
                for at in range(int(kind.kind.first_needed(position)), position + 1):
                    block = int(self.manager.tables.blocks[group, row, at // P])
                    assert self.written[block, at % P] == (group, *self.texts[row][: at + 1])

    def digests(self, row):
        tokens = np.array(self.texts[row], np.int32)
        return self.manager.digests(tokens, ROOT) if self.manager.prefix_caching else []

    @precondition(lambda self: len(self.texts) < ROWS and int(self.manager.pool.num_available))
    @rule(text=st.lists(st.integers(0, 1), min_size=1, max_size=P * 5), chunk=st.integers(1, P * 5))
    def admit(self, text, chunk):
        """Admit a prompt and compute it in chunks; drop it if a chunk finds no blocks."""
        manager, row = self.manager, next(r for r in range(ROWS) if r not in self.texts)
        tokens = np.array(text, np.int32)
        hit = manager.lookup(tokens, manager.digests(tokens, ROOT), ROOT)
        assert hit.blocks <= (len(text) - 1) // P
        pool, counts = manager.pool, manager.tables.counts.copy()
        chunk_end = min(len(text), hit.blocks * P + chunk)
        if not manager.admit(row, hit, len(text), chunk_end):
            assert manager.pool is pool and (manager.tables.counts == counts).all(), "all or nothing"
            ids = hit.ids[: self.groups][hit.ids[: self.groups] >= 0]
            ends = [manager.blocks_for(len(text) if kind.kind.keeps_all else chunk_end) for kind in self.kinds]
            new = sum(kind.count * (end - hit.blocks) for kind, end in zip(self.kinds, ends, strict=True))
            assert new > int(pool.num_available) - sum(pool.refs[ids] == 0)
            return
        self.texts[row], self.published[row] = list(text), hit.blocks
        for start in range(hit.blocks * P, len(text), chunk):
            stop = min(start + chunk, len(text))
            before, pool = manager.tables.blocks.copy(), manager.pool
            if not manager.extend(row, start, stop):
                assert manager.pool is pool and (manager.tables.blocks == before).all(), "all or nothing"
                self.manager.free(row, self.digests(row))
                del self.texts[row], self.published[row]
                return
            self.send()
            self.plan(chunks=[(row, stop)])
            for position in range(start, stop):
                self.write(row, position)
            manager.tables.lengths[row] = stop
            held = int((manager.tables.blocks[:, row] >= 0).sum())
            assert held <= blocks_needed(self.kinds, len(text), P, chunk)
            manager.take_evicted()
            if manager.prefix_caching:
                self.enter(row, stop // P)

    @precondition(lambda self: self.texts)
    @rule(resting=st.sets(st.integers(0, ROWS - 1)), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=2 * P + 1))
    def grow(self, resting, tokens):
        """Run decode steps for the rows that are not resting."""
        room = P * WIDTH - len(tokens)
        rows = [r for r in sorted(self.texts) if r not in resting and len(self.texts[r]) <= room]
        rows = np.array(rows, np.int64)
        for row in rows.tolist():
            self.texts[row] += tokens
        if not self.grown(rows, tokens):
            for row in rows.tolist():
                del self.texts[row][-len(tokens) :]

    def grown(self, rows, tokens):
        """Grow the rows; return whether there was room."""
        manager = self.manager
        before, pool, refs = manager.tables.blocks.copy(), manager.pool, manager.pool.refs.copy()
        copies = manager.grow(rows, len(tokens))
        if copies is None:
            assert manager.pool is pool and (manager.tables.blocks == before).all(), "all or nothing"
            return False
        sources, targets = copies
        assert not set(sources.tolist()) & set(targets.tolist())
        assert len(set(targets.tolist())) == len(targets)
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            assert refs[source] > 1, "only what is shared is copied"
            for offset in range(P):
                if (source, offset) in self.written:
                    self.written[target, offset] = self.written[source, offset]
        self.send()
        self.plan(rows.tolist(), len(tokens))
        for row in rows.tolist():
            length = len(self.texts[row]) - len(tokens)
            for position in range(length, length + len(tokens)):
                self.write(row, position)
                # A step sends the ids of the blocks it writes, and no others.
                self.device[:, row, position // P] = manager.tables.blocks[:, row, position // P]
        manager.tables.lengths[rows] += len(tokens)
        manager.take_evicted()
        return True

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def fork(self, data):
        """Fork to an empty row, or replace another row as beam search does."""
        source = data.draw(st.sampled_from(sorted(self.texts)))
        target = data.draw(st.sampled_from([row for row in range(ROWS) if row != source]))
        self.manager.fork(source, target)
        self.texts[target], self.published[target] = list(self.texts[source]), self.published[source]
        self.read[target] = self.read[source]

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), keep=st.booleans())
    def free(self, data, keep):
        row = data.draw(st.sampled_from(sorted(self.texts)))
        self.manager.free(row, self.digests(row) if keep else ())
        del self.texts[row], self.published[row]

    @precondition(lambda self: any(len(text) // P > self.published[row] for row, text in self.texts.items()))
    @rule(data=st.data())
    def publish(self, data):
        row = data.draw(st.sampled_from([r for r, text in self.texts.items() if len(text) // P > self.published[r]]))
        if self.manager.prefix_caching:
            self.enter(row, len(self.texts[row]) // P)

    def enter(self, row, full):
        tokens = np.array(self.texts[row], np.int32)
        self.manager.publish(row, tokens[: full * P], self.digests(row), ROOT, self.published[row], full)
        self.published[row] = full

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def withdraw(self, data):
        row = data.draw(st.sampled_from(sorted(self.texts)))
        start = data.draw(st.integers(0, self.published[row]))
        self.manager.withdraw(self.digests(row)[start : self.published[row]])
        tokens = np.array([*self.texts[row], 0], np.int32)
        if start < self.published[row]:
            assert self.manager.lookup(tokens, self.digests(row), ROOT).blocks <= start

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

    @invariant()
    def every_row_reads_its_own_text(self):
        if hasattr(self, "manager"):
            for row, text in self.texts.items():
                assert (self.manager.tables.counts[:, row] == self.manager.blocks_for(len(text))).all()
                self.check_row(row, self.read[row])

    @invariant()
    def a_hit_is_of_the_text_asked_for(self):
        if not hasattr(self, "manager") or not self.manager.prefix_caching:
            return
        for row, text in self.texts.items():
            hit = self.manager.lookup(np.array(text, np.int32), self.digests(row), ROOT)
            earlier = self.hits.setdefault((self.manager.index_version, *text), hit)
            assert np.array_equal(earlier.ids, hit.ids), "another hit has another version"
            for kind in self.kinds:
                first = int(kind.kind.first_needed(hit.blocks * P)) // P
                ids = hit.ids[kind.span]
                assert (ids[:, :first] == -1).all() and (ids[:, first:] >= 0).all()
                for number in range(first, hit.blocks):
                    for group, block in zip(range(self.groups)[kind.span], ids[:, number].tolist(), strict=True):
                        for at in range(P):
                            assert self.written[block, at] == (group, *text[: number * P + at + 1])
            if self.manager.states is not None and hit.blocks:
                slot = int(hit.ids[-1, -1]) - self.manager.pool.num_blocks
                assert self.memory[slot] == tuple(text[: hit.blocks * P]), "a snapshot belongs to the requested prefix"

    @invariant()
    def the_device_knows_every_table(self):
        if hasattr(self, "manager"):
            self.send()
            for row in self.texts:
                own = self.manager.tables.blocks[:, row]
                assert (self.device[:, row][own >= 0] == own[own >= 0]).all()

    @invariant()
    def the_accounting_adds_up(self):
        if hasattr(self, "manager"):
            self.manager.check()
            assert (int(self.manager.pool.num_held) == 0) == (not self.texts)
            if self.manager.states is not None and not self.texts:
                self.manager.states.begin()
                assert int(self.manager.states.pool.num_held) == 0


TestManager = pytest.mark.slow(ManagerMachine.TestCase)
TestManager.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def manager(blocks=8, layout=SINGLE, width=WIDTH):
    return BlockManager(blocks, ROWS, width, P, kinds=layout)


def hit(m, text):
    tokens = np.array(text, np.int32)
    return m.lookup(tokens, m.digests(tokens, ROOT), ROOT)


def admit(m, row, text, chunk=None):
    """Compute a prompt in chunks and publish it."""
    tokens = np.array(text, np.int32)
    digests, found = m.digests(tokens, ROOT), hit(m, text)
    start, published = found.blocks * P, found.blocks
    assert m.admit(row, found, len(text), min(len(text), start + (chunk or len(text))))
    while start < len(text):
        stop = min(len(text), start + (chunk or len(text)))
        assert m.extend(row, start, stop)
        m.take_evicted()
        m.tables.lengths[row] = start = stop
        m.publish(row, tokens, digests, ROOT, published, stop // P)
        published = stop // P
    m.check()
    return found


def end(m, row, text):
    m.free(row, m.digests(np.array(text, np.int32), ROOT))


def test_a_block_evicted_in_this_step_is_a_miss_before_the_index_is_updated():
    m = manager(blocks=2)
    admit(m, 0, [1, 2, 3])
    m.free(0)
    assert m.admit(1, hit(m, [7, 7, 7]), 3)
    found = hit(m, [1, 2, 3])
    assert (found.blocks, found.reason) == (0, "evicted under pressure")
    m.take_evicted()
    assert hit(m, [1, 2, 3]).reason == "evicted under pressure"


def test_the_last_token_is_always_left_to_compute():
    m = manager()
    admit(m, 0, [1, 2, 3, 4])
    assert [hit(m, [1, 2, 3, 4][:n]).blocks for n in range(5)] == [0, 0, 0, 1, 1]
    assert hit(m, [1, 2, 3, 4, 5]).blocks == 2


def test_withdrawn_blocks_are_a_miss_and_the_prefix_before_them_is_a_hit():
    m = manager()
    text = [1, 2, 3, 4, 5, 6, 7]
    admit(m, 0, text)
    m.withdraw(m.digests(np.array(text, np.int32), ROOT)[1:])
    assert hit(m, text).blocks == 1
    m.check()


@pytest.mark.parametrize("layout", [SINGLE, kinds(1, 2, windows=[3])])
@pytest.mark.parametrize(("sharers", "writers", "copies"), [(2, 2, 1), (3, 3, 2), (3, 2, 2), (3, 1, 1), (1, 1, 0)])
def test_the_last_writer_of_a_shared_block_writes_in_place(sharers, writers, copies, layout):
    m, groups = manager(30, layout), count(layout)
    admit(m, 0, [1, 2, 3])
    for row in range(1, sharers):
        m.fork(0, row)
    shared = m.tables.blocks[:, 0, 1].copy()
    sources, targets = m.grow(np.arange(writers))
    assert sorted(sources.tolist()) == sorted(shared.tolist() * copies) and len(targets) == copies * groups
    assert set(m.pool.refs[shared].tolist()) == {sharers - copies}
    m.check()


def test_grow_allocates_blocks_for_several_steps_at_once():
    m = manager()
    admit(m, 0, [1, 2, 3])
    m.fork(0, 1)
    sources, _ = m.grow(np.array([0, 1]), P + 2)  # positions 3 to 6, in blocks 1 to 3
    assert m.tables.counts[0, :2].tolist() == [4, 4] and len(sources) == 1
    assert len({*m.tables.blocks[0, 0, 1:4].tolist(), *m.tables.blocks[0, 1, 1:4].tolist()}) == 6
    m.check()


def test_a_new_row_is_sent_once_with_all_its_blocks():
    m = manager()
    admit(m, 0, [1, 2, 3])
    m.fork(0, 1)
    admit(m, 2, [4, 5])
    m.free(2)
    groups, rows, columns, blocks = m.tables.take_unsent()
    assert (rows.tolist(), columns.tolist()) == ([0, 0, 1, 1], [0, 1, 0, 1])
    assert blocks.tolist() == m.tables.of(0).tolist() * 2 and not groups.any()
    assert m.tables.take_unsent().shape == (4, 0)


def test_only_new_blocks_of_a_chunked_prefill_are_sent():
    m = manager(20, kinds(1, 1, windows=[3]))
    text = list(range(8))
    m.admit(0, hit(m, text), 8, 4)
    groups, _, columns, _ = m.tables.take_unsent()
    assert list(zip(groups.tolist(), columns.tolist(), strict=True)) == [(0, i) for i in range(4)] + [(1, 0), (1, 1)]
    m.tables.lengths[0] = 4
    assert m.extend(0, 4, 8)
    groups, _, columns, _ = m.tables.take_unsent()
    assert list(zip(groups.tolist(), columns.tolist(), strict=True)) == [(1, 2), (1, 3)]


def test_nothing_changes_if_there_are_too_few_blocks():
    m = manager(blocks=2)
    admit(m, 0, [1, 2, 3])
    m.fork(0, 1)
    pool, blocks = m.pool, m.tables.blocks.copy()
    assert m.grow(np.array([0, 1])) is None
    assert m.grow(np.array([1]), P + 2) is None
    assert m.pool is pool and (m.tables.blocks == blocks).all()


# Windows. P is 2; a window of 4 before the end of block n needs blocks n - 2 (its second position) and n - 1.

LAYOUT = kinds(1, 2, windows=[4])


def held(m, row, group):
    return np.flatnonzero(m.tables.blocks[group, row] >= 0).tolist()


def test_blocks_behind_a_window_are_released_and_stay_cached():
    m = manager(40, LAYOUT, width=16)
    text = list(range(12))
    admit(m, 0, text, chunk=4)
    assert held(m, 0, 0) == list(range(6))
    assert held(m, 0, 1) == held(m, 0, 2) == [2, 3, 4, 5], "the window before the last chunk, and the chunk"
    assert m.grow(np.array([0]))
    assert held(m, 0, 1) == [4, 5, 6], "position 12 sees 9 to 12"
    assert hit(m, [*text[:8], 99, 98]).blocks == 4, "released blocks are cached"
    assert int(m.pool.num_cached) == 2 * 4
    m.check()


@pytest.mark.parametrize("chunk", [1, 3, 4, 7])
def test_a_sequence_never_holds_more_than_a_window_a_chunk_and_a_block(chunk):
    m = manager(200, kinds(0, 1, windows=[4]), width=40)
    text = list(range(64))
    assert m.admit(0, hit(m, text), len(text), chunk)
    most = -(-(3 + chunk) // P) + 1
    for start in range(0, 64, chunk):
        assert m.extend(0, start, min(64, start + chunk))
        m.tables.lengths[0] = min(64, start + chunk)
        assert len(held(m, 0, 0)) <= most
    for position in range(64, 72):
        m.grow(np.array([0]))
        m.tables.lengths[0] = position + 1
        assert len(held(m, 0, 0)) <= 3
    assert int(m.pool.num_free) == 200 - len(held(m, 0, 0)), "nothing was published"


def test_a_window_of_one_needs_nothing_before_it():
    m = manager(40, kinds(1, 1, windows=[1]), width=16)
    admit(m, 0, list(range(9)), chunk=3)
    end(m, 0, list(range(9)))
    found = hit(m, [*range(6), 50, 51])
    assert found.blocks == 3 and (found.ids[1] == -1).all() and (found.ids[0] >= 0).all()


def test_the_hit_is_what_every_kind_serves_and_each_has_a_reason():
    m = manager(23, LAYOUT, width=16)
    text = list(range(12))
    admit(m, 0, text, chunk=4)
    end(m, 0, text)  # 6 blocks full, 2 x 6 sliding, all cached
    found = hit(m, [*text, 99])
    assert [(h.kind, h.tokens, h.reason) for h in found.kinds] == [
        ("full", 12, "complete"),
        ("sliding(4)", 12, "complete"),
    ]
    assert found.ids.shape == (3, 6) and (found.ids[1:, :4] == -1).all() and (found.ids[1:, 4:] >= 0).all()
    other = hit(m, [*text[:6], 99, 98, 97])
    assert (other.blocks, other.reason, other.known) == (3, "absent", 3)
    # Another prompt evicts blocks 0 and 1 of the window first: they are before no known shared prefix end.
    admit(m, 1, [50, 51, 52, 53, 54, 55], chunk=6)
    assert [(h.tokens, h.reason) for h in hit(m, [*text[:6], 99, 98, 97]).kinds] == [
        (6, "absent"),
        (0, "window evicted"),
    ]
    assert hit(m, [*text[:6], 99, 98, 97]).reason == "window evicted"
    assert hit(m, [*text, 99]).blocks == 6, "the end of the prompt is still a hit"


def test_the_window_where_prompts_diverge_stays_cached_with_the_prefix():
    """The second prompt diverges after 6 tokens, where no window is cached; the third one hits."""
    m = manager(24, LAYOUT, width=16)
    first, common = list(range(12)), list(range(6))
    admit(m, 0, first, chunk=4)
    end(m, 0, first)
    admit(m, 0, list(range(70, 82)), chunk=4)  # evicts the first prompt's blocks that are marked to go first
    end(m, 0, list(range(70, 82)))
    second = [*common, 40, 41, 42, 43, 44, 45]
    found = hit(m, second)
    assert (found.blocks, found.known, found.reason) == (0, 3, "window evicted")
    admit(m, 0, second, chunk=4)
    end(m, 0, second)
    admit(m, 0, [90 + i for i in range(8)], chunk=4)
    end(m, 0, [90 + i for i in range(8)])
    third = [*common, 60, 61, 62]
    assert hit(m, third).blocks == 3


def test_the_end_of_a_prefix_is_evicted_before_its_start_in_all_kinds():
    m = manager(18, LAYOUT, width=16)
    text = list(range(12))
    admit(m, 0, text, chunk=12)
    end(m, 0, text)
    served = []
    for row in range(4):
        admit(m, row, [50 + row, 60])  # three blocks each
        served.append(hit(m, [*text, 99]).blocks)
    assert served == sorted(served, reverse=True) and served[-1] >= 2


def test_blocks_published_together_are_evicted_together():
    m = manager(9, kinds(0, 3, windows=[8]))
    admit(m, 0, [1, 2, 3, 4, 5])
    end(m, 0, [1, 2, 3, 4, 5])
    assert int(m.pool.num_cached) == 6
    m.pool, _, evicted, _ = pools.allocate(m.pool, 4)  # one of the second block's three
    m._evicted.append(evicted)
    m.take_evicted()
    assert int(m.pool.num_cached) == 3 and int(m.pool.num_free) == 2
    assert hit(m, [1, 2, 3, 4, 5]).blocks == 1


def test_check_finds_missing_blocks_and_a_block_of_two_groups():
    m = manager(40, LAYOUT, width=16)
    admit(m, 0, list(range(12)), chunk=4)
    m.tables.firsts[1, 0] = 6
    with pytest.raises(PoolInvariantError, match=r"row 0 of 12 positions holds .* of sliding\(4\)"):
        m.check()
    m.tables.firsts[1, 0] = 2
    m.tables.blocks[1, 0, 3] = m.tables.blocks[0, 0, 3]
    with pytest.raises(PoolInvariantError, match="block|count"):
        m.check()


@pytest.mark.parametrize("published", [True, False])
def test_a_plan_of_many_steps_passes_several_boundaries_with_two_slots_per_row(published):
    m = BlockManager(60, ROWS, WIDTH, P, state_slots=2 * ROWS)
    states = m.states
    for row in range(ROWS):
        text = np.array([row] * P, np.int32)
        assert m.admit(row, m.lookup(text, m.digests(text, ROOT), ROOT), len(text), len(text))
        states.begin()
        states.chunk(row, P)
        m.tables.lengths[row] = P
        if published:
            m.publish(row, text, m.digests(text, ROOT), ROOT, 0, 1)
    states.begin()
    decoding = np.arange(ROWS - 1)
    moves = [states.step(decoding) for _ in range(3 * P)]
    read = {slot for sources, _ in moves for slot in sources.tolist()}
    (part,) = states.chunk(ROWS - 1, P + 1)
    assert part.target not in read, "a plan runs prefills before decode steps"
    for (_, targets), (sources, _) in zip(moves, moves[1:], strict=False):
        assert (targets == sources).all() and len(set(targets.tolist())) == len(targets)
    positions = {position for row in range(ROWS - 1) for position, _ in states.unpublished.get(row, ())}
    assert positions == (set() if published else {3 * P}), "the latest boundary is kept if a slot is available"
    m.check()
