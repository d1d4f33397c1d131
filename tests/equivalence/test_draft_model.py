"""A draft model: the tokens are those of decoding one at a time, and its cache holds what the draft model computes."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
from support.cases import EDGES, alone, mixed, poison, requests
from support.tiny import BLOCK, config, make_engine, make_request, prompt, random_runner, run

from jaxinfer.engine.runner.draft_steps import DraftFill, DraftSteps
from jaxinfer.engine.runner.keys import Key
from jaxinfer.engine.runner.programs import Programs
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.engine.speculation.drafter import Payoff
from jaxinfer.functional import split
from jaxinfer.loading import weights
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.sharding import make_mesh
from jaxinfer.speculative_config import SpeculativeConfig

pytestmark = pytest.mark.xdist_group("llama")

CONFIG = SpeculativeConfig("draft_model", model="unused", num_speculative_tokens=4)
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
TOKENS = 16


class Sharing(Programs):
    """The draft model's programs, and those of a runner without one."""

    base: Programs

    def get(self, key: Key):
        return super().get(key) if isinstance(key, DraftFill | DraftSteps) else self.base.get(key)


@cache
def drafting(base: Runner) -> Runner:
    """Return a runner over the programs of another one, whose draft model is the model itself."""
    program = replace(base.program, draft=base.program)
    shapes = replace(base.shapes, verify_buckets=(TOKENS,), draft_tokens=CONFIG.num_speculative_tokens)
    programs = Sharing(program, shapes, base.params, draft_params=base.params)
    programs.base = Runner(base.program, base.params, shapes, programs=base.programs).programs
    return Runner(program, base.params, shapes, draft_params=base.params, programs=programs)


@cache
def strangers(base: Runner) -> list[jax.Array]:
    """Return other random parameters for the same model."""
    module = weights.random(config("llama"), base.program.mesh, seed=7)
    return split(module, base.program.mesh)[1]


@pytest.fixture(autouse=True)
def always(monkeypatch):
    monkeypatch.setattr(Payoff, "note_verify", lambda *_: None)


def make(base, *, stranger=False, **host):
    runner = drafting(base)
    runner.draft_params = list(strangers(base) if stranger else base.params)
    return make_engine(runner, speculative=CONFIG, **host)


def counts(engine):
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    return [engine.metrics.counters[f"spec_decode_{name}"] for name in names]


@pytest.mark.parametrize(
    "host",
    [{}, {"decode_steps": 4}, {"budget": 5}, {"pool_blocks": 14}, {"prefix_caching": False}],
    ids=["default", "several decode steps", "small budget", "preempting", "no prefix cache"],
)
def test_a_model_drafts_for_itself(host):
    base, wanted = random_runner(), mixed(EDGES)
    expected = alone(base, wanted)
    engine = make(base, **host)
    poison(engine.runner)
    assert run(engine, wanted) == expected
    drafts, drafted, accepted = counts(engine)
    assert drafts > 10 and accepted == drafted, "greedy and seeded, the draft is what the model samples"
    assert (engine.scheduler.preempted > 0) == ("pool_blocks" in host)


def test_a_model_that_knows_nothing():
    base, wanted = random_runner(), mixed(EDGES)
    expected = alone(base, wanted)
    engine = make(base, stranger=True)
    assert run(engine, wanted) == expected
    drafts, drafted, accepted = counts(engine)
    assert drafts > 10 and accepted < drafted / 4
