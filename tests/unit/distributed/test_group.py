"""Failure detection between processes, here simulated by threads of one process."""

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from support.groups import together
from support.stepping import wait_until

from jaxinfer.distributed import initialize
from jaxinfer.distributed.group import Group
from jaxinfer.distributed.wire import Kind, Peer
from jaxinfer.errors import ConfigError, DistributedError


def test_every_process_gets_every_value(make):
    groups = make()
    assert (
        together(*[lambda g=g: g.all_gather({"from": g.process}) for g in groups])
        == [[{"from": i} for i in range(3)]] * 3
    )


def test_differing_facts_are_named_in_every_process_without_forced_exit(make, exits):
    groups = make()
    facts = [{"its dtype": "float32", "x": 1}, {"its dtype": "float32", "x": 1}, {"its dtype": "bfloat16", "x": 1}]
    found = together(*[lambda g=g: g.check_equal(facts[g.process]) for g in groups])
    text = "process 2 differs from process 0 in its dtype: 'bfloat16' against 'float32'"
    assert all(isinstance(error, DistributedError) and text in str(error) for error in found)
    assert exits == []


def test_a_dead_process_is_named_in_all_others(make, exits, capsys):
    first, second, third = make()
    second.leave()  # its own failure detection is not tested here
    second.peers[0].close()
    wait_until(lambda: first.failure and third.failure)
    assert first.failure == third.failure and first.failure.startswith("process 1 (b) has died")
    with pytest.raises(DistributedError, match="process 1 .b. has died"):
        first.broadcast(Kind.LAUNCH)
    with pytest.raises(DistributedError, match="process 1 .b. has died"):
        third.take(third.peers[0], Kind.LAUNCH)
    wait_until(lambda: sorted(exits) == [0, 2])
    assert "jaxinfer: process 2 ends: process 1 (b) has died" in capsys.readouterr().err


def test_a_silent_process_is_named(make, exits, monkeypatch):
    beat = Peer.beat
    monkeypatch.setattr(Peer, "beat", lambda peer: None if peer.where == "a" and peer is quiet else beat(peer))
    quiet = None
    groups = make(limit=2.0)
    quiet = groups[2].peers[0]
    wait_until(lambda: groups[0].failure)
    assert groups[0].failure.startswith("process 2 (b) has sent no heartbeat for")


def test_a_suspended_process_does_not_report_its_peers(make, monkeypatch):
    groups = make(limit=2.0)
    now = time.monotonic
    skipped = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now() + skipped[0], sleep=time.sleep)
    for module in ("group", "wire"):
        monkeypatch.setattr(f"jaxinfer.distributed.{module}.time", clock)
    time.sleep(0.3)
    skipped[0] = 1000.0  # after the last heartbeat
    time.sleep(0.5)
    assert [group.failure for group in groups] == [None] * 3


def test_an_error_in_one_process_reaches_the_others_and_keeps_its_type(make):
    first, second, third = make()
    with pytest.raises(ValueError, match="mine"), second.guard():
        raise ValueError("mine")
    wait_until(lambda: first.failure and third.failure)
    assert first.failure == third.failure == "process 1 failed: ValueError: mine"


def test_the_end_waits_for_all_and_comes_once(make, exits):
    first, *others = make()

    def serve(group: Group) -> Kind:
        kind, _ = group.take(group.peers[0], Kind.LAUNCH, Kind.END)
        while kind != Kind.END:
            kind, _ = group.take(group.peers[0], Kind.LAUNCH, Kind.END)
        group.answer_end()
        return kind

    first.broadcast(Kind.LAUNCH)
    assert together(first.end, *[lambda g=g: serve(g) for g in others]) == [None, Kind.END, Kind.END]
    first.end()
    with pytest.raises(DistributedError, match="have ended"):
        first.broadcast(Kind.LAUNCH)
    assert exits == []


def test_ended_groups_are_garbage_collected(make, monkeypatch):
    registered: list[Callable[[], None]] = []
    monkeypatch.setattr(
        "jaxinfer.distributed.group.atexit",
        SimpleNamespace(
            register=registered.append, unregister=lambda call: registered.remove(call) if call in registered else None
        ),
    )
    first, second = make(count=2)
    assert registered == [second.end_quietly, first.end_quietly]
    first.broadcast(Kind.END)
    second.take(second.peers[0], Kind.END)
    second.answer_end()
    wait_until(lambda: first.peers[0].ended)
    first.end()
    assert registered == []
    wait_until(lambda: not any(thread.name.startswith(("from-", "watch")) for thread in threading.enumerate()))
    assert first.failure is None and second.failure is None


def test_an_unanswered_end_names_the_process(make, exits, monkeypatch):
    groups = make(count=2, limit=4.0)
    monkeypatch.setattr("jaxinfer.distributed.group.END_LIMITS", 0.05)
    with pytest.raises(DistributedError, match="process 1 .b. did not end within 0.2 s"):
        groups[0].end()


def test_a_process_that_waits_for_an_interrupted_one_is_ended(make, exits):
    first, _, third = make(limit=0.4)
    third.fail = lambda text: None  # ignore the silence of the interrupted process
    first.end_quietly()
    wait_until(lambda: 2 in exits)


def test_an_unexpected_frame_is_an_error(make, exits):
    first, second, _ = make()
    first.broadcast(Kind.CHECK)
    with pytest.raises(DistributedError, match="process 0 .a. sent CHECK, expected LAUNCH or END"):
        second.take(second.peers[0], Kind.LAUNCH, Kind.END)


@pytest.mark.parametrize(
    "arguments, match",
    [
        (("host", 2, 0), "HOST:PORT"),
        (("host:0", 2, 0), "HOST:PORT"),
        (("host:99999", 2, 0), "HOST:PORT"),
        (("h:1", 2, 2), r"process_id must be in \[0, num_processes\), got 2 of 2"),
        (("h:1", True, 0), "num_processes must be an integer"),
        (("h:1", 2, True), "process_id must be an integer"),
    ],
)
def test_arguments_are_checked_before_anything_starts(arguments, match):
    with pytest.raises(ConfigError, match=match):
        initialize(*arguments)
