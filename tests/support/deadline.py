"""Time limits of a test run, so that a run on a slow machine ends: tests that would start later are skipped.

JAXINFER_SLOW_UNTIL limits tests marked slow, JAXINFER_TEST_UNTIL all tests. Both are seconds since 1970; unset means no
limit. `.ci/run` sets them.
"""

import os
import time

import pytest

REASON = "out of time"


def skip_late(item: pytest.Item) -> None:
    """Skip a test that would start after its limit."""
    limits = ["JAXINFER_TEST_UNTIL", *(["JAXINFER_SLOW_UNTIL"] if item.get_closest_marker("slow") else [])]
    for name in limits:
        if time.time() > float(os.environ.get(name, "inf")):
            pytest.skip(f"{REASON}: {name} has passed")


def left_out(skipped: list[pytest.TestReport]) -> str | None:
    """Return how many of the skipped tests were out of time, or None if none was."""
    late = sum(REASON in str(report.longrepr) for report in skipped)
    return f"OUT OF TIME: {late} tests were left out, as this machine is slow" if late else None
