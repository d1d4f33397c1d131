"""What needs a device of its own is run by `tests/gpu/run.py`, on a GPU or on a CPU, and skipped elsewhere."""

import os

import jax
import pytest


@pytest.fixture(scope="session", autouse=True)
def device() -> str:
    """The platform that the tests run on, "gpu" or "cpu"; on a CPU their sizes are small."""
    platform = jax.default_backend()
    if platform != "gpu" and os.environ.get("JAXINFER_TEST_DEVICES") != "1":
        pytest.skip("runs by itself: python tests/gpu/run.py --out DIR")
    return platform
