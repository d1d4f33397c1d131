import threading
import time

import pytest
from jaxinfer.text.deadline import run_with_deadline


def workers():
    return [thread for thread in threading.enumerate() if thread.name == "jaxinfer-deadline"]


def test_results_and_errors_come_through():
    assert run_with_deadline(lambda: 3, 5.0) == 3
    with pytest.raises(ZeroDivisionError):
        run_with_deadline(lambda: 1 // 0, 5.0)


def forever():
    while True:
        try:
            time.sleep(0)
        except Exception:  # what careless code does; the deadline passes it
            continue


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_work_that_does_not_end_is_ended():
    start = time.perf_counter()
    with pytest.raises(TimeoutError):
        run_with_deadline(forever, 0.1)
    assert time.perf_counter() - start < 3
    assert not workers()


def test_an_interrupt_ends_the_work_too(monkeypatch):
    join = threading.Thread.join

    def interrupted(self, timeout=None):
        monkeypatch.setattr(threading.Thread, "join", join)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_with_deadline(forever, 60.0)
    assert not workers()
