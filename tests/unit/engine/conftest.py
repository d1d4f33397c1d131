"""Fixtures of the engine's tests."""

import jax
import numpy as np
import pytest
from support.tiny import random_runner


@pytest.fixture
def runner():
    """The shared runner of a tiny Llama; tests may patch it with `monkeypatch`."""
    return random_runner()


@pytest.fixture
def nan_token(runner, monkeypatch):
    """A token id whose embedding is NaN: sequences that contain it get NaN logits."""
    token = 1  # not used by `support.tiny.prompt`, nor sampled by the seeded requests of these tests
    state = jax.tree.unflatten(runner.program.tree, runner.params)
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    place = next(i for i, (path, _) in enumerate(leaves) if "embedding" in jax.tree_util.keystr(path))
    rows = np.array(runner.params[place])
    rows[token] = np.nan
    params = list(runner.params)
    params[place] = jax.device_put(rows, runner.params[place].sharding)
    monkeypatch.setattr(runner, "params", params)
    return token
