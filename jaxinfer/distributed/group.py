"""The processes that serve one model together, and the watch they keep on each other.

Process 0 has a TCP connection to each of the others. It carries the plans, and it is how a dead process is noticed: in
a collective its peers would wait for ever, on a GPU without an error. The system closes the connections of a process
that dies; one that hangs, or whose machine is gone, is found by the signs of life that it no longer sends.
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
"""Says at the end that process 0 waits for nobody."""

log = logging.getLogger(__name__)

SILENCE = 0.5
"""Part of the time limit after which a process that is not heard is taken to be dead."""
GRACE = 0.2
"""Part of the time limit that a process has to end by itself once something is wrong."""
END_LIMITS = 10
"""Time limits that process 0 waits at its end for another one, which gives signs of life: it may have to compile
first."""
REASON_SECONDS = 2.0
"""How long a process whose step has failed waits for a reason that lies in another."""


class Group:
    """What a process knows of the others: process 0 of all of them, another one of process 0.

    Args:
        process: this one's number.
        peers: connections, in the order of their processes.
        limit: seconds within which a dead or silent process ends all of them.
    """

    def __init__(self, process: int, peers: Sequence[Peer], limit: float):
        self.process, self.peers, self.limit = process, tuple(peers), limit
        self.failure: str | None = None
        """What went wrong, in words that name the process."""
        self.said = False
        """Whether an exception has carried it to the user."""
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._inbox: dict[int, queue.SimpleQueue[tuple[Kind, bytes] | None]] = {
            peer.process: queue.SimpleQueue() for peer in self.peers
        }
        for peer in self.peers:
            threading.Thread(target=self._listen, args=(peer,), name=f"from-{peer.process}", daemon=True).start()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        atexit.register(self.end_quietly)

    @property
    def over(self) -> bool:
        """Whether it has come to its end."""
        return self._over.is_set()

    def share(self, value: Any) -> list[Any]:
        """Every process's value, in their order, in every process: all must call it, and wait for each other.

        Raises:
            DistributedError: a process is gone, or has failed.
        """
        if self.process:
            self.peers[0].send_json(Kind.SHARE, value)
            return json.loads(self.take(self.peers[0], Kind.SHARE)[1])
        values = [value, *self.collect()]
        self.tell(Kind.SHARE, json.dumps(values).encode())
        return values

    def collect(self) -> list[Any]:
        """In process 0: what each of the others has sent up to `share`; raises as that."""
        return [json.loads(self.take(peer, Kind.SHARE)[1]) for peer in self.peers]

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Checks that these are the same in all processes.

        Raises:
            DistributedError: names process, fact and both values, in every process alike.
        """
        first, *others = self.share(dict(facts))
        for process, own in enumerate(others, 1):
            for name, value in first.items():
                if own.get(name) != value:
                    self.leave()
                    raise DistributedError(
                        f"process {process} differs from process 0 in {name}: {own.get(name)!r} against {value!r}; all "
                        "processes need the same model folder, the same versions and the same kind of device"
                    )

    def tell(self, kind: Kind, data: bytes = b"") -> None:
        """Sends to all others.

        Raises:
            DistributedError: something has gone wrong before, or a connection is gone.
        """
        self.check()
        for peer in self.peers:
            try:
                peer.send(kind, data)
            except OSError as error:
                self.fail(f"{peer} has died: {error}")
                raise self.error() from error

    def take(self, peer: Peer, *kinds: Kind) -> tuple[Kind, bytes]:
        """The next frame of a peer, of one of these kinds; waits for it.

        Raises:
            DistributedError: it will not come.
        """
        found = self._inbox[peer.process].get()
        if found is None:
            self._inbox[peer.process].put(None)
            raise self.error()
        if found[0] not in kinds:
            self.fail(f"{peer} sent {found[0].name} where {' or '.join(k.name for k in kinds)} was due")
            raise self.error()
        return found

    def check(self) -> None:
        """Raises what went wrong, if anything has."""
        if self.failure is not None or self._over.is_set():
            raise self.error()

    def error(self) -> DistributedError:
        """What went wrong, as an exception."""
        self.said = True
        return DistributedError(self.failure or "the processes of this LLM have ended; make a new one in each of them")

    def fail(self, text: str) -> None:
        """Ends all processes: the others are told, the first reason counts, and this one has `GRACE` to end by
        itself."""
        with self._lock:
            if self.failure is not None or self._over.is_set():
                return
            self.failure = text
        print(f"jaxinfer: process {self.process} ends: {text}", file=sys.stderr, flush=True)
        for peer in self.peers:  # one that takes no more bytes must not keep the others waiting
            threading.Thread(target=_send_quietly, args=(peer, Kind.FAIL, text.encode()), daemon=True).start()
        self._wake()
        self._exit_after(GRACE * self.limit, 1)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """What is raised inside is told to the others, which end with it.

        Raises:
            DistributedError: in the place of what JAX raised, if another process was the reason.
        """
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            raise self.failed(error) from error
        except BaseException as error:
            self.abandon(f"process {self.process} failed: {type(error).__name__}: {error}")
            raise

    def failed(self, error: Exception) -> DistributedError:
        """What to raise where a step fails: of another process that has died its connection tells at about this
        time."""
        deadline = time.monotonic() + REASON_SECONDS
        while self.failure is None and not isinstance(error, DistributedError) and time.monotonic() < deadline:
            time.sleep(0.01)
        self.fail(f"process {self.process} failed: {type(error).__name__}: {error}")
        return self.error()

    def abandon(self, text: str) -> None:
        """This process goes, for a reason of its own that it raises itself; the others end with that reason."""
        with self._lock:
            over, self.failure = self._over.is_set() or self.failure is not None, self.failure or text
        if not over:
            for peer in self.peers:
                _send_quietly(peer, Kind.FAIL, text.encode())
        self.leave()

    def leave(self) -> None:
        """End this process's part: what the others do from here on is no concern of it."""
        self._over.set()
        self._wake()
        atexit.unregister(self.end_quietly)  # which would keep the group until the process ends

    def end(self) -> None:
        """Process 0 ends the others, and waits for them to have replayed and compared everything.

        Raises:
            DistributedError: one of them has failed, or does not answer.
        """
        if self._over.is_set() and self.failure is None:
            return
        self.tell(Kind.END)
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
        """At the end of the program: tells the others, which end with it, and waits for nobody."""
        if self._over.is_set() or self.failure is not None:
            return
        if self.process:
            self.abandon(f"process {self.process} ended before process 0; it has to call llm.follow() until that ends")
            return
        for peer in self.peers:
            _send_quietly(peer, Kind.END, NOW)
        self.leave()

    def answer_end(self) -> None:
        """Another process than 0 has done all it was told."""
        _send_quietly(self.peers[0], Kind.END)
        self.leave()

    def _wake(self) -> None:
        for inbox in self._inbox.values():
            inbox.put(None)

    def _exit_after(self, seconds: float, code: int) -> None:
        """Ends this process, wherever it waits by then: a collective whose peer is gone, or JAX's barrier at the
        end."""

        def leave() -> None:
            time.sleep(seconds)
            sys.stderr.flush()
            sys.stdout.flush()
            os._exit(code)

        threading.Thread(target=leave, name="exit", daemon=True).start()

    def _listen(self, peer: Peer) -> None:
        """Take what a peer sends until its connection is closed, as process 0 does once all have ended."""
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
                if data == NOW:
                    self._leave_with(peer)
            self._inbox[peer.process].put((kind, data))

    def _leave_with(self, peer: Peer) -> None:
        """Process 0 was interrupted. This process may wait for it in a collective, for ever."""

        def leave() -> None:
            if not self._over.wait(SILENCE * self.limit):
                log.warning("%s ended while process %d waited for it in a step", peer, self.process)
                self._exit_after(0, 0)

        threading.Thread(target=leave, name="leave", daemon=True).start()

    def _watch(self) -> None:
        """Gives signs of life, and looks for those of the others."""
        silence = SILENCE * self.limit
        interval, last = silence / 8, time.monotonic()
        while not self._over.wait(interval):
            now = time.monotonic()
            if now - last > 2 * interval:  # this process was stopped itself, and heard nobody because of that
                for peer in self.peers:
                    peer.heard = now
            last = now
            for peer in self.peers:
                try:
                    peer.beat()
                except OSError:
                    pass  # `_listen` says so
                if not peer.ended and now - peer.heard > silence:
                    self.fail(f"{peer} has not been heard for {now - peer.heard:.0f} s")
                    return


def _send_quietly(peer: Peer, kind: Kind, data: bytes = b"") -> None:
    try:
        peer.send(kind, data)
    except OSError:
        pass  # whoever is gone need not be told
