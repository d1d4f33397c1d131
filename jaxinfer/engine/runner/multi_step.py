"""Number of decode steps that the host dispatches at once."""

MAX_STEPS = 8
"""Maximum number of decode steps at once with "auto": it divides the host's work per step by eight."""
MAX_SECONDS = 0.1
"""Maximum seconds that steps dispatched at once may take with "auto": tokens and new requests may be delayed by
this.
"""


class MultiStep:
    """Number of decode steps per dispatch: fixed, or adapted to the measured time of a step."""

    def __init__(self, steps: int | str):
        self._steps = steps
        self._seconds: float | None = None
        self._ready_at, self._late = 0.0, False

    @property
    def steps(self) -> int:
        """Maximum number of steps to dispatch at once, if nothing else limits them."""
        if not isinstance(self._steps, str):
            return self._steps
        if self._seconds is None:
            return 1
        return max(1, min(MAX_STEPS, int(MAX_SECONDS / self._seconds)))

    def note(self, steps: int, started: float, now: float, *, late: bool) -> float:
        """Record that the host now reads what was dispatched at `started`.

        A measurement above the estimate counts half, so that a single slow step (another program on the machine, a
        compilation) is soon forgotten.

        Args:
            steps: number of decode steps; 0 for anything else.
            started: time of dispatch.
            now: time of reading.
            late: whether the steps had already finished, so that the measured time is an upper bound.

        Returns:
            The measured seconds.
        """
        began = started if self._late else max(started, self._ready_at)
        exact = not (late or self._late)
        self._ready_at, self._late = now, late
        if not steps:
            return now - began
        seconds, known = max((now - began) / steps, 1e-6), self._seconds
        if known is None or seconds < known:
            self._seconds = seconds
        elif exact:
            self._seconds = (known + seconds) / 2
        return now - began
