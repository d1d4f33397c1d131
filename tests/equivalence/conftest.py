"""No step of these tests may fail: the engine would compute again and hide it."""

import logging

import pytest


@pytest.fixture(autouse=True)
def no_failed_steps(caplog):
    """Turns the engine's own error log into a failure."""
    with caplog.at_level(logging.ERROR, "jaxinfer"):
        yield
        failed = [r.getMessage() for r in caplog.get_records("call") if r.levelno >= logging.ERROR]
    assert not failed, failed[0]
