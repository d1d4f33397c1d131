"""The log line of a busy engine."""

import logging

import pytest

from jaxinfer.engine import metrics
from jaxinfer.engine.metrics import Metrics


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets, in seconds."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_interval_while_busy_with_the_rates_of_that_interval(clock, caplog):
    caplog.set_level(logging.INFO, logger="jaxinfer.engine.metrics")
    counted = Metrics(10.0)

    def step(at: float, prompt: int, made: int) -> list[str]:
        clock[0] = at
        caplog.clear()
        counted.add("prompt_tokens", prompt)
        counted.add("generation_tokens", made)
        counted.maybe_log(running=3, waiting=2, usage=0.25)
        return caplog.messages

    def wake(at: float) -> None:
        clock[0] = at
        counted.wake()

    line = "prompt %.1f tok/s, generation %.1f tok/s, running 3, waiting 2, cache use 25.0%%, prefix hits 0.0%%"
    wake(100.5)
    assert step(101, 60, 10) == [] and step(109.9, 0, 10) == []
    assert step(110, 0, 80) == [line % (6, 10)]
    assert step(115, 0, 500) == [] and step(119.9, 0, 0) == []
    assert step(122, 0, 100) == [line % (0, 50)], "a long step, over 12 s"
    wake(130)
    assert step(132, 0, 50) == [line % (0, 5)], "a pause within the interval is part of it"
    wake(4000)
    assert step(4000.5, 100, 10) == [], "an hour of rest is no interval"
    assert step(4010, 0, 90) == [line % (10, 10)]


def test_no_line_with_a_longer_interval(clock, caplog):
    caplog.set_level(logging.INFO, logger="jaxinfer.engine.metrics")
    counted = Metrics(1e9)
    clock[0] = 1e6
    counted.maybe_log(1, 0, 0.0)
    assert caplog.messages == []
