"""Unused cache positions have no effect: 0 x NaN would show it."""

import jax.numpy as jnp
import numpy as np
import pytest
from support.cases import EDGES, GREEDY, alone, mixed, poison
from support.tiny import BLOCK, make_engine, make_request, prompt, random_runner, run

pytestmark = pytest.mark.xdist_group("llama")


@pytest.mark.parametrize("host", [dict(), dict(budget=5), dict(pool_blocks=12), dict(prefix_caching=False)])
def test_nan_in_unused_cache_changes_nothing(host):
    runner = random_runner()
    expected = alone(runner, mixed(EDGES))
    engine = make_engine(runner, **host)
    poison(runner)
    assert run(engine, mixed(EDGES)) == expected


def test_nan_stays_where_nothing_was_written():
    """Padding rows and tokens are not written anywhere."""
    runner = random_runner()
    engine = make_engine(runner, prefix_caching=False)
    poison(runner)
    request = make_request("one", prompt(BLOCK + 1), GREEDY)
    run(engine, [request])
    written = [np.asarray(~jnp.isnan(layer.keys).any(axis=(1, 3))) for layer in runner.cache]
    made = BLOCK + 1 + GREEDY.max_tokens
    for places in written:
        assert made - 1 <= places.sum() <= made, (
            "each token is written once; the step in flight may have written the last"
        )
