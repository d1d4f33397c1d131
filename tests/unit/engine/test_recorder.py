"""Recordings of an engine: who owns which block, forks, copies on write, preemptions, and what each sequence did."""

import numpy as np
import pytest
from support.tiny import BLOCK, make_engine, make_request, prompt, run

from jaxinfer.engine import cache_state
from jaxinfer.engine.recorder import Recorder, block_codes
from jaxinfer.kv.contiguous import Regions, RowManager
from jaxinfer.kv.groups import KindGroups
from jaxinfer.kv.spec import Kind
from jaxinfer.recording.events import CACHED, FREE
from jaxinfer.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=10)


def recorded(runner, requests, **settings):
    """Run requests in a new engine with a recording."""
    engine = make_engine(runner, **settings)
    engine.recorder = Recorder(engine.manager)
    run(engine, requests)
    return engine, engine.recorder.read(engine.scheduler)


def test_codes_are_what_the_pool_counts(runner):
    engine = make_engine(runner, pool_blocks=24)
    engine.recorder = Recorder(engine.manager)
    params = SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=9)
    for name, length in (("a", 14), ("b", 9), ("c", 14)):
        engine.add(make_request(name, prompt(length), params))
    kinds = set()
    while engine.has_work:
        engine.step()
        codes, pool = engine.recorder.log.codes, engine.manager.pool
        holders = np.where(codes > FREE, 1, np.where(codes < CACHED, -codes, 0))
        assert holders.tolist() == pool.refs.tolist()
        assert ((codes == CACHED) == (pool.published & (pool.refs == 0))).all()
        assert engine.recorder.read(engine.scheduler).blocks(1)[:, 0].tolist() == codes.tolist()
        kinds |= set(np.sign(np.clip(codes, -2, 1)).tolist()) | ({-3} if (codes <= -3).any() else set())
    assert kinds == {-3, -1, 0, 1}, "three samples shared blocks, some were cached, free, or of one owner"


def test_a_fork_and_its_copies_on_write_are_seen(runner):
    length = BLOCK + 2  # a full block, which stays shared, and one that each sample goes on to write
    engine, found = recorded(
        runner, [make_request("a", prompt(length), SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=6))]
    )
    forks = [(step.number, step.forks) for step in found.steps if step.forks]
    assert forks == [(0, ((0, 1), (0, 2)))]
    copied = [step for step in found.steps if step.copies]
    assert [len(step.copies) for step in copied] == [2], "the last of three holders writes in place"
    step, blocks = copied[0], found.blocks()
    [source] = {source for source, _ in step.copies}
    targets = [target for _, target in step.copies]
    assert blocks[source, step.number - 1] == -3 and blocks[source, step.number] > 0
    owners = {int(blocks[block, step.number]) - 1 for block in [source, *targets]}
    assert owners == {0, 1, 2}, "each sample owns one of the three"
    assert [found.owners[number].label for number in (0, 1, 2)] == ["a #0", "a #1", "a #2"]
    assert (blocks[:, -1] <= 0).all() and (blocks[:, -1] == CACHED).any(), "in the end blocks are cached or free"
    assert engine.manager.pool.num_held == 0


def test_preemptions_and_waiting_are_in_the_timeline(runner):
    requests = [make_request(f"{i}", prompt(12, i), SamplingParams(temperature=0, max_tokens=20)) for i in range(3)]
    engine, found = recorded(runner, requests, pool_blocks=14)
    assert engine.scheduler.preempted > 0
    assert sum(len(step.preempted) for step in found.steps) == engine.scheduler.preempted
    rows = {row.owner.request_id: row for row in found.timeline.rows}
    preempted = [name for name, row in rows.items() if row.seconds("preempted")]
    assert preempted == [request.id for request in requests if request.preemptions]
    for row in rows.values():
        phases = [span.phase for span in row.spans]
        assert "prefill" in phases and phases[-1] == "decode" and row.owner.finish_reason == "length"
        assert row.owner.tokens == 20
        assert all(a.stop == pytest.approx(b.start) for a, b in zip(row.spans, row.spans[1:])), "no gaps"
        assert all(a.phase != b.phase for a, b in zip(row.spans, row.spans[1:])), "joined"


def test_a_sequence_that_ends_while_its_next_step_runs_is_one_owner(runner):
    _, found = recorded(runner, [make_request(f"{i}", prompt(5, i), GREEDY) for i in range(3)])
    assert sorted(owner.request_id for owner in found.owners.values()) == ["0", "1", "2"]
    assert all(owner.end is not None for owner in found.owners.values())


def test_rows_of_a_contiguous_cache_own_their_regions():
    manager = RowManager(Regions(rows=3, width=2, groups=2), block_size=4, kinds=[KindGroups(Kind(), count=2)])
    assert manager.admit(1, manager.lookup(), 5)
    [sequence] = make_request("a", prompt(5), GREEDY).sequences
    sequence.row = 1
    codes = block_codes(manager, [sequence], lambda sequence: 7)
    assert codes.tolist() == [0, 0, 8, 8, 0, 0] * 2


def test_an_abort_outside_of_steps_is_seen(runner):
    engine = make_engine(runner)
    engine.recorder = Recorder(engine.manager)
    engine.add(make_request("a", prompt(6), GREEDY))
    engine.step()
    engine.add(make_request("b", prompt(6), GREEDY))
    before = engine.recorder.read(engine.scheduler)
    assert [row.spans[-1].phase for row in before.timeline.rows] == ["prefill", "waiting"]
    engine.abort("a"), engine.abort("b")
    after = engine.recorder.read(engine.scheduler)
    assert [owner.finish_reason for owner in after.owners.values()] == ["abort", "abort"]
    assert [owner.finish_reason for owner in before.owners.values()] == [None, None], "a recording is a value"


def test_without_a_recording_nothing_is_kept(runner, monkeypatch):
    called = []
    monkeypatch.setattr("jaxinfer.engine.recorder.block_codes", lambda *_: called.append(1))
    engine = make_engine(runner)
    run(engine, [make_request("a", prompt(6), GREEDY)])
    assert engine.recorder is None and called == []


def test_a_recording_that_fails_ends_no_request(runner, monkeypatch, caplog):
    engine = make_engine(runner)
    engine.recorder = Recorder(engine.manager)
    monkeypatch.setattr(engine.recorder, "observe", lambda *_: 1 / 0)
    assert len(run(engine, [make_request("a", prompt(6), GREEDY)])[0][0]) == 10
    assert engine.recorder is None and "the recording failed" in caplog.text


def test_the_state_of_the_cache_has_requests_lookups_and_the_prefix_tree(runner):
    engine = make_engine(runner)
    shared = prompt(2 * BLOCK)
    run(engine, [make_request("a", [*shared, *prompt(BLOCK + 1, 5)], GREEDY)])
    for name, seed in (("b", 6), ("c", 7)):
        engine.add(make_request(name, [*shared, *prompt(BLOCK + 1, seed)], GREEDY))
    for _ in range(3):
        engine.step()
    state = cache_state.read(engine, lambda tokens: "<" + ",".join(map(str, tokens)) + ">")
    assert {request.owner.request_id: request.owner.cached_tokens for request in state.requests} == {
        "b": 2 * BLOCK,
        "c": 2 * BLOCK,
    }
    assert [request.phase for request in state.requests] == ["decode", "decode"]
    assert dict(state.lookups) == {"absent": 3}
    assert state.counts["shared"] == 2 and state.hit_tokens == 4 * BLOCK
    root, *branches = state.prefixes
    assert (root.depth, root.blocks, root.holders) == (0, 2, 2) and root.tokens == tuple(shared)
    assert root.text == "<" + ",".join(map(str, shared)) + ">"
    assert sorted((p.depth, p.holders) for p in branches) == [(1, 0), (1, 1), (1, 1)]
    assert sum(p.blocks for p in state.prefixes) == len(engine.manager.index) and state.more_prefixes == 0
    engine.recorder = Recorder(engine.manager)
    engine.step()
    same = cache_state.read(engine, tree=False)
    assert same.prefixes == () and {r.owner.number for r in same.requests} == {0, 1}
    runs = same.as_dict()["codes"]
    assert np.repeat([code for code, _ in runs], [n for _, n in runs]).tolist() == same.codes.tolist()
    engine.close()


def test_blocks_in_a_row_are_apart_in_the_tree_where_their_holders_differ(runner):
    engine = make_engine(runner)
    first = prompt(4 * BLOCK)
    run(engine, [make_request("a", [*first, 5], SamplingParams(temperature=0, max_tokens=1))])
    engine.add(make_request("b", first[: 2 * BLOCK + 1], GREEDY))
    engine.step()
    state = cache_state.read(engine)
    assert [(p.blocks, p.holders) for p in state.prefixes] == [(2, 1), (2, 0)], "no branch, and b holds the first two"
    assert [p.tokens for p in state.prefixes] == [tuple(first[: 2 * BLOCK]), tuple(first[2 * BLOCK :])]
    assert "2 block(s), 1 sequence" in repr(state) and "2 block(s), cached" in repr(state)
    engine.close()


def test_more_prefixes_than_are_shown_are_counted(runner, monkeypatch):
    monkeypatch.setattr(cache_state, "MOST_PREFIXES", 2)
    engine = make_engine(runner)
    run(engine, [make_request(f"{i}", prompt(2 * BLOCK + 1, i), GREEDY) for i in range(3)])
    state = cache_state.read(engine)
    assert len(state.prefixes) == 2
    assert sum(p.blocks for p in state.prefixes) + state.more_prefixes == len(engine.manager.index)
