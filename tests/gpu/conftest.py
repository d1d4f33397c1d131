"""What needs a GPU is run with JAXINFER_TEST_GPU=1 where there is one, and skipped elsewhere."""

import jax
import pytest


@pytest.fixture(scope="session", autouse=True)
def gpu() -> jax.Device:
    """The device the tests run on."""
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU: JAXINFER_TEST_GPU=1 python -m pytest tests/gpu on a machine with one")
    return jax.devices()[0]
