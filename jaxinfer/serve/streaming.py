"""Send responses while the client is connected: server-sent events, or the final outputs of requests."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxinfer.outputs import RequestOutput
from jaxinfer.results.output_streams import OutputStream
from jaxinfer.serve.context import of
from jaxinfer.serve.errors import APIError, Json, as_api_error, body_of

log = logging.getLogger(__name__)
DONE = b"data: [DONE]\n\n"
"""End of OpenAI's streams."""


def event(data: Any, name: str | None = None) -> bytes:
    """Return a server-sent event with JSON data."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


async def _gone(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of a coroutine; cancel it if the client disconnects.

    Raises:
        APIError: the client has disconnected; nobody receives this error.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise APIError("the client has disconnected", status=499)
        return task.result()
    finally:
        await _cancel(task, gone)


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Response of server-sent events, which ends early if the client disconnects or does not read.

    Args:
        events: the events; closed at the end of the response.
        write_timeout: seconds within which a client must read an event, beyond what the sockets buffer.
        leave: called at the end of the response.
        anthropic: whether errors have Anthropic's form.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        write_timeout: float,
        leave: Callable[[], None],
        *,
        anthropic: bool = False,
    ):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._timeout, self._leave, self._anthropic = events, write_timeout, leave, anthropic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response (ASGI)."""
        work, gone = asyncio.ensure_future(self._send_all(send)), asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _cancel(work, gone)
            with suppress(Exception):
                await self._events.aclose()
            self._leave()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for data in self._safe():
                async with asyncio.timeout(self._timeout):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except TimeoutError:
            log.info("a client did not read its stream for %g s: its request is aborted", self._timeout)

    async def _safe(self) -> AsyncGenerator[bytes, None]:
        """Yield the events, and an error as the last of them."""
        try:
            async for data in self._events:
                yield data
        except Exception as error:
            name = "error" if self._anthropic else None
            yield event(body_of(as_api_error(error), self._anthropic), name)


async def respond(
    request: Request,
    queue: Callable[[], Coroutine[Any, Any, Sequence[OutputStream]]],
    *,
    whole: Callable[[Sequence[RequestOutput]], Any],
    events: Callable[[Sequence[OutputStream]], AsyncGenerator[bytes, None]] | None = None,
    streamed: bool = False,
    anthropic: bool = False,
) -> Response:
    """Queue the requests of an API call and return their response, streamed or whole.

    Args:
        request: HTTP request whose body has been read.
        queue: queues the requests and returns their outputs; invalid ones are refused before the response begins.
        whole: makes the JSON of the final outputs.
        events: makes the events of the outputs; None if this call is never streamed.
        streamed: whether the response is a stream of events.
        anthropic: whether errors within a stream have Anthropic's form.

    Raises:
        APIError: the server has too many requests, or one of these could not be finished.
    """
    context = of(request)

    async def run() -> list[RequestOutput]:
        return await last_outputs(await queue())

    leave = context.enter()
    try:
        if streamed:
            made = events(await while_connected(request, queue()))
            response = EventStream(made, context.config.write_timeout, leave, anthropic=anthropic)
            leave = None
            return response
        return Json(whole(await while_connected(request, run())))
    finally:
        if leave is not None:
            leave()


def check_served(output: RequestOutput) -> None:
    """Raise APIError if a sample has ended in an error or was aborted."""
    for sample in output.outputs:
        if sample.finish_reason == "error":
            raise APIError(f"the engine could not finish this request: {sample.stop_reason}", status=500)
        if sample.finish_reason == "abort":
            raise APIError("this request was aborted", status=500)


async def last_output(stream: OutputStream) -> RequestOutput:
    """Return the only output of a stream of kind FINAL_ONLY."""
    async for output in stream:
        check_served(output)
        return output
    raise APIError("this request was aborted", status=500)


async def last_outputs(streams: Sequence[OutputStream]) -> list[RequestOutput]:
    """Return the outputs of several such streams; all of them are aborted on an error."""
    try:
        return list(await asyncio.gather(*map(last_output, streams)))
    finally:
        for stream in streams:
            stream.close()


async def merged(streams: Sequence[OutputStream]) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Yield the outputs of several streams as they arrive, each with the index of its stream."""
    if len(streams) == 1:
        async for output in streams[0]:
            check_served(output)
            yield 0, output
        return
    waiting = {asyncio.ensure_future(anext(stream)): index for index, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = waiting.pop(task)
                try:
                    output = task.result()
                except StopAsyncIteration:
                    continue
                check_served(output)
                waiting[asyncio.ensure_future(anext(streams[index]))] = index
                yield index, output
    finally:
        await _cancel(*waiting)
        for stream in streams:
            stream.close()
