"""Plot of a recording's blocks: blocks x steps, coloured by owner, with forks and copies on write."""

from typing import Any

import numpy as np

from jaxinfer.recording import palette
from jaxinfer.recording.events import CACHED, FREE
from jaxinfer.recording.plotting import axes_of, finish, mpl_colour

LISTED = 12
"""Number of sequences that the key names."""
COUNTED = 3000
"""Number of cells up to which the number of holders is written into shared ones."""
ARROW = {"arrowstyle": "-|>", "color": palette.TEXT, "linewidth": 1, "mutation_scale": 7, "shrinkA": 0, "shrinkB": 0}
ARROW |= {"connectionstyle": "arc3,rad=0.3"}
"""Arrow from the source of a copy to its target."""
NO_OWNER = 4
"""Places of the colour table before those of the owners: free, cached, shared, and one unused."""


def draw(recording: Any, ax: Any = None, *, last: int | None = None) -> Any:
    """Draw the owner of each block after each step.

    A column is a step as the host planned it, with the tokens of the step before read. Arrows show copies on write:
    from the shared block to the new one, in the column of the step that writes it. Numbers in shared blocks say how
    many sequences hold them, where there is room. Marks above show forks and preemptions.

    Args:
        recording: a `Recording`.
        ax: matplotlib's axes; by default those of a new figure.
        last: number of the newest steps; by default all.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: `last` is less than 1.
    """
    if last is not None and last < 1:
        raise ValueError(f"last must be at least 1, got {last}")
    codes = recording.blocks(last)
    used = np.flatnonzero((codes != FREE).any(axis=1))
    codes = codes[: used[-1] + 1 if len(used) else 1]
    steps = recording.steps[len(recording.steps) - codes.shape[1] :]
    ax = axes_of(ax, height=min(9.0, max(2.6, 0.6 + 0.16 * len(codes))))
    first = steps[0].number if steps else 0
    extent = (first - 0.5, first + max(1, codes.shape[1]) - 0.5, len(codes) - 0.5, -0.5)
    ax.imshow(_colours(codes), aspect="auto", interpolation="nearest", extent=extent)
    shared = np.argwhere(codes < CACHED) if codes.size <= COUNTED else []
    for block, column in shared:
        ax.text(first + column, block, -codes[block, column], ha="center", va="center", fontsize=6, color="#111111")
    _draw_copies(ax, steps)
    _draw_marks(ax, steps)
    from matplotlib.ticker import MaxNLocator

    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    left = recording.num_blocks - len(codes)
    title = f"blocks over steps ({left} more were never used)" if left else "blocks over steps"
    return finish(ax, _key(recording, codes, steps), xlabel="step", ylabel="block", title=title)


def _colours(codes: np.ndarray) -> np.ndarray:
    """Return the colour of each cell, `[N, T, 4]`."""
    kinds = [palette.KINDS["free"], palette.KINDS["cached"], palette.KINDS["shared"], palette.KINDS["free"]]
    colours = np.array([mpl_colour(colour) for colour in (*kinds, *palette.OWNERS)])
    place = np.where(codes > FREE, NO_OWNER + (codes - 1) % len(palette.OWNERS), np.clip(-codes, 0, 2))
    return colours[place]


def _draw_copies(ax: Any, steps: Any) -> None:
    for step in steps:
        for source, target in step.copies:
            ax.annotate(
                "",
                xy=(step.number - 0.35, target),
                xytext=(step.number - 0.65, source),
                arrowprops=ARROW,
            )


def _draw_marks(ax: Any, steps: Any) -> None:
    """Mark above the plot the steps in which samples began to share their parent's blocks or were preempted."""
    across = ax.get_xaxis_transform()
    beside = {"transform": across, "clip_on": False}
    for step in steps:
        if step.forks:
            place = {"ha": "center", "va": "bottom", "fontsize": 7, "color": palette.TEXT}
            ax.text(step.number, 1.01, f"fork x{len(step.forks)}", **beside, **place)
        if step.preempted:
            ax.plot([step.number], [1.015], marker="v", markersize=6, color=palette.PHASES["preempted"], **beside)


def _key(recording: Any, codes: np.ndarray, steps: Any) -> list[tuple[str, str]]:
    numbers = [int(code) - 1 for code in np.unique(codes[codes > FREE])]
    owners = [recording.owners[number] for number in numbers if number in recording.owners]
    entries = [(palette.KINDS[kind], kind) for kind in ("free", "cached", "shared")]
    if any(step.preempted for step in steps):
        entries.append((palette.PHASES["preempted"], "preempted (mark)"))
    entries += [(palette.owner(owner.number), _short(owner.label)) for owner in owners[:LISTED]]
    return entries + ([("none", f"and {len(owners) - LISTED} more")] if len(owners) > LISTED else [])


def _short(label: str, most: int = 24) -> str:
    return label if len(label) <= most else "…" + label[1 - most :]
