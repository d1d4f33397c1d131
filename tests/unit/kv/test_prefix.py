"""Prefix index: digests, longest-prefix matches, reasons of misses, and digest collisions."""

import hashlib

import numpy as np
import pytest

from jaxinfer.kv import prefix
from jaxinfer.kv.digests import block_digest, root
from jaxinfer.kv.pool import BlockPool, PoolInvariantError, allocate, publish
from jaxinfer.kv.prefix import PrefixIndex
from jaxinfer.kv.prefix_node import MatchEnd

P = 4
ROOT = root(b"model")
TOKENS = np.arange(100, 115, dtype=np.int32)  # three full blocks and three tokens more


def filled(tokens: np.ndarray, ids: list[int], start: bytes = ROOT) -> PrefixIndex:
    index = PrefixIndex(P)
    put(index, tokens, ids, start)
    return index


def put(index: PrefixIndex, tokens: np.ndarray, ids: list[int], start: bytes = ROOT) -> list[bool]:
    """Insert the first len(ids) blocks of the tokens."""
    parent, done = start, []
    for number, (digest, block_id) in enumerate(zip(index.chain(tokens, start), ids, strict=False)):
        done.append(index.insert(digest, parent, tokens[number * P : (number + 1) * P], (block_id,)))
        parent = digest
    return done


def look_up(index: PrefixIndex, tokens: np.ndarray, start: bytes = ROOT) -> tuple[list[int], MatchEnd]:
    found = index.match(index.chain(tokens, start), tokens, start)
    ids = [node.ids[0][0] if node.ids[0] else None for node in found.nodes]
    if None in ids:
        return ids[: ids.index(None)], MatchEnd.EVICTED
    return ids, found.reason


def test_a_digest_is_the_chained_sha256_of_little_endian_tokens() -> None:
    first = hashlib.sha256(ROOT + b"".join(int(t).to_bytes(4, "little") for t in TOKENS[:4])).digest()
    second = hashlib.sha256(first + b"".join(int(t).to_bytes(4, "little") for t in TOKENS[4:8])).digest()
    assert block_digest(ROOT, TOKENS[:4]) == first
    assert block_digest(ROOT, TOKENS[:4].astype(np.int64)) == first
    assert block_digest(ROOT, TOKENS[:4].tobytes()) == first
    assert PrefixIndex(P).chain(TOKENS, ROOT)[:2] == [first, second]


def test_a_root_depends_on_the_boundaries_between_salt_parts() -> None:
    salts = [(), (b"",), (b"", b""), (b"ab", b"c"), (b"a", b"bc"), (b"abc",)]
    assert len({root(*salt) for salt in salts}) == len(salts)
    assert root(b"a", b"b") == root(b"a", b"b") and len(ROOT) == 32


@pytest.mark.parametrize("length", [0, 1, P - 1, P, P + 1, 2 * P])
def test_only_full_blocks_have_digests(length: int) -> None:
    assert len(PrefixIndex(P).chain(TOKENS[:length], ROOT)) == length // P


def test_a_chain_is_extended_by_hashing_the_new_blocks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    index = PrefixIndex(P)
    whole = index.chain(TOKENS, ROOT)
    hashed = []
    monkeypatch.setattr(prefix, "block_digest", lambda *a: hashed.append(a) or block_digest(*a))
    start = index.chain(TOKENS[:9], ROOT)
    assert index.chain(TOKENS, ROOT, start) == whole and len(hashed) == 3
    assert index.chain(TOKENS, ROOT, whole) == whole and len(hashed) == 3
    assert len(start) == 2


def test_the_longest_published_prefix_is_found() -> None:
    index = filled(TOKENS, [7, 5, 6])
    assert look_up(index, TOKENS) == ([7, 5, 6], MatchEnd.COMPLETE)
    other = TOKENS.copy()
    other[9] = 1
    assert look_up(index, other) == ([7, 5], MatchEnd.ABSENT)
    other[0] = 1
    assert look_up(index, other) == ([], MatchEnd.ABSENT)
    assert look_up(index, TOKENS[:3]) == ([], MatchEnd.NO_FULL_BLOCK)
    [node], reason = index.match(index.chain(TOKENS, ROOT)[:1], TOKENS, ROOT)
    assert (node.ids, reason) == ([(7,)], MatchEnd.COMPLETE)


def test_another_salt_is_never_a_hit() -> None:
    index = filled(TOKENS, [7, 5, 6])
    assert look_up(index, TOKENS, root(b"other")) == ([], MatchEnd.SALT)
    assert look_up(index, TOKENS + 1, root(b"other")) == ([], MatchEnd.ABSENT)
    index.evict([6, 5, 7])
    assert look_up(index, TOKENS, root(b"other")) == ([], MatchEnd.ABSENT)


def test_the_same_tokens_after_another_prefix_are_not_a_hit() -> None:
    tokens = np.tile(TOKENS[:P], 3)
    assert look_up(filled(tokens, [0]), tokens) == ([0], MatchEnd.ABSENT)


def test_the_first_block_of_a_digest_stays() -> None:
    index = filled(TOKENS, [7, 5])
    assert put(index, TOKENS, [1, 2, 3]) == [False, False, True]
    assert look_up(index, TOKENS)[0] == [7, 5, 3] and len(index) == 3


def test_an_evicted_block_is_a_miss_with_that_reason_and_can_be_inserted_again() -> None:
    index = filled(TOKENS, [7, 5, 6])
    index.evict(np.array([5, -1, 99], np.int32))
    assert look_up(index, TOKENS) == ([7], MatchEnd.EVICTED) and len(index) == 2
    other = TOKENS + 1
    assert put(index, other, [5]) == [True]
    assert look_up(index, other)[0] == [5] and look_up(index, TOKENS)[0] == [7]
    assert put(index, TOKENS, [7, 8]) == [False, True]
    assert look_up(index, TOKENS) == ([7, 8, 6], MatchEnd.COMPLETE)
    index.evict([8])
    assert look_up(index, TOKENS) == ([7], MatchEnd.EVICTED)


def test_the_memory_of_evictions_is_bounded() -> None:
    index = PrefixIndex(P, remember_evicted=1)
    put(index, TOKENS, [0, 1])
    index.evict([1, 0])
    assert look_up(index, TOKENS)[1] is MatchEnd.EVICTED
    put(index, TOKENS, [0])
    index.evict([0])
    put(index, TOKENS + 1, [1])
    index.evict([1])
    assert look_up(index, TOKENS)[1] is MatchEnd.ABSENT
    assert look_up(index, TOKENS + 1)[1] is MatchEnd.EVICTED


def test_the_latest_evictions_are_remembered() -> None:
    index = PrefixIndex(P, remember_evicted=2)
    first, second, third = TOKENS[:P], TOKENS[:P] + 1, TOKENS[:P] + 2
    for tokens in (first, second, first, third):
        put(index, tokens, [0])
        index.evict([0])
    reasons = [look_up(index, tokens)[1] for tokens in (first, second, third)]
    assert reasons == [MatchEnd.EVICTED, MatchEnd.ABSENT, MatchEnd.EVICTED]


def test_clear_forgets_everything() -> None:
    index = filled(TOKENS, [7, 5, 6])
    index.evict([6])
    index.clear()
    assert len(index) == 0 and look_up(index, TOKENS) == ([], MatchEnd.ABSENT)
    assert put(index, TOKENS, [5, 7, 6]) == [True, True, True]


def test_a_collision_of_different_tokens_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "block_digest", lambda parent, tokens, extra: bytes(32))
    index = filled(TOKENS, [7])
    assert look_up(index, TOKENS) == ([7], MatchEnd.COLLISION)
    assert look_up(index, TOKENS + 1) == ([], MatchEnd.COLLISION)
    assert put(index, TOKENS + 1, [3]) == [False]
    assert look_up(index, TOKENS[:P])[0] == [7]


def test_a_collision_of_different_prefixes_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "block_digest", lambda parent, tokens, extra: hashlib.sha256(tokens).digest())
    tokens = np.concatenate([TOKENS[:P], TOKENS[P : 2 * P]])
    index = filled(tokens, [1, 2])
    assert look_up(index, tokens)[0] == [1, 2]
    assert look_up(index, tokens[P:]) == ([], MatchEnd.COLLISION)
    assert look_up(index, tokens, root(b"other")) == ([], MatchEnd.COLLISION)
    assert look_up(index, np.concatenate([tokens[:P], tokens[:P]])) == ([1], MatchEnd.COLLISION)


def test_inserting_a_block_that_was_not_evicted_raises() -> None:
    index = filled(TOKENS, [7, 5])
    with pytest.raises(PoolInvariantError, match="block 7 is in the prefix index with different content"):
        put(index, TOKENS + 1, [7])
    with pytest.raises(ValueError, match="tokens must be a full block of 4, got 3 tokens"):
        index.insert(b"digest", ROOT, TOKENS[:3], (1,))
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        PrefixIndex(0)


def test_check_compares_the_index_with_the_pool() -> None:
    pool, ids, _, _ = allocate(BlockPool.create(4), 3)
    index = filled(TOKENS, [0, 1])
    pool = publish(pool, [0])
    with pytest.raises(PoolInvariantError, match=r"only in the index: \[1\]"):
        index.check(pool)
    pool = publish(pool, [1])
    index.check(pool)
    index._owners[3] = index._owners[0]
    with pytest.raises(PoolInvariantError, match="name 2 blocks, 3 blocks name an entry"):
        index.check(pool)
    del index._owners[3]
    with pytest.raises(PoolInvariantError, match=r"only in the pool: \[2\]"):
        index.check(publish(pool, ids))


def test_kinds_have_their_own_blocks_of_a_node() -> None:
    index = PrefixIndex(P, kinds=2)
    digests, data = index.chain(TOKENS, ROOT), [TOKENS[i * P : (i + 1) * P] for i in range(3)]
    parents = [ROOT, *digests]
    for number in range(3):
        assert index.insert(digests[number], parents[number], data[number], (number,), 0)
    assert index.insert(digests[2], parents[2], data[2], (7, 8), 1)
    assert not index.insert(digests[2], parents[2], data[2], (5, 6), 1)
    assert [node.ids for node in index.nodes(digests)] == [[(0,), ()], [(1,), ()], [(2,), (7, 8)]]
    assert index.evict([7]) == [8], "blocks published together are evicted together"
    assert index.evict([0, 1]) == [] and len(index) == 1
    found = index.match(digests, TOKENS, ROOT)
    assert [node.ids[0] for node in found.nodes] == [(), (), (2,)], "nodes stay for verification"
    assert index.evict([2]) == [] and digests[0] not in index and len(index) == 0
    assert index.match(digests, TOKENS, ROOT) == ([], MatchEnd.EVICTED)


def test_withdrawing_blocks_removes_all_that_was_published_with_them() -> None:
    index = PrefixIndex(P, kinds=2)
    put(index, TOKENS, [0, 1, 2])
    digests = index.chain(TOKENS, ROOT)
    index.insert(digests[1], digests[0], TOKENS[P : 2 * P], (5, 6), 1)
    assert sorted(index.withdraw(digests[1:])) == [1, 2, 5, 6]
    assert look_up(index, TOKENS) == ([0], MatchEnd.EVICTED)
