"""What the CPU kernel does not compute is XLA's, with a warning."""

import logging

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer._utils.log import warn_once
from jaxinfer.kernels.matmul import choose as matmul
from jaxinfer.kernels.matmul.choose import NATIVE


def test_float16_is_computed_by_xla_with_a_warning(caplog: pytest.LogCaptureFixture):
    warn_once.cache_clear()
    x, w = (
        np.random.default_rng(seed).standard_normal((rows, 32)).astype(np.float16) for seed, rows in enumerate((2, 16))
    )
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = matmul.matmul(jnp.asarray(x), jnp.asarray(w), kernel=NATIVE)
    np.testing.assert_allclose(found, x.astype(np.float32) @ w.astype(np.float32).T, atol=0.02)
    assert [record.getMessage() for record in caplog.records] == [
        "products run in XLA, which is slower: the CPU kernel computes float32 and bfloat16, not float16"
    ]
