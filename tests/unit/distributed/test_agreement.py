"""Calls that all processes make, here simulated by threads of one process."""

import threading
from types import SimpleNamespace

import pytest
from support.groups import together
from support.stepping import wait_until

from jaxinfer.distributed.wire import Kind
from jaxinfer.engine.multihost.agreement import agree
from jaxinfer.errors import CheckpointError, DistributedError
from jaxinfer.llm_base.lifecycle import EngineOwner


def fails(error: Exception):
    """Return a function that raises an error."""

    def call():
        raise error

    return call


def test_all_get_their_own_value_if_the_texts_are_equal(make):
    calls = [lambda group=group: agree(group, "m", "x", lambda: (group.process, "same")) for group in make(3)]
    assert together(*calls) == [0, 1, 2]


def test_an_error_in_one_process_is_raised_in_all_and_names_it(make):
    groups = make(3)
    makers = [lambda: (0, "a"), fails(CheckpointError("no tensor")), lambda: (0, "b")]
    first, second, third = together(*(lambda g=g, m=m: agree(g, "m", "x", m) for g, m in zip(groups, makers)))
    assert [type(one) for one in (first, second, third)] == [CheckpointError] * 3
    assert [str(one) for one in (first, second, third)] == ["process 1: no tensor", "no tensor", "process 1: no tensor"]
    assert together(*(lambda g=g: agree(g, "m", "x", lambda: (1, "")) for g in groups)) == [1, 1, 1], "they go on"


def test_different_texts_are_an_error_that_names_the_first_process_that_differs(make):
    calls = [lambda g=g: agree(g, "m", "the shapes", lambda: (0, str(g.process // 2))) for g in make(4)]
    found = together(*calls)
    assert all(isinstance(one, DistributedError) for one in found)
    assert {str(one) for one in found} == {
        "m: process 2 differs from process 0 in the shapes; pass the same in all processes"
    }


def test_different_methods_end_all_processes(make, exits):
    calls = [lambda g=g: agree(g, ("a", "b")[g.process], "x", lambda: (0, "")) for g in make(2)]
    for error in together(*calls):
        assert isinstance(error, DistributedError)
        assert "all processes must call the same method, but process 0 a, process 1 b" in str(error)
    assert exits


def test_a_process_that_follows_instead_is_named(make, exits):
    first, second = make(2)
    second.peers[0].send(Kind.FOLLOWS)
    [error] = together(lambda: agree(first, "m", "x", lambda: (0, "")))
    assert "process 1 (b) sent FOLLOWS (it called llm.follow()), expected SHARE" in str(error)


@pytest.mark.parametrize("released", [True, False])
def test_a_released_process_may_end_before_process_0(make, exits, released):
    first, second = make(2)
    second.released = released
    second.end_quietly()
    [found] = together(first.end)
    assert (found is None) == released and second.has_left
    if not released:
        assert "process 1 ended before process 0; it has to call llm.follow()" in str(found)


@pytest.mark.parametrize("released", [True, False])
def test_process_0_may_end_while_another_one_trains(make, exits, released, monkeypatch):
    """It waits for an answer; one that was released is not in `follow`, and is left alone."""
    first, second = make(2, limit=20.0)
    second.released = released
    if not released:
        monkeypatch.setattr("jaxinfer.distributed.group.END_LIMITS", 0.02)
    [found] = together(first.end)
    assert (found is None) == released
    if released:
        assert second.take(second.peers[0], Kind.END)[0] == Kind.END, "a later call of `follow` finds it"
        assert exits == []


def test_an_exit_without_close_does_not_end_a_released_process(make, exits):
    first, second = make(2, limit=20.0)
    second.released = True
    first.end_quietly()
    assert second.take(second.peers[0], Kind.END)[0] == Kind.END
    assert "leave" not in [thread.name for thread in threading.enumerate()], "none waits to exit"
    assert exits == []


def test_frames_are_seen_before_they_are_taken(make):
    first, second = make(2)
    assert not first.has_sent(Kind.FOLLOWS)
    second.peers[0].send(Kind.FOLLOWS)
    wait_until(lambda: first.has_sent(Kind.FOLLOWS))
    assert not first.has_sent(Kind.SHARE)
    assert first.take(first.peers[0], Kind.FOLLOWS)[0] == Kind.FOLLOWS and not first.has_sent(Kind.FOLLOWS)


def test_any_other_error_is_told_too(make):
    groups = make(2)
    makers = [fails(MemoryError("full")), lambda: (0, "a")]
    first, second = together(*(lambda g=g, m=m: agree(g, "m", "x", m) for g, m in zip(groups, makers)))
    assert isinstance(first, MemoryError) and str(second) == "process 0: full" and type(second) is RuntimeError


@pytest.mark.parametrize("released", [True, False])
def test_an_error_while_all_processes_train_is_told_at_once(make, exits, released):
    """In `follow`, and in process 0 while others follow, errors are noticed otherwise."""
    first, second = make(2)
    second.released = released
    runner = SimpleNamespace(leader=None)
    EngineOwner._abandon(SimpleNamespace(_group=second, _engine=SimpleNamespace(runner=runner)), ValueError("a reward"))
    if released:
        [error] = together(lambda: first.take(first.peers[0], Kind.SHARE))
        assert "process 1 failed: ValueError: a reward" in str(error)
    else:
        assert not second.has_left and second.failure is None
