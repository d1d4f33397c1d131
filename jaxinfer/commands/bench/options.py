"""Option types of `jaxinfer bench`."""

import argparse
import math


def count(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or not 1 <= int(text) <= 10**9:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")
    return int(text)


def whole(text: str) -> int:
    """Parse a whole number of at least 0."""
    return 0 if text == "0" else count(text)


def positive(text: str) -> float:
    """Parse a number above 0; it may be infinite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0")
    return value


def percentiles(text: str) -> tuple[float, ...]:
    """Parse percentiles between 0 and 100, separated by commas."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = (math.nan,)
    if not all(0 <= one <= 100 for one in found):
        raise argparse.ArgumentTypeError(f"{text!r} must be percentiles from 0 to 100, for instance 50,99")
    return found
