"""Plot of a timeline: a line for each sequence, coloured by phase."""

from typing import Any

from jaxinfer.recording import palette
from jaxinfer.recording.plotting import axes_of, finish


def draw(timeline: Any, ax: Any = None, *, last: int = 64) -> Any:
    """Draw when each sequence waited, was prefilled, decoded, or was preempted.

    Args:
        timeline: a `Timeline`.
        ax: matplotlib's axes; by default those of a new figure.
        last: number of the newest sequences.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: `last` is less than 1.
    """
    if last < 1:
        raise ValueError(f"last must be at least 1, got {last}")
    rows = timeline.rows[-last:]
    ax = axes_of(ax, height=min(12.0, 1.2 + 0.26 * max(2, len(rows))))
    for place, row in enumerate(rows):
        for span in row.spans:
            hatch = {"hatch": "////", "edgecolor": "#ffffff80", "linewidth": 0} if span.phase == "preempted" else {}
            ax.barh(place, span.stop - span.start, left=span.start, height=0.72, **_style(span.phase), **hatch)
        if row.owner.finish_reason in ("abort", "error"):
            where = row.spans[-1].stop
            ax.text(where, place, f" {row.owner.finish_reason}", va="center", fontsize=7, color=palette.TEXT)
    ax.set_yticks(range(len(rows)), [_label(row.owner.label) for row in rows], fontsize=8)
    ax.set_ylim(max(1, len(rows)) - 0.5, -0.5)
    ax.set_xlim(0, timeline.seconds * 1.01 or 1)
    left = len(timeline.rows) - len(rows)
    title = "timeline" if not left else f"timeline ({left} earlier sequences are left out)"
    entries = [(colour, phase) for phase, colour in palette.PHASES.items()]
    return finish(ax, entries, xlabel="seconds", title=title)


def _style(phase: str) -> dict[str, Any]:
    return {"color": palette.PHASES[phase], "alpha": 0.45 if phase == "waiting" else 1.0}


def _label(label: str, most: int = 24) -> str:
    return label if len(label) <= most else "…" + label[1 - most :]
