"""Every family (one of them also in int8) with chunks, forks, preemption and prefix reuse at once."""

import pytest
from support.cases import alone, poison
from support.tiny import (
    ARCHITECTURES,
    BLOCK,
    CHUNK,
    joint_runner,
    make_engine,
    make_request,
    prompt,
    random_runner,
    run,
)

from jaxinfer.kv import groups as kv_groups
from jaxinfer.sampling_params import SamplingParams

OTHERS = [
    *(
        pytest.param(family, None, marks=(pytest.mark.slow, pytest.mark.xdist_group(family)))
        for family in ARCHITECTURES
        if family != "llama"
    ),
    pytest.param("llama", "int8", marks=(pytest.mark.slow, pytest.mark.xdist_group("int8"))),
]


def requests():
    """Prompts with a shared prefix of three blocks, one to three samples each."""
    prefix = prompt(3 * BLOCK, 7)
    return [
        make_request(
            str(i),
            prefix + prompt(i * 3 + 1, 10 + i),
            SamplingParams(temperature=0.2, seed=i, max_tokens=12, n=1 + i % 3),
        )
        for i in range(7)
    ]


JOINT = [
    pytest.param(family, marks=(pytest.mark.slow, pytest.mark.xdist_group(family)))
    for family in ("deepseek_v3", "gemma3", "gpt_oss")
]
"""Families for joint steps, which attention and recurrent layers alone treat in a way of their own."""


@pytest.mark.parametrize(("family", "quantization"), OTHERS)
def test_everything_together_is_alone(family, quantization):
    check_together(random_runner(family, quantization=quantization))


@pytest.mark.parametrize("family", JOINT)
def test_everything_together_in_joint_steps(family):
    two = random_runner(family)
    check_together(joint_runner(two), two)
    assert any(getattr(key, "decodes", 0) for key in two.programs.seconds)


def check_together(runner, other=None):
    """Check that requests get the tokens that each gets alone, from the same runner or another one."""
    first, chunk = requests(), CHUNK - 5
    longest = max(len(request.prompt) + request.params.max_tokens for request in first)
    # Enough blocks for the longest request alone, and few more.
    pool = kv_groups.blocks_needed(runner.program.layout.kinds, longest, BLOCK, chunk) + 4
    expected = alone(other or runner, first)
    engine = make_engine(runner, pool_blocks=pool, budget=chunk)
    poison(runner)
    assert run(engine, first) == expected
    assert run(engine, requests()) == expected
    assert engine.scheduler.preempted > 0
    assert sum(r.cached_tokens > 0 for r in first) > 3
