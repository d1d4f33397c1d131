"""Decisions of a beam search, and that faults inside the engine change none of its results."""

import subprocess
import sys

import numpy as np
import pytest
from support.beams import beam_request, found, search
from support.cases import GREEDY, alone
from support.tiny import CHUNK, make_engine, make_request, prompt, run

from jaxinfer.beam_params import BeamParams, beam_sampling
from jaxinfer.engine.beam_search import branching
from jaxinfer.engine.beam_search.beams import Beams
from jaxinfer.engine.request import Sequence
from jaxinfer.engine.sampling.sampler import Candidates
from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.sampling_params import SamplingParams

pytestmark = pytest.mark.xdist_group("llama")

NEW, WIDTH, EOS = 12, 4, (7, 30, 61)


def offer(**scores: float) -> Candidates:
    """Candidates from keyword arguments: `t5=-1.0` offers token 5; most likely first."""
    pairs = sorted(((int(name[1:]), score) for name, score in scores.items()), key=lambda pair: -pair[1])
    return Candidates(np.array([p[0] for p in pairs], np.int32), np.array([p[1] for p in pairs], np.float32))


def beams(limit: int = 5, stop: tuple[int, ...] = (9,), **how: object) -> Beams:
    return Beams(BeamParams(**dict(width=2) | how), limit, frozenset(stop))


def test_the_most_likely_candidates_of_all_beams_continue():
    made = beams()
    assert made.advance([offer(t1=-1, t2=-2, t3=-3, t4=-4)]) == [(0, 1), (0, 2)]
    assert made.advance([offer(t1=-5, t2=-6, t3=-7, t4=-8), offer(t5=-1, t6=-2, t7=-9, t8=-9)]) == [(1, 5), (1, 6)]
    assert [tokens.tolist() for tokens in made.state.running] == [[2, 5], [2, 6]]
    np.testing.assert_allclose(made.state.scores, [-3, -4])


def test_ties_go_to_the_first_beam_then_the_smaller_token():
    made = beams()
    assert made.advance([offer(t8=-1, t1=-1, t3=-1, t2=-1)]) == [(0, 1), (0, 2)]
    assert made.advance([offer(t7=-1, t5=-1, t6=-4, t8=-4), offer(t4=-1, t3=-1, t6=-4, t8=-4)]) == [(0, 5), (0, 7)]


def test_only_the_first_candidates_can_finish():
    """Only the first W candidates can finish; the remaining ones are there to leave W beams running."""
    made = beams()
    assert made.advance([offer(t1=-1, t2=-2, t9=-3, t3=-4)]) == [(0, 1), (0, 2)]
    assert made.best == ()
    assert made.advance([offer(t9=-1, t2=-2, t3=-3, t4=-4), offer(t9=-1.5, t2=-9, t3=-9, t4=-9)]) == [(0, 2), (0, 3)]
    assert [(beam.tokens.tolist(), float(beam.score), beam.stopped) for beam in made.best] == [([1, 9], -1.0, True)]


@pytest.mark.parametrize(("penalty", "best"), [(0.0, [9]), (1.0, [1, 9]), (3.0, [1, 9])])
def test_the_length_penalty_orders_results(penalty, best):
    made = beams(length_penalty=penalty, limit=2)
    made.advance([offer(t9=-1, t1=-1.25, t2=-8, t3=-9)])
    assert made.advance([offer(t9=-0.5, t2=-5, t3=-6, t4=-7), offer(t2=-9, t3=-9, t4=-9, t5=-9)]) == []
    assert made.best[0].tokens.tolist() == best


@pytest.mark.parametrize(
    ("how", "over"),
    [
        (dict(early_stopping=True), True),
        (dict(), False),
        (dict(early_stopping="never"), False),
        (dict(length_penalty=-1.0), True),
        (dict(early_stopping="never", length_penalty=0.0), True),
    ],
)
def test_early_stopping_rules(how, over):
    """With two finished beams and a best running sum of -3.5, worse than the worst finished one before length
    normalisation.
    """
    made = beams(limit=50, **how)
    made.advance([offer(t9=-3, t1=-3.2, t2=-3.4, t3=-9)])
    going = made.advance([offer(t9=-0.1, t2=-0.3, t3=-6, t4=-7), offer(t2=-9, t3=-9, t4=-9, t5=-9)])
    assert len(made.best) == 2 and (going == []) == over


def test_forbidden_tokens_make_no_beams():
    """Fewer than W beams continue; if none can, the search is over."""
    made, never = beams(), -np.inf
    assert made.advance([offer(t1=-1, t2=never, t3=never, t4=never)]) == [(0, 1)]
    assert made.advance([offer(t1=-1, t2=-1, t3=never, t4=never)]) == [(0, 1), (0, 2)]
    assert made.advance([offer(t1=never, t2=never)] * 2) == [] and made.best == ()


WRONG = [
    ("width=0", "width must be between 1 and 256, got 0"),
    ("width=257", "width must be between 1 and 256, got 257"),
    ("width=True", "width must be an integer, got bool True"),
    ("width=2.0", "width must be an integer, got float 2.0"),
    ("width=4, num_return_sequences=5", "num_return_sequences must be between 1 and 4, the width, got 5"),
    ("width=4, num_return_sequences=0", "num_return_sequences must be between 1 and 4, the width, got 0"),
    ("width=4, length_penalty=float('nan')", "length_penalty must be a finite number, got nan"),
    ("width=4, length_penalty='1'", "length_penalty must be a number, got str '1'"),
    ("width=4, length_penalty=-6", "length_penalty must be in [-5, 5], got -6.0"),
    ("width=4, early_stopping='always'", "early_stopping must be True, False or 'never', got str 'always'"),
    ("width=4, early_stopping=1", "early_stopping must be True, False or 'never', got int 1"),
    ("width=4, early_stopping=None", "early_stopping must be True, False or 'never', got None"),
]
SCRIPT = """
import sys
from jaxinfer.beam_params import BeamParams
for wrong in sys.argv[1:]:
    try:
        eval(f"BeamParams({wrong})")
    except (TypeError, ValueError) as error:
        print(error)
"""


def test_invalid_beam_parameters_are_named():
    """Runs in a subprocess, as annotations are checked before values in this one."""
    command = [sys.executable, "-c", SCRIPT, *(wrong for wrong, _ in WRONG)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == [f"{message}." for _, message in WRONG]


@pytest.mark.parametrize(
    "asked",
    [
        dict(n=2),
        dict(temperature=0.7),
        dict(top_k=5),
        dict(top_p=0.5),
        dict(min_p=0.1),
        dict(stop=["x"]),
        dict(logprobs=2),
        dict(prompt_logprobs=0),
    ],
)
def test_parameters_that_do_not_apply_to_beams_are_refused(asked):
    with pytest.raises(ValueError, match=f"{next(iter(asked))} does not apply to beam search"):
        beam_sampling(SamplingParams(**asked), SamplingParams(), 5)


def test_sampling_defaults_of_the_model_do_not_apply_to_beams():
    default = SamplingParams(temperature=0.7, top_p=0.9, top_k=5, repetition_penalty=1.2, min_tokens=9, max_tokens=20)
    own = beam_sampling(None, default, 4)
    assert (own.temperature, own.top_p, own.top_k, own.repetition_penalty) == (0, 1, 0, 1.2)
    assert (own.max_tokens, own.min_tokens) == (4, 4)
    with pytest.raises(TypeError, match="must be a SamplingParams, got dict"):
        beam_sampling({}, default, 4)


def searches():
    return [beam_request(str(i), prompt(length, i), NEW, EOS, width=WIDTH) for i, length in enumerate((3, CHUNK + 1))]


@pytest.mark.parametrize("error", [RuntimeError("device lost"), KeyboardInterrupt()], ids=["failure", "interrupt"])
@pytest.mark.parametrize("where", ["run", "regroup", "branch", "adopt"])
def test_a_step_that_fails_changes_no_result(runner, monkeypatch, where, error):
    """Failures at any point, also when only some of the beams have their new tokens."""
    expected = search(make_engine(runner), searches())
    owner, name = {
        "run": (runner, "run"),
        "regroup": (branching, "_add"),
        "branch": (Scheduler, "branch"),
        "adopt": (Sequence, "adopt"),
    }[where]
    real, calls = getattr(owner, name), [0]

    def fails(*arguments, **keywords):
        calls[0] += 1
        if calls[0] in (2, 11):
            raise error
        return real(*arguments, **keywords)

    engine, wanted = make_engine(runner), searches()
    for request in wanted:
        engine.add(request)
    monkeypatch.setattr(owner, name, fails)
    while engine.has_work:
        try:
            engine.step()
        except KeyboardInterrupt:
            pass
    assert calls[0] > 11
    assert [found(request) for request in wanted] == expected
    assert int(engine.manager.pool.num_held) == 0 and not engine.requests


@pytest.mark.parametrize("least", [0, 6])
def test_a_search_whose_steps_always_fail_ends_alone(runner, monkeypatch, least):
    """Failing from the first step with beams on, or from a later one."""
    others = [make_request("other", prompt(9, 3), GREEDY)]
    expected = alone(runner, others)
    engine, [bad, _] = make_engine(runner), searches()
    real = runner.run

    def fails(plan, *rest):
        if any(s.request is bad and s.made > least for s in plan.sequences):
            raise RuntimeError("device lost")
        return real(plan, *rest)

    monkeypatch.setattr(runner, "run", fails)
    search(engine, [bad])
    assert {s.finish_reason for s in bad.sequences} == {"error"} and "device lost" in bad.error
    assert run(engine, others) == expected


def test_a_beam_with_nan_logits_fails_its_search_only(runner, nan_token):
    wanted = [make_request("other", prompt(9, 3), GREEDY)]
    expected = alone(runner, wanted)
    engine = make_engine(runner)
    ids = prompt(CHUNK, 2)
    ids[5] = nan_token
    bad = beam_request("bad", ids, NEW, EOS, width=WIDTH)
    later = beam_request("later", prompt(5, 2), NEW, EOS, width=WIDTH, params=dict(logit_bias={nan_token: 100.0}))
    engine.add(bad)
    engine.add(later)
    assert run(engine, wanted) == expected
    for request in (bad, later):
        assert {s.finish_reason for s in request.sequences} == {"error"} and "not finite" in request.error
    assert not engine.requests


@pytest.mark.parametrize("steps", [0, 1, 2, 4, 7])
def test_an_abort_releases_every_beam(runner, steps):
    others = [make_request("other", prompt(21, 2), GREEDY)]
    expected = alone(runner, others)
    engine, wanted = make_engine(runner, budget=10), searches()
    for request in [*wanted, *others]:
        engine.add(request)
    for _ in range(steps):
        engine.step()
    for request in wanted:
        engine.abort(request.id)
        engine.abort(request.id)
    while engine.has_work:
        engine.step()
    assert [[s.output_ids.tolist() for s in request.sequences] for request in others] == expected
    assert {s.finish_reason for request in wanted for s in request.sequences} == {"abort"}
    assert int(engine.manager.pool.num_held) == 0
