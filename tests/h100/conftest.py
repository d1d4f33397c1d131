"""Fail tests whose programs are not the ones that a GPU would run."""

from collections.abc import Iterator

import pytest
from support import scripts  # noqa: F401, the folder of `tuning`
from support.lowering import FALLBACK


@pytest.fixture(autouse=True)
def _no_fallback(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Fail a test during which XLA compiled another sort than a GPU would run.

    Without a device XLA lacks sizes of CUB's sorts and compiles a sort of its own, whose kernels, temporaries and bytes
    say nothing about the program on a GPU. It says so once in a process, so the first such test fails.
    """
    yield
    assert FALLBACK not in capfd.readouterr().err
