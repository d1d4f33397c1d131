"""The event log is bounded, and the blocks and timelines made of it are right after older events were dropped."""

import numpy as np
import pytest

from jaxinfer.recording import events, palette
from jaxinfer.recording.cache_state import CacheState, Prefix
from jaxinfer.recording.events import EventLog, Owner
from jaxinfer.recording.recording import Recording
from jaxinfer.recording.timeline import Timeline


def owner(name: str, arrival: float = 0.0, **fields) -> Owner:
    return Owner(0, name, 0, 1, arrival, 4, **fields)


def filled(max_steps: int, steps: int = 50, blocks: int = 16) -> tuple[EventLog, np.ndarray]:
    """A log of random codes, and the codes of every step."""
    log, rng = EventLog(blocks, 4, max_steps), np.random.default_rng(0)
    made = []
    for step in range(steps):
        log.name(owner(f"{step}", float(step), end=float(step + 1)))
        made.append(np.where(rng.random(blocks) < 0.3, step + 1, log.codes).astype(np.int32))
        log.append(float(step), made[-1], decodes=(step,), decode_steps=1)
    return log, np.stack(made, axis=1)


def test_the_newest_steps_are_kept_and_right():
    log, codes = filled(max_steps=8)
    found = Recording.of(log, 50.0)
    assert len(found.steps) == 8 and found.dropped == 42
    assert (found.blocks() == codes[:, -8:]).all() and (found.blocks(3) == codes[:, -3:]).all()
    assert found.blocks(1000).shape == (16, 8)


def test_owners_are_forgotten_unless_a_block_or_a_step_names_them():
    log, codes = filled(max_steps=8, steps=200)
    named = set((np.unique(codes[:, -8:]) - 1).tolist()) | set(range(192, 200))
    assert named - {-1} <= set(log.owners), "whatever a picture may name is known"
    assert len(log.owners) < 50, "and no more than a few beyond"


def test_changes_are_bounded_too(monkeypatch):
    monkeypatch.setattr(events, "MAX_CHANGES", 40)
    log, codes = filled(max_steps=1000)
    assert log.num_changes <= 40 and log.num_changes == sum(step.changed.shape[1] for step in log.events)
    assert (Recording.of(log, 50.0).blocks() == codes[:, -len(log.events) :]).all()


def test_a_recording_does_not_change_with_its_log():
    log, codes = filled(max_steps=8)
    found = Recording.of(log, 50.0)
    log.append(60.0, np.zeros(16, np.int32))
    log.owners[49].tokens = 77
    assert (found.blocks() == codes[:, -8:]).all() and found.owners[49].tokens == 0


def test_phases_follow_from_the_steps():
    log = EventLog(4, 4)
    log.name(owner("a", 0.0, end=6.5, finish_reason="stop"))
    zero = np.zeros(4, np.int32)
    log.append(1.0, zero, prefills=((0, 4),))
    log.append(2.0, zero, decodes=(0,))
    log.append(3.0, zero, preempted=(0,))
    log.append(4.0, zero, prefills=((0, 4),))
    log.append(5.0, zero, decodes=(0,))
    log.append(6.0, zero)
    [row] = Recording.of(log, 9.0).timeline.rows
    assert [(span.phase, span.start, span.stop) for span in row.spans] == [
        ("waiting", 0, 1),
        ("prefill", 1, 2),
        ("decode", 2, 3),
        ("preempted", 3, 4),
        ("prefill", 4, 5),
        ("decode", 5, 6),
        ("waiting", 6, 6.5),
    ]
    assert row.seconds("prefill") == 2
    shown = Recording.of(log, 9.0).timeline._repr_html_()
    for phase, colour in palette.PHASES.items():
        assert f'<i style="background:{colour}"></i><span class="dim">{phase}</span>' in shown


def test_a_timeline_begins_with_the_first_step_that_is_kept():
    log = EventLog(4, 4, max_steps=2)
    log.name(owner("a", 0.0))
    for at in range(1, 6):
        log.append(float(at), np.zeros(4, np.int32), decodes=(0,))
    [row] = Recording.of(log, 6.0).timeline.rows
    assert [(span.phase, span.start, span.stop) for span in row.spans] == [("decode", 0, 2)]


def test_a_sequence_that_ran_before_the_recording_is_shown_from_its_start():
    log = EventLog(4, 4, started=10.0)
    log.name(owner("a", 0.0))
    log.name(owner("b", 10.5))
    log.append(11.0, np.zeros(4, np.int32), decodes=(0,))
    rows = Recording.of(log, 12.0).timeline.rows
    assert [[(span.phase, span.start, span.stop) for span in row.spans] for row in rows] == [
        [("waiting", 0, 1), ("decode", 1, 2)],
        [("waiting", 0.5, 2)],
    ]


def test_empty_values_show_themselves():
    found = Recording.of(EventLog(4, 4), 1.0)
    assert "0 steps" in repr(found) and found.blocks().shape == (4, 0)
    assert "0 sequences" in repr(found.timeline)
    for value in (found, found.timeline, Timeline((), 0.0)):
        assert value._repr_html_().startswith("<div")


HOSTILE = "<script>alert(1)</script>\"'&"


def test_what_users_write_is_escaped():
    log = EventLog(4, 4)
    log.name(owner(HOSTILE, 0.0))
    log.append(1.0, np.ones(4, np.int32), decodes=(0,))
    found = Recording.of(log, 2.0)
    tree = (Prefix(0, 1, 1, (1, 2), text=HOSTILE),)
    state = CacheState(np.zeros(4, np.int32), 4, 1, (), 0, 0, 0, {HOSTILE: 1}, 0, prefixes=tree)
    for value in (found.timeline, state):
        shown = value._repr_html_()
        assert "<script>" not in shown and "&lt;script&gt;" in shown
        assert "\"'&" not in shown
        assert HOSTILE[:8] in repr(value)


@pytest.mark.parametrize("last", [0, -1])
def test_pictures_of_nothing_are_refused(last):
    found = Recording.of(EventLog(4, 4), 1.0)
    for plot in (found.plot_blocks, found.plot_timeline):
        with pytest.raises(ValueError, match=f"last must be at least 1, got {last}"):
            plot(last=last)
