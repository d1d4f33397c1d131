"""Number of decode steps dispatched at once, given the measured step times."""

import pytest

from jaxinfer.engine.runner.multi_step import LATENCY, MOST, Pace


def follow(*seconds: float, steps: int = 1) -> Pace:
    """A `Pace` that has measured these step times, each read as soon as it had run, with the next one dispatched
    behind it.
    """
    pace, now = Pace("auto"), 100.0
    for each in seconds:
        started, now = now, now + each * steps
        pace.note(steps, started - 1.0 if now > 101 else started, now, late=False)
    return pace


def test_a_fixed_number_of_steps_is_kept():
    pace = Pace(3)
    assert pace.steps == 3
    pace.note(1, 0.0, 60.0, late=False)
    assert pace.steps == 3


def test_one_step_until_a_time_is_measured():
    pace = Pace("auto")
    assert pace.steps == 1
    pace.note(0, 5.0, 5.001, late=False)
    assert pace.steps == 1, "a prefill is not measured"


@pytest.mark.parametrize(
    ("seconds", "steps"), [(LATENCY / 1000, MOST), (LATENCY / 3.5, 3), (LATENCY / 1.5, 1), (LATENCY * 20, 1)]
)
def test_as_many_as_the_latency_allows(seconds, steps):
    assert follow(seconds).steps == steps
    assert follow(seconds, steps=4).steps == steps, "the time per step counts"


def test_a_single_slow_step_is_forgotten():
    fast, slow = LATENCY / 6.5, LATENCY * 50
    assert follow(slow, fast).steps == 6
    assert follow(fast, slow).steps == 1
    assert follow(fast, slow, fast).steps == 6
    assert follow(fast, *[LATENCY / 2.5] * 12).steps == 2


def test_a_late_host_measures_an_upper_bound():
    """As with a slow consumer of a stream."""
    pace = Pace("auto")
    pace.note(1, 10.0, 10.0 + LATENCY / 4.5, late=False)
    assert pace.steps == 4
    pace.note(1, 10.0, 15.0, late=True)
    assert pace.steps == 4, "the delay is not the step's time"
    pace.note(1, 11.0, 15.001, late=False)
    assert pace.steps == 4, "its start is unknown, so its time is not used"
    pace.note(1, 15.0, 15.001 + LATENCY / 2.5, late=False)
    assert pace.steps == 3, "the start is known"
