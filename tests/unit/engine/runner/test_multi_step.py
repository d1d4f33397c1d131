"""Number of decode steps dispatched at once, given the measured step times."""

import pytest

from jaxinfer.engine.runner.multi_step import MAX_SECONDS, MAX_STEPS, MultiStep


def follow(*seconds: float, steps: int = 1) -> MultiStep:
    """A `MultiStep` that has measured these step times, each read as soon as it had run, with the next one dispatched
    behind it.
    """
    multi_step, now = MultiStep("auto"), 100.0
    for each in seconds:
        started, now = now, now + each * steps
        multi_step.note(steps, started - 1.0 if now > 101 else started, now, late=False)
    return multi_step


def test_a_fixed_number_of_steps_is_kept():
    multi_step = MultiStep(3)
    assert multi_step.steps == 3
    multi_step.note(1, 0.0, 60.0, late=False)
    assert multi_step.steps == 3


def test_one_step_until_a_time_is_measured():
    multi_step = MultiStep("auto")
    assert multi_step.steps == 1
    multi_step.note(0, 5.0, 5.001, late=False)
    assert multi_step.steps == 1, "a prefill is not measured"


@pytest.mark.parametrize(
    ("seconds", "steps"),
    [(MAX_SECONDS / 1000, MAX_STEPS), (MAX_SECONDS / 3.5, 3), (MAX_SECONDS / 1.5, 1), (MAX_SECONDS * 20, 1)],
)
def test_as_many_as_the_latency_allows(seconds, steps):
    assert follow(seconds).steps == steps
    assert follow(seconds, steps=4).steps == steps, "the time per step counts"


def test_a_single_slow_step_is_forgotten():
    fast, slow = MAX_SECONDS / 6.5, MAX_SECONDS * 50
    assert follow(slow, fast).steps == 6
    assert follow(fast, slow).steps == 1
    assert follow(fast, slow, fast).steps == 6
    assert follow(fast, *[MAX_SECONDS / 2.5] * 12).steps == 2


def test_a_late_host_measures_an_upper_bound():
    """As with a slow consumer of a stream."""
    multi_step = MultiStep("auto")
    multi_step.note(1, 10.0, 10.0 + MAX_SECONDS / 4.5, late=False)
    assert multi_step.steps == 4
    multi_step.note(1, 10.0, 15.0, late=True)
    assert multi_step.steps == 4, "the delay is not the step's time"
    multi_step.note(1, 11.0, 15.001, late=False)
    assert multi_step.steps == 4, "its start is unknown, so its time is not used"
    multi_step.note(1, 15.0, 15.001 + MAX_SECONDS / 2.5, late=False)
    assert multi_step.steps == 3, "the start is known"
