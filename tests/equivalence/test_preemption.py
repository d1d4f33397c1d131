"""A preempted sequence is recomputed and gives the same tokens."""

import pytest
from support.cases import EDGES, GREEDY, SEEDED, alone, mixed
from support.tiny import BLOCK, CHUNK, make_engine, make_request, prompt, random_runner, run

from jaxinfer.sampling_params import SamplingParams

pytestmark = pytest.mark.xdist_group("llama")

NEEDED = -(-(max(EDGES) + GREEDY.max_tokens) // BLOCK)
"""Blocks of the longest sequence: a smaller pool could not run it at all."""


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("spare", [0, 2, 7])
def test_a_small_pool_gives_the_same_tokens(spare, caching):
    runner = random_runner()
    engine = make_engine(runner, pool_blocks=NEEDED + spare, prefix_caching=caching)
    assert run(engine, mixed(EDGES)) == alone(runner, mixed(EDGES))
    assert engine.scheduler.preempted > 0


@pytest.mark.parametrize("budget", [6, 9])
def test_preempted_while_prompts_are_in_chunks(budget):
    runner = random_runner()
    engine = make_engine(runner, pool_blocks=NEEDED + 1, budget=budget)
    assert run(engine, mixed(EDGES)) == alone(runner, mixed(EDGES))
    assert engine.scheduler.preempted > 0


def test_preempted_again_and_again():
    """Every sequence needs the whole pool: each progresses only while those after it wait."""
    runner = random_runner()
    params = SamplingParams(temperature=0, max_tokens=CHUNK)
    wanted = [make_request(str(i), prompt(BLOCK, 400 + i), params) for i in range(6)]
    engine = make_engine(runner, pool_blocks=-(-(BLOCK + CHUNK) // BLOCK))
    assert run(engine, wanted) == alone(runner, wanted)
    assert sum(r.preemptions for r in wanted) == engine.scheduler.preempted >= 5
    assert wanted[0].preemptions == 0, "the oldest is never preempted"


def test_penalties_and_bad_words_survive():
    """Their state is in the device's row, which a preempted sequence loses."""
    runner = random_runner()
    params = SamplingParams(
        temperature=0,
        max_tokens=12,
        repetition_penalty=1.3,
        frequency_penalty=0.5,
        min_tokens=3,
        stop_token_ids=[5],
        logit_bias={7: 1.0},
        _bad_words_token_ids=((8, 9), (10,)),
    )
    wanted = [make_request(str(i), prompt(6 + i, 500 + i), params) for i in range(5)]
    engine = make_engine(runner, pool_blocks=7)
    assert run(engine, wanted) == alone(runner, wanted)
    assert engine.scheduler.preempted > 0


def test_one_seed_after_preemption():
    runner = random_runner()
    wanted = [make_request(str(i), prompt(9, 600 + i), SEEDED) for i in range(6)]
    engine = make_engine(runner, pool_blocks=6)
    assert run(engine, wanted) == alone(runner, wanted)
    assert sum(r.preemptions for r in wanted) > 0
