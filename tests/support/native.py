"""Requirements of the native CPU kernels."""

import os

import pytest

from jaxinfer.kernels.native import build, library


def require_native_kernels() -> None:
    """Skip the test if native kernels cannot be built; in CI, only if the processor lacks the instructions."""
    reason = build.lacking()
    if reason is None:
        return
    if os.environ.get("CI") and library.choose_variant(build.cpu_flags()):
        pytest.fail(f"the native kernels: {reason}; in CI this is no reason to skip")
    pytest.skip(f"the native kernels: {reason}")
