"""Colours of plots, readable on light and on dark backgrounds; the same in matplotlib, HTML and on the server."""

OWNERS = ("#4a8cf7", "#d6548c", "#2fa574", "#8f63d6", "#ef6f45", "#17a2b8", "#7f9c22", "#a5694f", "#5b6fb5", "#c23bc2")
"""Colours of sequences, by number; they repeat."""
KINDS = {
    "free": "rgba(128,128,128,.15)",
    "cached": "rgba(128,128,128,.6)",
    "shared": "#e3a413",
    "one owner": OWNERS[0],
}
"""Colours of blocks by kind of owner (CSS)."""
PHASES = {"waiting": "#a0a4ab", "prefill": OWNERS[0], "decode": OWNERS[2], "preempted": "#e0483e"}
"""Colours of a sequence's phases."""
TEXT = "#777777"
"""Colour of text and lines on a transparent background: a contrast of 4.5 on white and of 4.2 on #111."""


def owner(number: int) -> str:
    """Return the colour of a sequence."""
    return OWNERS[number % len(OWNERS)]
