"""Create and label the axes of plots: a transparent background, readable in light and dark."""

from typing import Any

from jaxinfer.recording import palette


def axes_of(ax: Any, height: float, width: float = 10.0) -> Any:
    """Return matplotlib's axes to draw on: the given ones, or those of a new figure.

    Args:
        ax: axes, or None for a new figure on a transparent background.
        height: height of a new figure, in inches.
        width: its width.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install 'jaxinfer[notebook]'", name="matplotlib") from None
    figure, ax = plt.subplots(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    ax.patch.set_alpha(0)
    return ax


def finish(ax: Any, entries: list[tuple[str, str]], title: str, **labels: str) -> Any:
    """Label axes, add the key and colour texts and lines; return the axes.

    Args:
        ax: the axes.
        entries: colours and what they stand for.
        title: the title, with room for marks below.
        labels: arguments of `Axes.set`.
    """
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=mpl_colour(colour), label=label) for colour, label in entries]
    ax.set(**labels)
    ax.set_title(title, color=palette.TEXT, pad=16)
    ax.tick_params(colors=palette.TEXT)
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set_color(palette.TEXT)
    for name, spine in ax.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(palette.TEXT)
    ax.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(1.005, 1),
        frameon=False,
        labelcolor=palette.TEXT,
        fontsize="small",
        borderaxespad=0,
    )
    return ax


def mpl_colour(colour: str) -> Any:
    """Convert a CSS colour to matplotlib's form."""
    from matplotlib.colors import to_rgba

    if colour.startswith("rgba("):
        red, green, blue, alpha = map(float, colour[5:-1].split(","))
        return red / 255, green / 255, blue / 255, alpha
    return to_rgba(colour)
