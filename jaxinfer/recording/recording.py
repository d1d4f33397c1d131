"""Recording of an engine's steps, as a value that outlives the engine."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jaxinfer._utils import html
from jaxinfer.recording import palette
from jaxinfer.recording.events import EventLog, Owner, Step
from jaxinfer.recording.timeline import Timeline


@dataclass(frozen=True, repr=False, eq=False)
class Recording:
    """Steps of an engine: the owner of each block, and the phases of each sequence.

    Shown as a summary; `plot_blocks` and `plot_timeline` draw it with matplotlib.
    """

    steps: tuple[Step, ...]
    owners: dict[int, Owner]
    """Sequences by their numbers."""
    before: np.ndarray
    """Codes of the blocks before the first step, `[N]` (`events`)."""
    block_size: int
    dropped: int
    """Number of older steps that are no longer kept."""
    start: float
    """Time from which on the steps are known."""
    time: float
    """When the recording was read."""

    @classmethod
    def of(cls, log: EventLog, time: float) -> "Recording":
        """Copy a log."""
        first = log.events[0].number if log.events else 0
        start = log.events[0].time if first else log.started
        return cls(tuple(log.events), log.owners_now(), log.before.copy(), log.block_size, first, start, time)

    @property
    def num_blocks(self) -> int:
        """N, all blocks of the cache."""
        return len(self.before)

    def blocks(self, last: int | None = None) -> np.ndarray:
        """Return the code of each block after each step, `[N, T]` int32 (`recording.events`).

        0: free. -1: cached, held by nobody. Above 0: the number of the only sequence that holds it, plus 1. -k: held
        by k sequences.

        Args:
            last: number of the newest steps to return; by default all.
        """
        shown = self.steps if last is None else self.steps[max(0, len(self.steps) - last) :]
        state = self.before.copy()
        for step in self.steps[: len(self.steps) - len(shown)]:
            state[step.changed[0]] = step.changed[1]
        made = np.empty((len(shown), self.num_blocks), np.int32)
        for row, step in zip(made, shown):
            state[step.changed[0]] = step.changed[1]
            row[:] = state
        return made.T

    @cached_property
    def timeline(self) -> Timeline:
        """Phases of each sequence over time."""
        return Timeline.of(self.steps, self.owners, self.time, self.start)

    def plot_blocks(self, ax: Any = None, *, last: int | None = None) -> Any:
        """Draw blocks over steps, coloured by owner (`blocks_plot.draw`); return matplotlib's axes."""
        from jaxinfer.recording import blocks_plot

        return blocks_plot.draw(self, ax, last=last)

    def plot_timeline(self, ax: Any = None, *, last: int = 64) -> Any:
        """Draw the timeline (`timeline_plot.draw`); return matplotlib's axes."""
        return self.timeline.plot(ax, last=last)

    @cached_property
    def _counts(self) -> dict[str, int]:
        return {
            "sequences": len(self.owners),
            "forks": sum(len(step.forks) for step in self.steps),
            "blocks copied on write": sum(len(step.copies) for step in self.steps),
            "preemptions": sum(len(step.preempted) for step in self.steps),
        }

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {what}" for what, count in self._counts.items())
        more = f" ({self.dropped} older ones were dropped)" if self.dropped else ""
        return f"Recording({len(self.steps)} steps{more}, {self.num_blocks} blocks: {counts})"

    def _repr_html_(self) -> str:
        now = self.blocks(1)[:, 0] if self.steps else self.before
        kinds = ("free", now == 0), ("cached", now == -1), ("shared", now < -1), ("one owner", now > 0)
        parts = [(palette.KINDS[name], int(mask.sum()), f"{name}: {int(mask.sum())} blocks") for name, mask in kinds]
        dropped = f"; {self.dropped} older ones were dropped" if self.dropped else ""
        return html.element(
            html.title(
                f"Recording of {len(self.steps)} steps",
                f"{self.num_blocks} blocks of {self.block_size} tokens{dropped}",
            ),
            html.tiles((f"{count:,}", what) for what, count in self._counts.items()),
            '<p class="dim">Blocks after the last step</p>',
            html.bar(parts, self.num_blocks),
        )
