"""A prompt prefilled in chunks of any size gives the same tokens as in one."""

import pytest
from support.cases import EDGES, alone, mixed
from support.tiny import CHUNK, make_engine, random_runner, run

pytestmark = pytest.mark.xdist_group("llama")

QUICK = (1, 5, CHUNK - 1)


@pytest.mark.parametrize(
    "budget", [b if b in QUICK else pytest.param(b, marks=pytest.mark.slow) for b in range(1, CHUNK + 1)]
)
def test_every_token_budget_gives_the_same_tokens(budget):
    runner = random_runner()
    engine = make_engine(runner, budget=budget)
    assert run(engine, mixed(EDGES)) == alone(runner, mixed(EDGES))


def test_the_budget_is_kept():
    """No step takes more tokens than the budget, so that the test above splits prompts as intended."""
    runner = random_runner()
    engine = make_engine(runner, budget=3)
    run(engine, mixed(EDGES[-4:]))
    tokens = engine.metrics.histograms["iteration_tokens_total"]
    assert dict(zip(tokens.bounds, tokens.counts, strict=False))[4] > 0
    assert sum(tokens.counts[3:]) == 0
