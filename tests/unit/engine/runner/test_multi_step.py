"""How many decode steps are dispatched at once, from the time that steps took."""

import pytest

from jaxinfer.engine.runner.multi_step import LATENCY, MOST, Pace


def follow(*seconds: float, steps: int = 1) -> Pace:
    """A pace that has seen steps of these times, read at once when they had run, one dispatched behind the other."""
    pace, now = Pace("auto"), 100.0
    for each in seconds:
        started, now = now, now + each * steps
        pace.note(steps, started - 1.0 if now > 101 else started, now, late=False)
    return pace


def test_a_number_is_kept():
    pace = Pace(3)
    assert pace.steps == 3
    pace.note(1, 0.0, 60.0, late=False)
    assert pace.steps == 3


def test_one_until_something_was_measured():
    pace = Pace("auto")
    assert pace.steps == 1
    pace.note(0, 5.0, 5.001, late=False)
    assert pace.steps == 1, "a prefill says nothing"


@pytest.mark.parametrize(
    ("seconds", "steps"), [(LATENCY / 1000, MOST), (LATENCY / 3.5, 3), (LATENCY / 1.5, 1), (LATENCY * 20, 1)]
)
def test_as_many_as_the_latency_allows(seconds, steps):
    assert follow(seconds).steps == steps
    assert follow(seconds, steps=4).steps == steps, "of several steps the time of one counts"


def test_one_slow_step_is_forgotten_and_slow_ones_are_not():
    fast, slow = LATENCY / 6.5, LATENCY * 50
    assert follow(slow, fast).steps == 6
    assert follow(fast, slow).steps == 1
    assert follow(fast, slow, fast).steps == 6
    assert follow(fast, *[LATENCY / 2.5] * 12).steps == 2


def test_a_host_that_comes_late_knows_a_bound_only():
    """As a consumer of a stream that takes its time."""
    pace = Pace("auto")
    pace.note(1, 10.0, 10.0 + LATENCY / 4.5, late=False)
    assert pace.steps == 4
    pace.note(1, 10.0, 15.0, late=True)
    assert pace.steps == 4, "the five seconds were not the step's"
    pace.note(1, 11.0, 15.001, late=False)
    assert pace.steps == 4, "when it began is not known: it was not after the one before was read"
    pace.note(1, 15.0, 15.001 + LATENCY / 2.5, late=False)
    assert pace.steps == 3, "now it is"
