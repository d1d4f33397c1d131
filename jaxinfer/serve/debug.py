"""`GET /debug/cache`: a page that shows blocks and requests while the server runs (`ServerConfig.debug_cache`)."""

import asyncio
from importlib.resources import files
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from jaxinfer.async_llm import AsyncLLM
from jaxinfer.recording import palette
from jaxinfer.recording.events import FREE, as_runs
from jaxinfer.recording.recording import Recording
from jaxinfer.recording.timeline import Timeline
from jaxinfer.serve.context import of
from jaxinfer.serve.errors import Json

PATH = "/debug/cache"
STEPS, BLOCKS, ROWS = 240, 1024, 80
"""Number of the newest steps, of the first blocks, and of the newest sequences that the page shows over time."""
UNWATCHED = 30.0
"""Seconds from the last request of the page to the end of the recording."""
LEAST = 0.2
"""Seconds for which an answer is reused, so that many open pages cost no more than one."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
POLICY += "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
"""Content security policy: the page loads nothing, and asks only this server."""


class Watch:
    """Recorder of the engine's steps while the page is open."""

    def __init__(self, llm: AsyncLLM):
        self._llm = llm
        self._lock = asyncio.Lock()
        self._last: tuple[float, dict[str, Any]] = (-LEAST, {})
        self._timer: asyncio.TimerHandle | None = None
        self._recording = False
        self._ending: asyncio.Task[None] | None = None

    async def read(self) -> dict[str, Any]:
        """Return what the page shows, and record from now on; the answer may be `LEAST` seconds old."""
        loop = asyncio.get_running_loop()
        async with self._lock:
            if loop.time() - self._last[0] >= LEAST:
                if not self._recording:
                    await self._llm.start_recording(max_steps=4 * STEPS)
                    self._recording = True
                state = await self._llm.cache(prefixes=False)
                recording = await self._llm.recording()
                shown = state.as_dict() | await asyncio.to_thread(_over_time, recording)
                self._last = loop.time(), shown
            if self._timer is not None:
                self._timer.cancel()
            self._timer = loop.call_later(UNWATCHED, self._end)
            return self._last[1]

    def _end(self) -> None:
        self._ending = asyncio.ensure_future(self._stop())

    async def _stop(self) -> None:
        async with self._lock:
            self._recording, self._timer = False, None
            try:
                await self._llm.stop_recording()
            except RuntimeError:  # the engine was closed meanwhile
                pass


def _over_time(recording: Recording) -> dict[str, Any]:
    """Convert a recording to plain JSON values: blocks of the newest steps as runs, and the timeline."""
    codes = recording.blocks(STEPS)[:BLOCKS]
    used = np.flatnonzero((codes != FREE).any(axis=1))
    codes = codes[: used[-1] + 1 if len(used) else 0]
    steps = recording.steps[len(recording.steps) - codes.shape[1] :]
    return {
        "time": recording.time,
        "steps": [
            {
                "number": step.number,
                "codes": as_runs(column),
                "copies": [pair for pair in step.copies if max(pair) < len(codes)],
                "forks": len(step.forks),
                "preempted": len(step.preempted),
            }
            for step, column in zip(steps, codes.T)
        ],
        "shown_blocks": len(codes),
        "timeline": _rows(recording.timeline),
        "colours": {"owners": palette.OWNERS, "kinds": palette.KINDS, "phases": palette.PHASES},
    }


def _rows(timeline: Timeline) -> dict[str, Any]:
    rows = timeline.rows[-ROWS:]
    first = min((row.spans[0].start for row in rows), default=0.0)
    return {
        "seconds": timeline.seconds - first,
        "rows": [
            {
                "number": row.owner.number,
                "label": row.owner.label,
                "state": "" if row.owner.end is None else row.owner.finish_reason,
                "spans": [[span.phase, span.start - first, span.stop - first] for span in row.spans],
            }
            for row in rows
        ],
    }


async def page(request: Request) -> Response:
    """Return the page."""
    text = files("jaxinfer.serve").joinpath("debug_cache.html").read_text(encoding="utf-8")
    return HTMLResponse(text, headers={"content-security-policy": POLICY, "cache-control": "no-store"})


async def data(request: Request) -> Response:
    """Return what the page shows, as JSON."""
    of(request).llm.check_alive()
    return Json(await request.app.state.watch.read())
