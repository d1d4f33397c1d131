"""Timeline of a recording: when each sequence waited, was prefilled, decoded, or was preempted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxinfer._utils import html
from jaxinfer.recording import palette
from jaxinfer.recording.events import Owner, Step

WAITING, PREFILL, DECODE, PREEMPTED = PHASES = ("waiting", "prefill", "decode", "preempted")
SHOWN = 20
"""Number of sequences that the text and HTML list."""


@dataclass(frozen=True)
class Span:
    """Interval in which a sequence was in one phase, in seconds since the timeline's start."""

    phase: str
    """"waiting", "prefill", "decode" or "preempted"."""
    start: float
    stop: float


@dataclass(frozen=True)
class TimelineRow:
    """One sequence of a timeline."""

    owner: Owner
    spans: tuple[Span, ...]
    """In order, without gaps from the sequence's arrival to its end, or until now."""

    def seconds(self, phase: str) -> float:
        """Return the time spent in a phase."""
        return sum(span.stop - span.start for span in self.spans if span.phase == phase)


@dataclass(frozen=True, repr=False, eq=False)
class Timeline:
    """Phases of each sequence over time, in order of arrival.

    A span of a step begins when the step was dispatched and ends when the next one was, after which the host had read
    its tokens.
    """

    rows: tuple[TimelineRow, ...]
    seconds: float
    """Length in seconds, from the first arrival or step."""

    @classmethod
    def of(cls, steps: Sequence[Step], owners: Mapping[int, Owner], now: float, start: float) -> "Timeline":
        """Make the timeline of the steps of a log.

        Args:
            steps: in order.
            owners: the sequences by number.
            now: when the log was read; sequences that have not ended last until then.
            start: time from which on the steps are known.
        """
        starts = [step.time for step in steps[:1]] + [owner.arrival for owner in owners.values()]
        first = max(start, min(starts, default=now))
        done: dict[int, list[tuple[str, float, float]]] = {number: [] for number in owners}
        for step, following in zip(steps, [*steps[1:], None]):
            stop = now if following is None else following.time
            for number, _ in step.prefills:
                done[number].append((PREFILL, step.time, stop))
            for number in step.decodes:
                done[number].append((DECODE, step.time, stop))
            for number in step.preempted:
                done[number].append((PREEMPTED, step.time, step.time))
        rows = [TimelineRow(owner, _spans(done[number], owner, first, now)) for number, owner in owners.items()]
        rows = sorted((row for row in rows if row.spans), key=lambda row: (row.owner.arrival, row.owner.number))
        return cls(tuple(rows), max([row.spans[-1].stop for row in rows], default=0.0))

    def plot(self, ax: Any = None, *, last: int = 64) -> Any:
        """Draw the timeline with matplotlib (`timeline_plot.draw`); return the axes."""
        from jaxinfer.recording import timeline_plot

        return timeline_plot.draw(self, ax, last=last)

    def __repr__(self) -> str:
        lines = [
            f"  {row.owner.label}: " + ", ".join(f"{phase} {row.seconds(phase):.3g} s" for phase in _phases(row))
            for row in self.rows[:SHOWN]
        ]
        more = [f"  and {len(self.rows) - SHOWN} more"] if len(self.rows) > SHOWN else []
        return "\n".join([f"Timeline({len(self.rows)} sequences, {self.seconds:.3g} s)", *lines, *more])

    def _repr_html_(self) -> str:
        whole = max(self.seconds, 1e-9)
        rows = "".join(_html_row(row, whole) for row in self.rows[:SHOWN])
        more = f'<p class="dim">and {len(self.rows) - SHOWN} more</p>' if len(self.rows) > SHOWN else ""
        return html.element(
            html.title(f"Timeline of {len(self.rows)} sequences", f"{self.seconds:.3g} s"),
            html.key((colour, phase) for phase, colour in palette.PHASES.items()),
            f'<div class="lanes">{rows}</div>{more}',
            style=LANES,
            name="jxt",
        )


LANES = """
.jxt .lane{display:grid;grid-template-columns:minmax(60px,150px) 1fr 190px;gap:12px;align-items:center;padding:2px 0}
.jxt .lane code{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.jxt .track{position:relative;height:14px;border-radius:4px;background:var(--soft);overflow:hidden}
.jxt .track i{position:absolute;top:0;bottom:0;min-width:1px}
"""


def _html_row(row: TimelineRow, whole: float) -> str:
    strips = "".join(
        f'<i title="{span.phase}: {span.stop - span.start:.3g} s" style="left:{100 * span.start / whole:.3f}%;'
        f'width:{100 * (span.stop - span.start) / whole:.3f}%;background:{palette.PHASES[span.phase]}"></i>'
        for span in row.spans
    )
    owner = row.owner
    state = "running" if owner.end is None else owner.finish_reason or "ended"
    name = html.escape(owner.label, quote=True)
    return (
        f'<div class="lane"><code title="{name}">{name}</code><div class="track">{strips}</div>'
        f'<span class="dim">{owner.prompt_tokens} + {owner.tokens} tokens, {html.escape(state)}</span></div>'
    )


def _phases(row: TimelineRow) -> list[str]:
    return [phase for phase in PHASES if any(span.phase == phase for span in row.spans)]


def _spans(done: Sequence[tuple[str, float, float]], owner: Owner, first: float, now: float) -> tuple[Span, ...]:
    """Join the steps of a sequence to spans; fill the gaps between them with waiting phases.

    Args:
        done: phase, start and stop of each step that it took part in, in order.
        owner: the sequence.
        first: start of the timeline.
        now: when the log was read.
    """
    end = now if owner.end is None else owner.end
    at, gap, made = max(owner.arrival, first), WAITING, []
    if end < at:
        return ()
    for phase, start, stop in done:
        start, stop = max(start, at), min(stop, end)
        if start > at:
            _join(made, gap, at, start)
        if phase == PREEMPTED:
            gap, at = PREEMPTED, max(at, start)
            continue
        if stop > start:
            _join(made, phase, start, stop)
        gap, at = WAITING, max(at, stop)
    if end > at:
        _join(made, gap, at, end)
    return tuple(Span(phase, start - first, stop - first) for phase, start, stop in made)


def _join(made: list[tuple[str, float, float]], phase: str, start: float, stop: float) -> None:
    """Append a span, or make the last one longer if it is of the same phase."""
    if made and made[-1][0] == phase:
        start = made.pop()[1]
    made.append((phase, start, stop))
