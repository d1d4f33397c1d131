"""What the draft model's cache holds of a sequence, against a model that stores tokens in place of keys."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import make_request

from jaxinfer.engine.speculation.draft_keys import DraftKeys
from jaxinfer.kv.digests import block_digest
from jaxinfer.kv.groups import KindGroups
from jaxinfer.kv.spec import Kind, Window
from jaxinfer.kv.tables import Tables
from jaxinfer.sampling_params import SamplingParams

SIZE, WIDTH, BLOCKS, ROWS = 4, 5, 10, 2
NONE = np.empty(0, np.int32)


class Cache:
    """A cache of two rows over few blocks, which holds the tokens that were written and all before them."""

    def __init__(self):
        self.tables = Tables(ROWS, WIDTH, SIZE, (KindGroups(Window(9)), KindGroups(Kind(), 1)))
        self.keys = DraftKeys(self.tables, BLOCKS)
        self.written = {}
        self.running = {}

    def admit(self, row, tokens, blocks, hashed):
        sequence = make_request("x", tokens, SamplingParams(max_tokens=SIZE * WIDTH - len(tokens))).sequences[0]
        sequence.prepare()
        sequence.row = row
        self.tables.blocks[1, row] = blocks
        if hashed:
            self.hash(sequence)
        self.running[row] = sequence

    def hash(self, sequence):
        parent, sequence.digests = b"", []
        for number in range(sequence.length // SIZE):
            parent = block_digest(parent, sequence.tokens[number * SIZE : (number + 1) * SIZE])
            sequence.digests.append(parent)

    def check(self, row):
        """Check that what is known was written with the sequence's own tokens; return how much it is."""
        sequence = self.running[row]
        known = self.keys.known(sequence)
        assert 0 <= known < sequence.length
        for at in range(known):
            block = self.tables.blocks[1, row, at // SIZE]
            assert self.written[block, at % SIZE] == tuple(sequence.tokens[: at + 1].tolist())
        return known

    def write(self, row, stop, draft):
        sequence, start = self.running[row], self.check(row)
        stop = max(start + 1, min(stop, sequence.length))
        draft = draft if stop == sequence.length else NONE
        tokens = [*sequence.tokens[:stop].tolist(), *draft.tolist()]
        for at in range(start, len(tokens)):
            self.written[self.tables.blocks[1, row, at // SIZE], at % SIZE] = tuple(tokens[: at + 1])
        self.keys.wrote(sequence, start, stop, draft)
        return stop

    def leave(self, row):
        self.keys.leave(self.running.pop(row))


@given(st.data())
def test_known_positions_hold_the_sequences_own_tokens(data):
    """Rows come and go over the same blocks, share prefixes, and accept a part of each draft."""
    cache, token = Cache(), st.integers(0, 1)
    for _ in range(data.draw(st.integers(1, 20))):
        row = data.draw(st.integers(0, ROWS - 1))
        if row not in cache.running:
            tokens = data.draw(st.lists(token, min_size=1, max_size=11))
            taken = {b for other in cache.running for b in cache.tables.blocks[1, other].tolist()}
            free = [b for b in range(BLOCKS) if b not in taken]
            cache.admit(row, tokens, np.array(data.draw(st.permutations(free))[:WIDTH]), data.draw(st.booleans()))
            continue
        sequence = cache.running[row]
        if sequence.length + 9 > SIZE * WIDTH:
            cache.leave(row)
            continue
        draft = np.array(data.draw(st.lists(token, max_size=3)), np.int32)
        cache.write(row, data.draw(st.integers(1, sequence.length)), draft)
        right = data.draw(st.integers(0, len(draft)))
        others = data.draw(st.lists(token, min_size=1, max_size=3))
        for one in [*draft[:right].tolist(), *others] * data.draw(st.booleans()):
            sequence.add(one)
        if data.draw(st.booleans()) and sequence.digests:
            cache.hash(sequence)
        cache.check(row)
        if data.draw(st.integers(0, 3)) == 0:
            cache.leave(row)


def test_right_drafts_and_full_blocks_stay_known():
    cache, blocks = Cache(), np.array([5, 2, 7, -1, -1])
    cache.admit(0, [1] * 6, blocks, hashed=True)
    assert cache.check(0) == 0
    cache.write(0, 6, np.array([3, 4, 5, 6], np.int32))
    for token in (3, 4, 9, 8):
        cache.running[0].add(token)
    assert cache.check(0) == 8, "the tokens of the prompt, and two of the draft"
    cache.hash(cache.running[0])
    cache.leave(0)
    for tokens, known in (([1] * 6 + [3, 4, 0], 8), ([1] * 6 + [3, 3, 0], 4), ([2] * 6, 0)):
        cache.admit(1, tokens, blocks, hashed=True)
        assert cache.check(1) == known
        cache.leave(1)


def test_blocks_that_another_sequence_has_written():
    for stop in (3, 4):
        cache, blocks = Cache(), np.array([5, 2, 7, -1, -1])
        for tokens, hashed in (([1] * 9, True), ([2] * 9, False), ([1] * 9, True)):
            cache.admit(0, tokens, blocks, hashed=hashed)
            assert cache.check(0) == 0, f"others have written {stop} positions of the first block"
            cache.write(0, stop if tokens[0] == 2 else 9, NONE)
            cache.leave(0)
