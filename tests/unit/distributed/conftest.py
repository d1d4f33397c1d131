"""Groups of processes simulated by threads of one process."""

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from jaxinfer.distributed.group import Group
from jaxinfer.distributed.wire import Peer


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Processes that would have exited."""
    found: list[int] = []
    monkeypatch.setattr(Group, "_exit_after", lambda group, seconds, code: found.append(group.process))
    return found


@pytest.fixture
def make(exits: list[int]) -> Iterator[Callable[..., list[Group]]]:
    """Make groups of a number of processes."""
    groups: list[Group] = []

    def build(count: int = 3, limit: float = 600.0) -> list[Group]:
        leaders = []
        for process in range(1, count):
            with socket.create_server(("127.0.0.1", 0)) as listener:
                mine, theirs = socket.create_connection(listener.getsockname()), listener.accept()[0]
            groups.append(Group(process, [Peer(0, "a", mine)], limit))
            leaders.append(Peer(process, "b", theirs))
        groups.insert(0, Group(0, leaders, limit))
        return groups

    yield build
    for group in groups:
        group.leave()
    for group in groups:
        for peer in group.peers:
            peer.close()
    for thread in threading.enumerate():  # threads that exit their process must finish before os._exit is restored
        if thread.name.startswith(("from-", "watch", "leave")):
            thread.join(120)
