"""Formatting of sizes."""


def size_text(count: float) -> str:
    """Format bytes in the largest of B, KiB, MiB and GiB that gives at least 1."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
