"""The group of processes that serve one model, with failure detection.

Process 0 has a TCP connection to every other process. It carries the step plans and detects dead processes: in a
collective the peers of a dead process would wait forever, on a GPU without an error. The operating system closes the
connections of a process that dies; a hung process, or an unreachable machine, is detected by missing heartbeats.
"""

import atexit
import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax

from jaxinfer.distributed.wire import Kind, Peer
from jaxinfer.errors import DistributedError

NOW = b"now"
"""Payload of an END frame when process 0 ends without waiting for the others."""

log = logging.getLogger(__name__)

SILENCE = 0.5
"""Share of the timeout without heartbeats after which a process is considered dead."""
GRACE = 0.2
"""Share of the timeout that a process has to exit by itself after a failure."""
END_LIMITS = 10
"""Timeouts that process 0 waits at its end for another process that still sends heartbeats: it may have to compile
first."""
REASON_SECONDS = 2.0
"""Seconds that a process whose step failed waits for another process to report the cause."""

CALLED = {
    Kind.FOLLOWS: "it called llm.follow()",
    Kind.SHARE: "it called update_weights or another method of all processes; it has to call llm.follow() first",
    Kind.END: "it ended",
}
"""What a process has done that sent a frame which was not expected."""


class Group:
    """Connections of a process to the others: process 0 to all of them, another process to process 0.

    Args:
        process: number of this process.
        peers: connections, in process order.
        limit: timeout in seconds, within which a dead or silent process ends all of them.
    """

    def __init__(self, process: int, peers: Sequence[Peer], limit: float):
        self.process, self.peers, self.limit = process, tuple(peers), limit
        self.failure: str | None = None
        """Description of the failure, which names the process; None if there is none."""
        self.failure_raised = False
        """Whether an exception has reported the failure to the user."""
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._inbox: dict[int, queue.Queue[tuple[Kind, bytes] | None]] = {
            peer.process: queue.Queue() for peer in self.peers
        }
        self.released = False
        """Whether process 0 has let `LLM.follow` return here, so that this process may end."""
        for peer in self.peers:
            threading.Thread(target=self._listen, args=(peer,), name=f"from-{peer.process}", daemon=True).start()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        atexit.register(self.end_quietly)

    @property
    def has_left(self) -> bool:
        """Whether this process has left the group."""
        return self._over.is_set()

    def all_gather(self, value: Any) -> list[Any]:
        """Gather a value of every process, in process order, on all processes. All processes must call it.

        Raises:
            DistributedError: a process has died or failed.
        """
        if self.process:
            self.peers[0].send_json(Kind.SHARE, value)
            return json.loads(self.take(self.peers[0], Kind.SHARE)[1])
        values = [value, *self.gather()]
        self.broadcast(Kind.SHARE, json.dumps(values).encode())
        return values

    def gather(self) -> list[Any]:
        """Receive on process 0 the values that the others passed to `all_gather`.

        Raises:
            DistributedError: a process has died or failed.
        """
        return [json.loads(self.take(peer, Kind.SHARE)[1]) for peer in self.peers]

    def check_equal(self, facts: Mapping[str, Any]) -> None:
        """Check that facts are equal in all processes.

        Raises:
            DistributedError: they differ; names process, fact and both values, in every process.
        """
        first, *others = self.all_gather(dict(facts))
        for process, own in enumerate(others, 1):
            for name, value in first.items():
                if own.get(name) != value:
                    self.leave()
                    raise DistributedError(
                        f"process {process} differs from process 0 in {name}: {own.get(name)!r} against {value!r}; all "
                        "processes need the same model folder, the same versions and the same kind of device"
                    )

    def broadcast(self, kind: Kind, data: bytes = b"") -> None:
        """Send a frame to all other processes.

        Raises:
            DistributedError: the group has failed before, or a connection is lost.
        """
        self.check()
        for peer in self.peers:
            try:
                peer.send(kind, data)
            except OSError as error:
                self.fail(f"{peer} has died: {error}")
                raise self.error() from error

    def has_sent(self, kind: Kind) -> bool:
        """Return whether the next frame of some other process is of this kind, without taking it."""
        frames = [inbox.queue[0] for inbox in self._inbox.values() if not inbox.empty()]
        return any(frame is not None and frame[0] == kind for frame in frames)

    def take(self, peer: Peer, *kinds: Kind) -> tuple[Kind, bytes]:
        """Wait for the next frame of a peer, which must be of one of these kinds.

        Raises:
            DistributedError: the group has failed, or the frame is of another kind.
        """
        found = self._inbox[peer.process].get()
        if found is None:
            self._inbox[peer.process].put(None)
            raise self.error()
        if found[0] not in kinds:
            called = f" ({CALLED[found[0]]})" if found[0] in CALLED else ""
            self.fail(f"{peer} sent {found[0].name}{called}, expected {' or '.join(k.name for k in kinds)}")
            raise self.error()
        return found

    def check(self) -> None:
        """Check that the group has not failed.

        Raises:
            DistributedError: it has failed or ended.
        """
        if self.failure is not None or self._over.is_set():
            raise self.error()

    def error(self) -> DistributedError:
        """Return the failure as an exception."""
        self.failure_raised = True
        return DistributedError(self.failure or "the processes of this LLM have ended; make a new one in each of them")

    def fail(self, text: str) -> None:
        """End all processes: report the failure to the others, and exit this one after `GRACE` unless it has ended by
        then.

        Only the first failure is recorded.
        """
        with self._lock:
            if self.failure is not None or self._over.is_set():
                return
            self.failure = text
        print(f"jaxinfer: process {self.process} ends: {text}", file=sys.stderr, flush=True)
        for peer in self.peers:  # in threads: a peer that no longer reads must not block the others
            threading.Thread(target=_send_quietly, args=(peer, Kind.FAIL, text.encode()), daemon=True).start()
        self._wake()
        self._exit_after(GRACE * self.limit, 1)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Report exceptions raised inside to the other processes, which end too.

        Raises:
            DistributedError: instead of a JAX error, if another process was the cause.
        """
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            raise self.failed(error) from error
        except BaseException as error:
            self.abandon(f"process {self.process} failed: {type(error).__name__}: {error}")
            raise

    def failed(self, error: Exception) -> DistributedError:
        """Return the exception to raise after a failed step.

        If another process has died, its connection reports it at about the same time, so wait for that.
        """
        deadline = time.monotonic() + REASON_SECONDS
        while self.failure is None and not isinstance(error, DistributedError) and time.monotonic() < deadline:
            time.sleep(0.01)
        self.fail(f"process {self.process} failed: {type(error).__name__}: {error}")
        return self.error()

    def abandon(self, text: str) -> None:
        """Leave the group because of an exception in this process, and report it to the others, which end."""
        with self._lock:
            over, self.failure = self._over.is_set() or self.failure is not None, self.failure or text
        if not over:
            for peer in self.peers:
                _send_quietly(peer, Kind.FAIL, text.encode())
        self.leave()

    def leave(self) -> None:
        """Leave the group: failures of other processes no longer affect this one."""
        self._over.set()
        self._wake()
        atexit.unregister(self.end_quietly)  # it would keep the group alive until the process ends

    def end(self) -> None:
        """End the other processes, on process 0, after they have replayed and compared everything.

        Raises:
            DistributedError: one of them has failed, or does not answer.
        """
        if self._over.is_set() and self.failure is None:
            return
        self.check()
        for peer in self.peers:
            if not peer.ended:  # one that was released may have ended before
                _send_quietly(peer, Kind.END)
        deadline = time.monotonic() + END_LIMITS * self.limit
        for peer in self.peers:
            while not peer.ended and self.failure is None and time.monotonic() < deadline:
                time.sleep(0.002)
        if self.failure is None and not all(peer.ended for peer in self.peers):
            silent = ", ".join(str(peer) for peer in self.peers if not peer.ended)
            self.fail(f"{silent} did not end within {END_LIMITS * self.limit:g} s")
        if self.failure is not None:
            raise self.error()
        self.leave()
        for peer in self.peers:
            peer.close()

    def end_quietly(self) -> None:
        """Tell the others at interpreter exit that this process ends, without waiting for them."""
        if self._over.is_set() or self.failure is not None:
            return
        if self.process and self.released:
            self.answer_end()
            return
        if self.process:
            self.abandon(f"process {self.process} ended before process 0; it has to call llm.follow() until that ends")
            return
        for peer in self.peers:
            _send_quietly(peer, Kind.END, NOW)
        self.leave()

    def answer_end(self) -> None:
        """Confirm to process 0 that this process has finished."""
        _send_quietly(self.peers[0], Kind.END)
        self.leave()

    def _wake(self) -> None:
        for inbox in self._inbox.values():
            inbox.put(None)

    def _exit_after(self, seconds: float, code: int) -> None:
        """Exit this process after a delay, even if it hangs in a collective or in JAX's shutdown barrier."""

        def leave() -> None:
            time.sleep(seconds)
            sys.stderr.flush()
            sys.stdout.flush()
            os._exit(code)

        threading.Thread(target=leave, name="exit", daemon=True).start()

    def _listen(self, peer: Peer) -> None:
        """Receive frames of a peer until its connection is closed, as process 0 does once all have ended."""
        self._receive(peer)
        if peer.ended:
            peer.close()

    def _receive(self, peer: Peer) -> None:
        while True:
            try:
                kind, data = peer.receive()
            except DistributedError as error:
                self.fail(str(error))
                return
            except OSError as error:
                if not peer.ended:
                    self.fail(f"{peer} has died: {error or 'its connection was closed'}")
                return
            if kind == Kind.BEAT:
                continue
            if kind == Kind.FAIL:
                self.fail(data.decode(errors="replace"))
                return
            if kind == Kind.END:
                peer.ended = True
                if self.released:  # this process does something else, and ends or follows later
                    _send_quietly(peer, Kind.END)
                elif data == NOW:
                    self._leave_with(peer)
            self._inbox[peer.process].put((kind, data))

    def _leave_with(self, peer: Peer) -> None:
        """Exit if this process hangs in a collective that process 0 was interrupted in."""

        def leave() -> None:
            if not self._over.wait(SILENCE * self.limit):
                log.warning("%s ended while process %d waited for it in a step", peer, self.process)
                self._exit_after(0, 0)

        threading.Thread(target=leave, name="leave", daemon=True).start()

    def _watch(self) -> None:
        """Send heartbeats to the peers and check theirs."""
        silence = SILENCE * self.limit
        interval, last = silence / 8, time.monotonic()
        while not self._over.wait(interval):
            now = time.monotonic()
            if now - last > 2 * interval:  # this process itself was suspended, so its records are stale
                for peer in self.peers:
                    peer.last_heard = now
            last = now
            for peer in self.peers:
                try:
                    peer.beat()
                except OSError:
                    pass  # `_listen` reports it
                if not peer.ended and now - peer.last_heard > silence:
                    self.fail(f"{peer} has sent no heartbeat for {now - peer.last_heard:.0f} s")
                    return


def _send_quietly(peer: Peer, kind: Kind, data: bytes = b"") -> None:
    try:
        peer.send(kind, data)
    except OSError:
        pass  # the peer is gone
