"""The kernels that are compiled for this machine."""

import os

import pytest

from jaxinfer.kernels.native import build


def require_native_kernels() -> None:
    """Skips a test where they cannot be built; in CI only a processor without the instructions is a reason."""
    reason = build.lacking()
    if reason is None:
        return
    if os.environ.get("CI") and build.cpu_flags() >= build.NEEDED:
        pytest.fail(f"the native kernels: {reason}; in CI this is no reason to skip")
    pytest.skip(f"the native kernels: {reason}")
