"""How sizes are written."""


def size_text(count: float) -> str:
    """Bytes, in the largest unit of 1024 that leaves at least one."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
