"""The scheduler alone, with a simulated host whose sampled tokens are arbitrary."""

from types import SimpleNamespace
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import BLOCK, make_request, prompt

from jaxinfer.engine.plan import Limits
from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.engine.sequence_state import Status
from jaxinfer.engine.waiting import Waiting
from jaxinfer.kv.groups import SINGLE, KindGroups, blocks_needed
from jaxinfer.kv.manager import BlockManager
from jaxinfer.kv.spec import Kind, Window
from jaxinfer.media import CrossInputs, EncoderInput, PlacedInputs
from jaxinfer.sampling_params import SamplingParams

ROWS = 4


def make(blocks=32, tokens=16, rows=ROWS, **limits):
    manager = BlockManager(blocks, rows, 32, BLOCK)
    return Scheduler(manager, Limits(tokens, rows, **limits))


def new(name, length, n=1, made=6):
    return make_request(name, prompt(length, crc32(name.encode())), SamplingParams(seed=1, n=n, max_tokens=made))


class Host:
    """Runs plans as the engine does, one step behind; each sampled token is its position."""

    def __init__(self, scheduler, most=1):
        self.scheduler, self.flight, self.plans, self.most = scheduler, None, [], most

    def step(self):
        plan = self.scheduler.schedule(self.most)
        self.plans.append(plan)
        for chunk in plan.chunks:
            self.scheduler.publisher.publish(chunk.sequence)
        self.commit()
        self.flight = plan
        self.scheduler.manager.check()
        return plan

    def commit(self):
        plan, self.flight = self.flight, None
        for sequence in [] if plan is None else [s for _, s in plan.samples] + plan.decodes * plan.steps:
            sequence.pending -= 1
            if sequence.status is not Status.FINISHED:
                reason = sequence.add(sequence.length % 90)
                if reason is not None:
                    self.scheduler.finish(sequence, reason)

    def run(self, most=500):
        for _ in range(most):
            if not (self.scheduler.has_work or self.flight):
                return
            self.step()
        raise AssertionError(f"no end after {most} steps")


def test_states_of_a_sequence():
    scheduler = make()
    host, request = Host(scheduler), new("a", 6, made=2)
    [sequence] = request.sequences
    scheduler.add(request)
    assert sequence.status is Status.WAITING and scheduler.has_work and not scheduler.rows.active
    host.step()
    assert sequence.status is Status.RUNNING and scheduler.rows.num_used == 1
    scheduler.preempt(sequence)
    assert sequence.status is Status.WAITING and sequence.row == -1 and request.preemptions == 1
    assert int(scheduler.manager.pool.num_held) == 0
    host.step()  # a token is in flight: not admitted yet
    assert sequence.status is Status.WAITING
    host.run()
    assert sequence.status is Status.FINISHED and sequence.finish_reason == "length"
    assert sequence.output_ids.tolist() == [6, 7]
    scheduler.finish(sequence, "abort")
    assert sequence.finish_reason == "length", "ending it again has no effect"


def test_images_stay_while_a_sample_may_be_preempted_and_go_with_the_last():
    scheduler = make(feature_slots=4)
    host, request = Host(scheduler), new("a", 6, n=2)
    request.inputs = PlacedInputs((EncoderInput("image", np.zeros((1, 2), np.float32), rows=4),), np.arange(1, 5))
    scheduler.add(request)
    host.step()
    first, second = request.sequences
    scheduler.finish(first, "abort")
    scheduler.preempt(second)
    host.step()
    while second.status is Status.WAITING:  # it reads the image again
        assert request.inputs is not None
        host.step()
    assert len(host.plans[-1].encodes) + host.plans[-1].reused == 1
    host.run()
    assert request.finished and request.inputs is None
    scheduler.encoder_cache.check()


@pytest.mark.parametrize("values", [np.zeros((1, 2), np.float32), np.array([4, 5], np.int32)])
def test_encoder_inputs_are_dropped_at_the_end_unless_text(values):
    request = new("a", 6)
    request.cross = CrossInputs((EncoderInput("any", values, rows=1),))
    request.drop_inputs()
    assert (request.cross is None) == (values.dtype == np.float32)


def test_first_come_first_served():
    scheduler = make(tokens=8)
    requests = [new(str(i), 7) for i in range(6)]
    for request in requests:
        scheduler.add(request)
    host = Host(scheduler)
    host.run()
    order = []
    for plan in host.plans:
        order += [c.sequence.request.id for c in plan.chunks if c.sequence.request.id not in order]
    assert order == [r.id for r in requests]


def test_a_request_that_does_not_fit_waits_and_is_not_overtaken():
    scheduler = make(blocks=6)
    for name, length in (("first", 12), ("large", 16), ("small", 2)):
        scheduler.add(new(name, length, made=2))
    plan = scheduler.schedule()
    assert [c.sequence.request.id for c in plan.chunks] == ["first"]
    assert [s.request.id for s in scheduler.waiting] == ["large", "small"]


@pytest.mark.parametrize("tokens", [1, 2, 5, 16])
def test_the_budget_is_respected(tokens):
    scheduler = make(tokens=tokens)
    for i, length in enumerate((11, 3, 20, 7, 1, 9)):
        scheduler.add(new(str(i), length))
    host = Host(scheduler)
    host.run()
    used = [sum(c.count for c in plan.chunks) + len(plan.decodes) for plan in host.plans]
    assert max(used) == tokens or tokens == 16
    assert max(used) <= tokens


def test_chunks_of_a_prompt_follow_each_other():
    scheduler = make(tokens=5)
    scheduler.add(new("a", 13))
    host = Host(scheduler)
    host.run()
    spans = [(c.start, c.count) for plan in host.plans for c in plan.chunks]
    assert spans == [(0, 5), (5, 5), (10, 3)]
    assert [len(plan.samples) for plan in host.plans[:4]] == [0, 0, 1, 0]


def test_admission_is_a_transaction():
    scheduler = make(blocks=5)
    scheduler.add(new("a", 12))
    scheduler.schedule()
    manager = scheduler.manager
    pool, blocks, counts = manager.pool, manager.tables.blocks.copy(), manager.tables.counts.copy()
    large = new("b", 12).sequences[0]
    assert not scheduler.admission.admit(large, 16)
    assert manager.pool is pool
    np.testing.assert_array_equal(manager.tables.blocks, blocks)
    np.testing.assert_array_equal(manager.tables.counts, counts)
    assert large.status is Status.WAITING and large.row == -1 and scheduler.rows.num_used == 1


def test_the_youngest_is_preempted_and_comes_back_first():
    scheduler = make(blocks=7)
    requests = [new(name, 3, made=12) for name in "abc"]
    for request in requests:
        scheduler.add(request)
    host = Host(scheduler)
    while not scheduler.preempted:
        host.step()
    assert [r.preemptions for r in requests] == [0, 0, 1]
    assert next(iter(scheduler.waiting)).request.id == "c"
    host.run()
    assert requests[0].preemptions == 0
    assert all(r.sequences[0].output_ids.tolist() == list(range(3, 15)) for r in requests)
    assert scheduler.preempted == sum(r.preemptions for r in requests)


def test_forks_share_and_take_only_the_rows_there_are():
    scheduler = make()
    scheduler.add(new("a", 3))
    request = new("n", 6, n=5)
    scheduler.add(request)
    plan = scheduler.schedule()
    states = [s.status for s in request.sequences]
    assert states == [Status.RUNNING] * 3 + [Status.WAITING] * 2
    assert [(chunk, s.index) for chunk, s in plan.samples[1:]] == [(1, 0), (1, 1), (1, 2)]
    refs = scheduler.manager.pool.refs
    assert sorted(refs[refs > 0].tolist()) == [1, 3, 3]
    host = Host(scheduler)
    host.flight = plan
    host.run()
    assert request.finished and all(s.made == 6 for s in request.sequences)


def test_no_fork_without_sharing():
    scheduler = make(share_blocks=False)
    request = new("n", 6, n=3)
    scheduler.add(request)
    plan = scheduler.schedule()
    assert [(c.sequence.index, c.count) for c in plan.chunks] == [(0, 6), (1, 6), (2, 4)]
    assert [s.index for _, s in plan.samples] == [0, 1]
    assert (scheduler.manager.pool.refs <= 1).all()


def test_blocks_are_copied_at_the_first_write_after_a_fork():
    scheduler = make()
    scheduler.add(new("n", 6, n=3))
    scheduler.schedule()
    shared = scheduler.manager.tables.blocks[0, :, 1].copy()
    plan = scheduler.schedule()
    sources, targets = plan.copies
    rows = plan.rows.tolist()
    assert len(rows) == 3 and sources.tolist() == [shared[rows[0]]] * 2
    now = scheduler.manager.tables.blocks[0, rows, 1].tolist()
    assert len(set(now)) == 3 and set(targets.tolist()) == set(now) - {int(sources[0])}
    assert not len(scheduler.schedule().copies[0]), "only once"


def test_no_copies_when_the_prompt_ends_with_its_block():
    scheduler = make()
    scheduler.add(new("n", 2 * BLOCK, n=3))
    scheduler.schedule()
    plan = scheduler.schedule()
    assert len(plan.rows) == 3 and not len(plan.copies[0])


def steps(scheduler, *requests, most=8):
    """Number of decode steps of each plan until everything has finished."""
    for request in requests:
        scheduler.add(request)
    host = Host(scheduler, most)
    host.run()
    return [plan.steps for plan in host.plans if plan.decodes]


def test_several_steps_end_where_a_row_reaches_its_limit():
    assert steps(make(), new("a", 6, made=21)) == [8, 8, 4]
    assert steps(make(), new("a", 6, made=4), new("b", 6, made=9)) == [3, 5]


def test_one_step_while_somebody_waits_or_is_prefilled():
    scheduler = make(rows=1)
    assert steps(scheduler, new("a", 3, made=6), new("b", 3, made=6)) == [1] * 5 + [5]
    assert steps(make(tokens=5), new("a", 3, made=9), new("b", 9, made=2))[0] == 1


def test_several_steps_preempt_no_sequence():
    """The pool does not hold the blocks of eight steps."""
    requests = [new("a", 3, made=12), new("b", 3, made=12)]
    scheduler = make(blocks=5)
    taken = steps(scheduler, *requests)
    single = make(blocks=5)
    steps(single, new("a", 3, made=12), new("b", 3, made=12), most=1)
    assert scheduler.preempted == single.preempted > 0
    assert taken[0] == 4, "as many steps as there are blocks for"
    assert all(s.output_ids.tolist() == list(range(3, 15)) for r in requests for s in r.sequences)


def test_blocks_of_several_steps_hold_no_more_than_they_need():
    scheduler = make()
    scheduler.add(new("a", 3, made=30))
    Host(scheduler, 8).step()
    plan = scheduler.schedule(8)
    assert (plan.steps, plan.positions.tolist()) == (8, [3])
    assert scheduler.manager.tables.counts[0, plan.rows].tolist() == [3] and BLOCK == 4


def waiting_prefixes(scheduler, shared, others=3):
    """Queue prompts with a shared prefix."""
    requests = [
        make_request(str(i), [*prompt(shared), 90 + i, 80], SamplingParams(temperature=0, max_tokens=2))
        for i in range(others)
    ]
    for request in requests:
        scheduler.add(request)
    return requests


def test_a_shared_prefix_is_computed_once_and_others_overtake_waiting_requests():
    scheduler = make(blocks=64, tokens=16, rows=8)
    requests = waiting_prefixes(scheduler, 24)
    scheduler.add(new("other", 4))
    host = Host(scheduler)
    first, second, third = ([(c.sequence.request.id, c.start, c.count) for c in host.step().chunks] for _ in range(3))
    assert first == [("0", 0, 16)]
    assert second == [("0", 16, 10), ("other", 0, 4)], "the two waiting requests are overtaken"
    assert third == [("1", 24, 2), ("2", 24, 2)], "they continue after the published prefix"
    host.run()
    assert [r.cached_tokens for r in requests] == [0, 24, 24]


def test_a_prefix_too_short_to_wait_for_is_computed_again():
    scheduler = make(blocks=64, tokens=256, rows=8)
    requests = waiting_prefixes(scheduler, BLOCK)
    assert len(Host(scheduler).step().chunks) == 3
    assert not any(r.cached_tokens for r in requests)


def test_no_waiting_without_a_prefix_cache_or_for_a_preempted_sequence():
    manager = BlockManager(64, 8, 32, BLOCK, prefix_caching=False)
    scheduler = Scheduler(manager, Limits(64, 8))
    waiting_prefixes(scheduler, 12)
    assert len(Host(scheduler).step().chunks) == 3
    scheduler = make(blocks=64, tokens=16, rows=8)
    requests = waiting_prefixes(scheduler, 24)
    host = Host(scheduler)
    host.step()
    scheduler.preempt(requests[0].sequences[0])
    assert not scheduler.inflight, "its registered blocks were unregistered"
    host.run()
    assert all(r.finished for r in requests)


def test_sliding_groups_allocate_blocks_per_chunk():
    kinds = (KindGroups(Kind(), 0, 1), KindGroups(Window(5), 1, 2))
    manager = BlockManager(40, ROWS, 32, BLOCK, kinds=kinds)
    scheduler = Scheduler(manager, Limits(8, ROWS))
    scheduler.add(new("a", 40, made=3))
    host, held = Host(scheduler), []
    for _ in range(5):
        host.step()
        held.append((manager.tables.blocks[:, 0] >= 0).sum(axis=1).tolist())
    assert held == [[10, 2, 2]] + [[10, 3, 3]] * 4, (
        "full groups allocate all blocks at once, sliding ones only the window's"
    )
    host.run()


def test_a_single_sequence_that_fills_the_pool_finishes():
    scheduler = make(blocks=4)
    scheduler.add(new("a", 8, made=8))
    Host(scheduler).run()
    assert not scheduler.preempted


KINDS = st.sampled_from(
    [
        SINGLE,
        (KindGroups(Kind(), 0, 1), KindGroups(Window(5), 1, 2)),
        (KindGroups(Window(3), 0, 2),),
        (KindGroups(Window(1), 0, 1), KindGroups(Kind(), 1, 1), KindGroups(Window(9), 2, 1)),
    ]
)


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(*(st.integers(*ends) for ends in ((1, 20), (1, 5), (1, 9), (0, 3)))), min_size=1, max_size=7),
    st.integers(0, 11),
    st.integers(1, 20),
    st.booleans(),
    st.booleans(),
    st.integers(1, 9),
    KINDS,
)
def test_every_mix_ends_with_every_token_and_nothing_held(wanted, spare, tokens, sharing, caching, most, kinds):
    """Arrivals over time, any budget, pools that just hold the longest sequence; `Host` checks the accounting after
    every step.
    """
    longest = max(length + made for length, _, made, _ in wanted)
    blocks = blocks_needed(kinds, longest, BLOCK, tokens) + spare
    manager = BlockManager(blocks, ROWS, 32, BLOCK, prefix_caching=caching, kinds=kinds)
    scheduler = Scheduler(manager, Limits(tokens, ROWS, sharing))
    host, requests = Host(scheduler, most), []
    for i, (length, n, made, pause) in enumerate(wanted):
        request = make_request(str(i), prompt(length, i % 2), SamplingParams(seed=1, n=n, max_tokens=made))
        requests.append(request)
        scheduler.add(request)
        for _ in range(pause):
            host.step()
    host.run(3000)
    for request in requests:
        start = len(request.prompt)
        for sequence in request.sequences:
            assert sequence.output_ids.tolist() == [t % 90 for t in range(start, request.limit)]
    assert int(manager.pool.num_held) == 0 and len(scheduler.rows.free) == ROWS
    used = [sum(c.count for c in plan.chunks) + len(plan.decodes) for plan in host.plans]
    assert max(used) <= tokens
    assert all(max(len(p.samples), len(p.chunks), len(p.decodes)) <= ROWS for p in host.plans)


def counted(monkeypatch, owner, name):
    """Record the calls of a method from here on."""
    method, calls = getattr(owner, name), []
    monkeypatch.setattr(owner, name, lambda *a, **k: calls.append(a) or method(*a, **k))
    return calls


def test_a_blocked_head_is_looked_up_only_when_blocks_were_released(monkeypatch):
    scheduler = make(blocks=12)
    host = Host(scheduler)
    for name in "ab":
        scheduler.add(new(name, 14, made=6))
    host.step()
    lookups = counted(monkeypatch, scheduler.manager, "lookup")
    scheduler.add(new("large", 28, made=2))
    [waiting] = scheduler.waiting
    while waiting.status is Status.WAITING:
        host.step()
    assert len(lookups) <= 3, "on arrival, and when blocks were released"
    host.run()
    assert waiting.made == 2


def test_a_head_that_is_blocked_for_another_reason_is_looked_up_only_when_the_index_changes(monkeypatch):
    """A cached prompt waits for room in the feature pool, beside a prompt whose blocks are being computed."""
    scheduler = make(blocks=64, tokens=4, rows=8)
    host, text = Host(scheduler), prompt(17, 3)
    scheduler.add(make_request("first", text, SamplingParams(max_tokens=1)))
    host.run()
    [other] = new("other", BLOCK).sequences
    other.digests = [b"other"]
    scheduler.inflight.register(other)
    manager, room = scheduler.manager, scheduler.encoder_cache.find_room
    monkeypatch.setattr(scheduler.encoder_cache, "find_room", lambda *_: SimpleNamespace(fits=False))
    calls = [counted(monkeypatch, manager, name) for name in ("lookup", "digests")]
    calls.append(counted(monkeypatch, scheduler.inflight, "should_wait"))
    scheduler.add(make_request("again", text, SamplingParams(max_tokens=1)))
    [waiting] = scheduler.waiting
    for _ in range(20):
        scheduler.prefills.plan(4)
    assert [len(found) for found in calls] == [1, 2, 1] and waiting.status is Status.WAITING
    manager.index.insert(b"digest", b"", np.zeros(BLOCK, np.int32))
    scheduler.prefills.plan(4)
    assert [len(found) for found in calls] == [2, 3, 1], "the index has changed, the prefixes in flight have not"
    monkeypatch.setattr(scheduler.encoder_cache, "find_room", room)
    assert scheduler.admission.admit(waiting, 4) and len(calls[0]) == 2 and waiting.request.cached_tokens == 16
    assert waiting.last_hit is None
    versions = [(one.manager.index_version, one.inflight.version) for one in (make(), make())]
    assert all(one != other for one, other in zip(*versions, strict=True)), "a failed step makes both anew"


def test_a_blocked_head_is_admitted_once_its_missing_block_is_published():
    scheduler = make(blocks=8, tokens=16)
    [sequence] = new("x", 16).sequences
    sequence.needed_blocks, sequence.first_missing = 9, b"digest"
    assert scheduler.admission.lacks_blocks(sequence)
    scheduler.manager.index.insert(b"digest", b"", np.zeros(BLOCK, np.int32))
    assert not scheduler.admission.lacks_blocks(sequence)
    sequence.start_over()
    assert not scheduler.admission.lacks_blocks(sequence), "another rope needs other blocks"


def test_needed_blocks_are_those_with_which_it_is_admitted():
    scheduler = make(blocks=8, tokens=64)
    host, text = Host(scheduler), prompt(17, 3)
    scheduler.add(make_request("a", text, SamplingParams(max_tokens=1)))
    host.run()
    manager = scheduler.manager
    tokens = np.array([*text, *prompt(11, 4)], np.int32)
    hit = manager.lookup(tokens, manager.digests(tokens, new("a", 1).sequences[0].root), new("a", 1).sequences[0].root)
    assert hit.blocks == 4 and manager.needed(hit, len(tokens)) == 7
    taken = manager.admit(0, manager.lookup(tokens[:0], [], b""), BLOCK)
    assert taken and manager.pool.num_available == 7 and manager.admit(1, hit, len(tokens))


def test_the_queue_keeps_its_order_when_sequences_are_removed():
    queue, sequences = Waiting(), [s for name in "abcd" for s in new(name, 3).sequences]
    queue.extend(sequences[:3])
    queue.push(sequences[3])
    queue.remove(sequences[1])
    assert list(queue) == [sequences[3], sequences[0], sequences[2]] and len(queue) == 3
    with pytest.raises(KeyError):
        queue.remove(sequences[1])


def test_a_step_examines_a_bounded_part_of_the_queue(monkeypatch):
    scheduler = make(tokens=8, blocks=64)
    for i in range(6 * ROWS):
        scheduler.add(new(str(i), 16, made=2))
    calls = counted(monkeypatch, scheduler.admission, "waits_for_prefix")
    scheduler.schedule()
    assert 0 < len(calls) <= 2 * ROWS
    for request in [s.request for s in scheduler.waiting]:
        scheduler.finish(request.sequences[0], "abort")
    assert not len(scheduler.waiting)
