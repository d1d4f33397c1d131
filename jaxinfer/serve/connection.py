"""Connections whose requests must arrive in time: uvicorn limits neither a new connection nor slow headers."""

import asyncio
import logging
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

log = logging.getLogger(__name__)

TOO_LATE = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


def protocol(seconds: float) -> type[asyncio.Protocol]:
    """Return uvicorn's HTTP protocol with a time limit for the headers of each request.

    Args:
        seconds: time from the connection, or from the first byte of a later request, to the end of the headers. Then
            the connection is closed with status 408.
    """

    class LimitedProtocol(AutoHTTPProtocol):
        _limit: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._start()

        def data_received(self, data: bytes) -> None:
            if self._between_requests:
                self._start()
            super().data_received(data)
            if not self._between_requests:
                self._stop()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        @property
        def _between_requests(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def _start(self) -> None:
            if self._limit is None:
                self._limit = self.loop.call_later(seconds, self._close)

        def _stop(self) -> None:
            if self._limit is not None:
                self._limit.cancel()
                self._limit = None

        def _close(self) -> None:
            self._limit = None
            if not self.transport.is_closing():
                log.info("the headers of a request did not arrive within body_timeout = %g s", seconds)
                self.transport.write(TOO_LATE)
                self.transport.close()

    return LimitedProtocol
