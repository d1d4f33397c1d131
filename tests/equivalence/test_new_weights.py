"""Weights replaced under paused requests, in every kind of cache: the old cache goes on, and nobody else finds it."""

from collections.abc import Iterator

import jax
import pytest
from support.tiny import BLOCK, make_engine, make_request, prompt, random_runner, run

from jaxinfer.engine.engine import Engine
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.sampling_params import SamplingParams

MADE = 24
GREEDY = SamplingParams(temperature=0, max_tokens=MADE, ignore_eos=True)
SEVERAL = SamplingParams(temperature=1.0, n=3, seed=3, max_tokens=MADE, ignore_eos=True)
FAMILIES = [
    pytest.param(family, marks=[pytest.mark.xdist_group(family), *[pytest.mark.slow] * (family != "llama")])
    for family in ("llama", "gemma3", "qwen3_next", "kimi_linear")
]


@pytest.fixture
def runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    """The family's shared runner, whose weights are put back."""
    found = random_runner(request.param)
    kept = list(found.params)
    yield found
    found.params = kept


def pause(engine: Engine) -> None:
    engine.control.stop("keep")
    assert engine.control.stopped()


def negate(params: list[jax.Array]) -> None:
    """Replace weights by others: the head's, which every family has, and some of each layer's."""
    params[:] = [-param if param.ndim > 1 else param for param in params]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("runner", FAMILIES, indirect=True)
def test_paused_requests_end_and_later_ones_find_new_prefixes_alone(runner, recompute):
    """One decodes, three samples share its prompt's blocks, one is half way through its prompt."""
    text = prompt(3 * BLOCK + 1, seed=5)
    engine = make_engine(runner)
    requests = [make_request("one", text, GREEDY), make_request("several", prompt(9, seed=6), SEVERAL)]
    for request in requests:
        engine.add(request)
    for _ in range(6):
        engine.step()
    engine.add(late := make_request("late", prompt(40, seed=7), GREEDY))
    while not late.sequences[0].computed:
        engine.step()
    pause(engine)
    before = requests[0].sequences[0].output_ids.tolist()
    assert 0 < len(before) < MADE and late.sequences[0].computed < 40
    engine.control.replace_weights(negate)
    engine.control.resume(recompute=recompute)
    run(engine, [])
    found = run(engine, [again := make_request("again", text, GREEDY)])
    assert recompute or not again.cached_tokens
    for request in (*requests, late):
        assert all(sequence.made == MADE for sequence in request.sequences)
    assert requests[0].sequences[0].output_ids.tolist()[: len(before)] == before
    fresh = make_engine(runner)
    [expected] = run(fresh, [make_request("again", text, GREEDY)])
    [of_late] = run(fresh, [make_request("late", prompt(40, seed=7), GREEDY)])
    assert found == [expected] and late.sequences[0].output_ids.tolist() == of_late[0]
    if recompute:  # continued by the new weights as if they had made all of it
        rest = SamplingParams(temperature=0, max_tokens=MADE - len(before), ignore_eos=True)
        [[continued]] = run(fresh, [make_request("rest", [*text, *before], rest)])
        assert requests[0].sequences[0].output_ids.tolist()[len(before) :] == continued
