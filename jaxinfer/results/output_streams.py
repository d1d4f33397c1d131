"""Deliver the outputs of requests from the engine thread to asyncio event loops.

The engine thread makes an output for a stream only if the consumer has taken the previous one. Tokens that arrive
meanwhile become part of the next output, so that a slow consumer takes bounded memory and no time of the engine. Each
step wakes an event loop at most once, whatever the number of its streams.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from jaxinfer.engine.engine_thread import CLOSED, Call, EngineThread
from jaxinfer.engine.request import Request, Sequence
from jaxinfer.errors import EngineClosedError
from jaxinfer.outputs import RequestOutput
from jaxinfer.results.output_processor import Handle
from jaxinfer.results.tracing import Span
from jaxinfer.sampling_params import RequestOutputKind

Delivery = tuple["Mailbox", RequestOutput | None, BaseException | None]
"""A mailbox, and a new output or the error that ends it; neither if its request has finished."""


class Mailbox:
    """The engine's end of a stream: at most one output that the consumer has not taken, and the end of the request."""

    def __init__(self, handle: Handle, hub: "StreamHub", call: Call):
        self.handle, self.call = handle, call
        self.loop = asyncio.get_running_loop()
        self.output: RequestOutput | None = None
        self.error: BaseException | None = None
        self.finished = False
        self.event = asyncio.Event()
        self.wants = True
        """Whether the consumer has taken the last output. The engine thread unsets it, the event loop sets it."""
        self._hub = hub
        self._own = handle.request.listener
        handle.request.on_finish = self._on_finish
        if self.kind is not RequestOutputKind.FINAL_ONLY:
            handle.request.listener = self

    @property
    def kind(self) -> RequestOutputKind:
        """Form of the outputs."""
        return self.handle.request.params.output_kind

    def on_token(self, sequence: Sequence, reason: str | None) -> str | None:
        """Record that the request has a new token and forward it to the output processor, on the engine thread."""
        self._hub.changed.add(self)
        return None if self._own is None else self._own.on_token(sequence, reason)

    def _on_finish(self, request: Request) -> None:
        self._hub.ended.append(self)

    def deliver(self, output: RequestOutput | None, error: BaseException | None) -> None:
        """Take an output, an error or, without both, the end of the request from the engine thread, on the loop."""
        if output is not None:
            self.output = output
        else:
            self.error, self.finished = self.error or error, True
        self.event.set()

    def take(self) -> RequestOutput | None:
        """Return the output that has been delivered, and let the engine make the next; on the loop."""
        output, self.output, self.wants = self.output, None, True
        return output


class OutputStream(AsyncIterator[RequestOutput]):
    """Asynchronous iterator over the outputs of one request, in the form set by `output_kind`.

    The request is aborted when the stream is closed or dropped, or when a task that waits for it is cancelled.
    """

    def __init__(self, handle: Handle, hub: "StreamHub"):
        self.handle = handle
        self._hub = hub
        self._lease = hub.thread.lease()
        self._mailbox = Mailbox(handle, hub, self._lease.call)
        self._ended = False
        self._span = Span(handle.request.id, handle.request.params)

    @property
    def request_id(self) -> str:
        """Id of the request."""
        return self.handle.request.id

    async def queue(self) -> None:
        """Queue the request and wait until the engine has accepted it; raises as `Engine.add`."""
        try:
            await self._hub.queue(self._mailbox)
        except BaseException:
            self.close()
            raise

    def __aiter__(self) -> "OutputStream":
        return self

    async def __anext__(self) -> RequestOutput:
        if self._ended:
            raise StopAsyncIteration
        mailbox = self._mailbox
        try:
            while mailbox.output is None and not mailbox.finished:
                mailbox.event.clear()
                await mailbox.event.wait()
        except BaseException:  # cancelled
            self.close()
            raise
        output = mailbox.take()
        if output is not None:
            self._span.take(output)
            return output
        self._ended = True
        if mailbox.error is not None:
            self._span.fail(str(mailbox.error))
            raise mailbox.error
        last = self.handle.update(mailbox.kind)  # the engine no longer touches the request
        if last is None:
            raise StopAsyncIteration
        self._span.take(last)
        return last

    def close(self) -> None:
        """Abort the request before the next step, unless it has finished."""
        self._ended = True
        self._span.fail("aborted")
        self._lease.release(self._lease.call)

    async def aclose(self) -> None:
        """Do the same as `close`, with the name that asynchronous generators have for it."""
        self.close()


class StreamHub:
    """The streams of one engine. All methods but `queue` and `end_all` run on the engine thread."""

    def __init__(self, thread: EngineThread):
        self.thread = thread
        self.streams: dict[str, Mailbox] = {}
        """Streams of queued requests, by request id."""
        self.changed: set[Mailbox] = set()
        """Streams with tokens that no output contains yet."""
        self.ended: list[Mailbox] = []
        """Streams whose requests have finished since the last `busy`."""
        self._call = Call()
        self._call.busy = self.busy
        self._call.replies = _Replies(self._stopped)

    async def queue(self, stream: Mailbox) -> None:
        """Queue a request and wait until the engine has accepted it; raises as `Engine.add`."""
        loop, accepted = stream.loop, stream.loop.create_future()

        def reply(error: BaseException | None) -> None:
            _post(loop, _settle, accepted, error)

        self.thread.post(self._add, stream, done=_Replies(reply))
        while not accepted.done():
            await asyncio.wait([accepted], timeout=1.0)
            if not accepted.done() and not self.thread.alive:
                raise EngineClosedError(CLOSED)
        accepted.result()

    def _add(self, stream: Mailbox) -> None:
        request = stream.handle.request
        self.thread.engine.add(request)
        stream.call.requests.append(request)
        self.streams[request.id] = stream
        self.thread.step_for(self._call)

    def busy(self) -> bool:
        """Deliver what the last step made, and return whether requests are unfinished."""
        found: dict[asyncio.AbstractEventLoop, list[Delivery]] = {}
        for stream in self.ended:
            self.changed.discard(stream)
            if self.streams.pop(stream.handle.request.id, None) is not None:  # None: reported twice
                stream.call.requests.clear()
                found.setdefault(stream.loop, []).append((stream, None, None))
        self.ended.clear()
        for stream in [stream for stream in self.changed if stream.wants]:
            self.changed.discard(stream)
            found.setdefault(stream.loop, []).append((stream, *self._update(stream)))
        self._send(found)
        return bool(self.streams)

    def _update(self, stream: Mailbox) -> tuple[RequestOutput | None, BaseException | None]:
        """Make the next output of a stream; an error ends only this stream."""
        stream.wants = False
        try:
            return stream.handle.update(stream.kind), None
        except Exception as error:
            self.thread.engine.abort(stream.handle.request.id)
            return None, error

    def _send(self, found: dict[asyncio.AbstractEventLoop, list[Delivery]]) -> None:
        for loop, batch in found.items():
            if not _post(loop, _deliver, batch):
                for stream, _, _ in batch:  # the event loop is closed: nobody can take the outputs
                    self.thread.engine.abort(stream.handle.request.id)

    def _stopped(self, error: BaseException | None) -> None:
        """End all streams with the error that stopped the engine thread; None means that no request was left."""
        if error is not None:
            self._fail_all(error)

    def end_all(self, error: BaseException) -> None:
        """Raise an error in all streams before the next step; may be called on any thread but the engine's."""
        self.thread.post(self._fail_all, error, done=_Replies(lambda _error: None))

    def _fail_all(self, error: BaseException) -> None:
        streams = [*self.streams.values(), *self.ended]
        for left in (self.streams, self.changed, self.ended):
            left.clear()
        for stream in streams:
            _post(stream.loop, stream.deliver, None, error)


class _Replies:
    """Stand-in for a queue of replies that calls a function with the error of each reply."""

    def __init__(self, function: Callable[[BaseException | None], None]):
        self._function = function

    def put(self, reply: tuple[Any, BaseException | None]) -> None:
        self._function(reply[1])


def _post(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any) -> bool:
    """Call a function on an event loop; return False if the loop is closed."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        return False
    return True


def _deliver(batch: list[Delivery]) -> None:
    for stream, output, error in batch:
        stream.deliver(output, error)


def _settle(future: asyncio.Future[None], error: BaseException | None) -> None:
    if not future.done():
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
