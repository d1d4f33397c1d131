"""What the engine's tests share."""

import jax
import numpy as np
import pytest
from support.tiny import random_runner


@pytest.fixture
def runner():
    """The shared tiny Llama; a test may replace what it likes with `monkeypatch`."""
    return random_runner()


@pytest.fixture
def nan_token(runner, monkeypatch):
    """A token id whose embedding is NaN: whoever reads it has logits that are no numbers."""
    token = 1  # in no prompt of `support.tiny.prompt`, and none that the seeded requests of these tests draw
    state = jax.tree.unflatten(runner.program.tree, runner.params)
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    place = next(i for i, (path, _) in enumerate(leaves) if "embedding" in jax.tree_util.keystr(path))
    rows = np.array(runner.params[place])
    rows[token] = np.nan
    params = list(runner.params)
    params[place] = jax.device_put(rows, runner.params[place].sharding)
    monkeypatch.setattr(runner, "params", params)
    return token
