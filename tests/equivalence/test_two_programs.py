"""A step in two programs, as on a GPU, gives what one program gives, as on a CPU."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from support.tiny import ROWS, divided_runner, joint_runner, make_engine, make_request, prompt, random_runner, run

from jaxinfer.engine.runner.buckets import Needs, decode_bucket
from jaxinfer.engine.runner.logits import programs as programs_of
from jaxinfer.engine.runner.programs import Programs
from jaxinfer.engine.sampling.sampling_rows import Level
from jaxinfer.sampling_params import SamplingParams

pytestmark = pytest.mark.xdist_group("llama")

KINDS = (
    dict(temperature=0, logprobs=3),
    dict(temperature=0.9, top_k=5, seed=3),
    dict(temperature=0, repetition_penalty=1.3, prompt_logprobs=2),
    dict(temperature=0.7, min_p=0.1, seed=5, logprobs=0),
)
"""Sampling parameters of every level."""


def results(runner, *, together: bool):
    """Return the tokens, and the log-probabilities, of a request of each kind: in one batch or one after another."""
    engine = make_engine(runner)
    made = [make_request(str(i), prompt(5 + 7 * i, i), SamplingParams(max_tokens=6, **k)) for i, k in enumerate(KINDS)]
    tokens = [run(engine, batch) for batch in ([made] if together else [[one] for one in made])]
    beside = [[*map(list, s.logprobs)] for request in made for s in request.sequences]
    prompts = [[list(part) for part in request.prompt_logprobs] for request in made]
    return tokens, (beside, prompts)


def check_nearly_equal(found, expected) -> None:
    """Compare two values or lists of the most likely tokens, of which one may have more."""
    common = ... if np.ndim(found) == 0 else (..., slice(min(np.shape(found)[-1], np.shape(expected)[-1])))
    np.testing.assert_allclose(np.asarray(found)[common], np.asarray(expected)[common], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("together", [True, False])
def test_tokens_and_log_probabilities_are_those_of_one_program(together: bool):
    one, expected = results(random_runner(), together=together)
    two, found = results(divided_runner(), together=together)
    assert two == one
    assert len(jax.tree.leaves(expected)) > 50
    jax.tree.map(check_nearly_equal, found, expected)


@pytest.mark.parametrize("divided", [False, True])
def test_joint_steps_give_the_tokens_and_log_probabilities_of_two_steps(divided: bool):
    two = divided_runner() if divided else random_runner()
    one, expected = results(two, together=True)
    joint, found = results(joint_runner(two), together=True)
    assert joint == one
    jax.tree.map(check_nearly_equal, found, expected)
    assert any(getattr(key, "decodes", 0) and key.pending == divided for key in two.programs.seconds)


def test_programs_of_more_stand_in_for_missing_ones():
    """A decode step is covered if both of its programs are there, each perhaps for more than is needed."""
    runner = divided_runner()
    programs = Programs(runner.program, runner.shapes, [])
    small, large = (decode_bucket(runner.program, runner.shapes, rows, ROWS, Needs()) for rows in (2, ROWS))
    truncated = replace(large, level=Level.TRUNCATED)
    assert programs_of(runner.shapes, small)[1] == programs_of(runner.shapes, large)[1], "one sampler for both sizes"
    forward, sampler = programs_of(runner.shapes, truncated)
    programs._ready = {forward: None}
    assert programs.covering(small) is None
    programs._ready = {forward: None, sampler: None, replace(sampler, masked=True): None}
    assert programs.covering(small) == programs.covering(large) == truncated
    assert programs.covering(replace(large, level=Level.EDITED)) is None
    assert programs.covering(small, lambda key: key != sampler) is None
    programs._ready |= dict.fromkeys(programs_of(runner.shapes, small))
    assert programs.covering(small) == small and programs.covering(large) == large
