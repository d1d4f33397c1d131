"""How many decode steps the host dispatches at once."""

MOST = 8
"""Decode steps at once with "auto": the host's work a step is then an eighth."""
LATENCY = 0.1
"""Seconds that the steps dispatched at once may take with "auto": so long may tokens be held back, or a new request."""


class Pace:
    """The number of steps, a fixed one or one that follows the measured time of a step."""

    def __init__(self, asked: int | str):
        self._asked = asked
        self._seconds: float | None = None
        self._ready_at, self._late = 0.0, False

    @property
    def steps(self) -> int:
        """As many as may be dispatched at once, where nothing else bounds them."""
        if not isinstance(self._asked, str):
            return self._asked
        if self._seconds is None:
            return 1
        return max(1, min(MOST, int(LATENCY / self._seconds)))

    def note(self, steps: int, started: float, now: float, *, late: bool) -> None:
        """What was dispatched at `started` is read now; `steps`: how many decode steps it was, 0 for anything else.

        `late`: it had run before the host came to read it, so that its time is at most what is seen here. What is
        slower than what is known counts half: one slow step (another program on the machine, a compilation) is
        forgotten soon.
        """
        began = started if self._late else max(started, self._ready_at)
        exact = not (late or self._late)
        self._ready_at, self._late = now, late
        if not steps:
            return
        seconds, known = max((now - began) / steps, 1e-6), self._seconds
        if known is None or seconds < known:
            self._seconds = seconds
        elif exact:
            self._seconds = (known + seconds) / 2
