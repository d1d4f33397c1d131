"""Time limits of a test run (`support.deadline`)."""

import pytest
from support import deadline


@pytest.mark.slow
def test_a_slow_test_is_left_out_after_either_limit(request, monkeypatch):
    monkeypatch.setenv("JAXINFER_TEST_UNTIL", "inf")
    monkeypatch.setenv("JAXINFER_SLOW_UNTIL", "9e9")
    deadline.skip_late(request.node)
    monkeypatch.setenv("JAXINFER_SLOW_UNTIL", "1")
    with pytest.raises(pytest.skip.Exception, match="out of time: JAXINFER_SLOW_UNTIL has passed"):
        deadline.skip_late(request.node)


def test_another_test_is_left_out_after_the_limit_of_all(request, monkeypatch):
    monkeypatch.setenv("JAXINFER_TEST_UNTIL", "9e9")
    monkeypatch.setenv("JAXINFER_SLOW_UNTIL", "1")
    deadline.skip_late(request.node)
    monkeypatch.setenv("JAXINFER_TEST_UNTIL", "1")
    with pytest.raises(pytest.skip.Exception, match="JAXINFER_TEST_UNTIL"):
        deadline.skip_late(request.node)


def test_the_summary_counts_what_was_left_out():
    class Report:
        longrepr = ("test.py", 3, "Skipped: out of time: JAXINFER_TEST_UNTIL has passed")

    class Other:
        longrepr = ("test.py", 3, "Skipped: the native kernels need AVX2 and a compiler")

    assert deadline.left_out([Report(), Other(), Report()]).startswith("OUT OF TIME: 2 tests")
    assert deadline.left_out([Other()]) is None
