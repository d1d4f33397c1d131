"""A draft model: the tokens are those of decoding one at a time, and its cache holds what the draft model computes."""

from concurrent.futures import Future
from dataclasses import replace
from functools import cache, partial

import jax
import numpy as np
import pytest
from support.cases import EDGES, GREEDY, alone, mixed, poison, requests
from support.families import FULL, SLIDING
from support.tiny import (
    BLOCK,
    LENGTH,
    config,
    divided_runner,
    layers,
    make_engine,
    make_request,
    prompt,
    random_runner,
    run,
    shapes_of,
)
from support.tiny import CONFIG as CONFIG_OF_MODEL

from jaxinfer.engine.runner.draft_steps import DraftFill, DraftSteps, largest_keys
from jaxinfer.engine.runner.keys import Key
from jaxinfer.engine.runner.programs import Programs
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.engine.speculation.drafter import Payoff
from jaxinfer.errors import DraftError
from jaxinfer.functional import split
from jaxinfer.loading import weights
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.sharding import make_mesh
from jaxinfer.speculative_config import SpeculativeConfig

pytestmark = pytest.mark.xdist_group("llama")

CONFIG = SpeculativeConfig("draft_model", model="unused", num_speculative_tokens=4)
LONG = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
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
    """Make an engine whose caches hold NaN where nothing was written."""
    runner = drafting(base)
    runner.draft_params = list(strangers(base) if stranger else base.params)
    engine = make_engine(runner, speculative=CONFIG, **host)
    poison_both(runner)
    return engine


def poison_both(runner):
    poison(runner)
    runner.draft_cache = jax.tree.map(lambda a: a * np.nan, runner.draft_cache)


def filled(monkeypatch, runner):
    """Return a list to which the numbers of tokens are appended that the draft model's prefills compute."""
    found, draft = [], runner.draft

    def run_draft(key, parts):
        if isinstance(key, DraftFill):
            found.append(int((parts["positions"] >= 0).sum()))
        return draft(key, parts)

    monkeypatch.setattr(runner, "draft", run_draft)
    return found


def counts(engine):
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    return [engine.metrics.counters[f"spec_decode_{name}"] for name in names]


@pytest.mark.parametrize(
    "host",
    [{}, {"decode_steps": 4}, {"budget": 5}, {"pool_blocks": 14}, {"prefix_caching": False}],
    ids=["default", "several decode steps", "small budget", "preempting", "no prefix cache"],
)
def test_a_model_drafts_for_itself(host):
    """All drafts are right, greedy and seeded, whatever the draft model's cache has to catch up with."""
    base, wanted = random_runner(), mixed(EDGES)
    expected = alone(base, wanted)
    engine = make(base, **host)
    assert run(engine, wanted) == expected
    drafts, drafted, accepted = counts(engine)
    assert drafts > 10 and accepted == drafted
    assert (engine.scheduler.preempted > 0) == ("pool_blocks" in host)


def test_a_model_that_knows_nothing():
    base, wanted = random_runner(), mixed(EDGES)
    expected = alone(base, wanted)
    engine = make(base, stranger=True)
    assert run(engine, wanted) == expected
    drafts, drafted, accepted = counts(engine)
    assert drafts > 10 and accepted < drafted / 4


def test_requests_continue_without_drafts_after_the_draft_model_failed(monkeypatch, caplog):
    base, wanted = random_runner(), mixed(EDGES)
    expected = alone(base, wanted)
    engine = make(base)

    def fail(key, parts):
        raise DraftError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(engine.runner, "draft", fail)
    assert run(engine, wanted) == expected
    assert counts(engine) == [0, 0, 0] and "drafts no more" in caplog.text
    caplog.clear()  # no error may remain (`conftest`)


def test_fewer_steps_are_taken_and_each_position_is_computed_once(monkeypatch):
    base, [wanted] = random_runner(), requests([9], LONG)
    expected = alone(base, [wanted])
    engine, steps = make(base), 0
    found = filled(monkeypatch, engine.runner)
    engine.add(wanted)
    while engine.has_work:
        engine.step()
        steps += 1
    assert [[wanted.sequences[0].output_ids.tolist()]] == expected
    assert steps <= 8, "20 tokens: a prefill, and steps of up to 5"
    assert found[0] == 9 and all(count == 1 for count in found[1:]), "the prompt, then the last token of a draft"


def test_forks_and_cached_prefixes(monkeypatch):
    base = random_runner()
    params = SamplingParams(temperature=0.3, seed=11, max_tokens=10, n=3)
    wanted = [make_request(str(i), prompt(length, 7), params) for i, length in enumerate((BLOCK, 2 * BLOCK + 2, 11))]
    wanted.append(make_request("again", prompt(2 * BLOCK + 2, 7), params))
    expected = alone(base, wanted)
    engine = make(base)
    made = run(engine, wanted[:3])
    found = filled(monkeypatch, engine.runner)
    assert made + run(engine, wanted[3:]) == expected
    _, drafted, accepted = counts(engine)
    assert accepted == drafted > 0
    assert wanted[3].cached_tokens == 2 * BLOCK and found[0] == 3 * 2, "what was filled in before is not again"


def test_blocks_that_the_draft_model_has_not_seen():
    """A cached prefix of a request without drafts, and of one whose blocks others have overwritten since."""
    base, greedy = random_runner(), GREEDY
    first = make_request("penalty", prompt(19, 3), replace(greedy, repetition_penalty=1.2))
    others = [make_request(f"other {i}", prompt(30, 50 + i), greedy) for i in range(6)]
    again = [make_request(f"again {i}", prompt(19, 3), greedy) for i in range(2)]
    expected = alone(base, [first, *others, *again])
    engine = make(base, pool_blocks=34)
    made = run(engine, [first])
    assert counts(engine)[0] == 0
    made += run(engine, others[:1]) + run(engine, again[:1])
    assert again[0].cached_tokens > 0
    made[2:2] = run(engine, others[1:])
    assert made + run(engine, again[1:]) == expected
    _, drafted, accepted = counts(engine)
    assert accepted == drafted > 0


def test_decode_steps_between_drafts_are_caught_up_with():
    base, wanted = random_runner(), mixed(EDGES[:3])
    expected = alone(base, wanted)
    engine = make(base)
    for request in wanted:
        engine.add(request)
    while engine.has_work:
        engine.step()
        flight = engine.pipeline.flight
        if flight is not None and flight.plan.drafts is not None:
            engine.scheduler.drafter.payoff.pause = 2
    assert [[s.output_ids.tolist() for s in r.sequences] for r in wanted] == expected
    drafts, drafted, accepted = counts(engine)
    assert drafts > 2 and accepted == drafted


def test_a_cache_that_was_freed_and_a_draft_model_of_short_sequences():
    base, wanted = random_runner(), requests([17], LONG)
    expected = alone(base, wanted)
    engine = make(base)
    assert run(engine, wanted) == expected
    engine.control.sleep(1)
    assert not engine.runner.draft_cache
    engine.control.wake_up()
    poison_both(engine.runner)
    engine.scheduler.drafter._longest, before = 24, counts(engine)[1]
    assert run(engine, requests([17], LONG)) == expected
    _, drafted, accepted = counts(engine)
    assert accepted == drafted and before > 10 and 0 < drafted - before < 24 - 17


def test_each_row_is_written_up_to_the_end_of_its_draft(monkeypatch):
    """A row that drafts fewer tokens than others has no blocks for more."""
    engine, wanted, ends = make(random_runner()), requests([5, 9], LONG), []
    drafter, propose = engine.scheduler.drafter, engine.scheduler.drafter.propose

    def draft_both(sequences, rows, remaining):
        if len(sequences) < 2 or ends:
            return None
        ends.extend(s.length - 1 + count for s, count in zip(sequences, (1, 4), strict=True))
        return propose(sequences, rows, remaining)

    monkeypatch.setattr(drafter, "_counts", lambda *_: [1, 4])
    monkeypatch.setattr(drafter, "propose", draft_both)
    run(engine, wanted)
    written = ~np.isnan(np.asarray(engine.runner.draft_cache[0].keys)[:, 0, :, 0])
    assert written.sum() == sum(ends) > 14


def test_a_target_with_sliding_windows():
    """The draft model's layers have full attention; windows above all lengths make the models the same."""
    mesh, kinds = make_mesh(), [SLIDING, FULL]
    module = weights.random(CONFIG_OF_MODEL | layers(kinds, 4 * LENGTH), mesh)
    program, params = split(module, mesh)
    own, draft_params = split(weights.random(CONFIG_OF_MODEL | layers([FULL] * 2, 1), mesh), mesh)
    shapes = shapes_of(program, verify_buckets=(TOKENS,), draft_tokens=CONFIG.num_speculative_tokens)
    runner = Runner(replace(program, draft=own), params, shapes, draft_params=draft_params)
    wanted = requests([3, 12, 17, 30], GREEDY)
    expected = alone(runner, wanted)
    engine = make_engine(runner, speculative=CONFIG)
    poison_both(runner)
    assert run(engine, wanted) == expected
    _, drafted, accepted = counts(engine)
    assert accepted == drafted > 0


@pytest.mark.parametrize("base", [divided_runner, partial(random_runner, tp=2)], ids=["two programs", "two devices"])
def test_steps_of_two_programs_and_two_devices(base):
    base, wanted = base(), mixed(EDGES[:4])
    expected = alone(base, wanted)
    engine = make(base)
    assert run(engine, wanted) == expected
    _, drafted, accepted = counts(engine)
    assert accepted == drafted > 0


def test_drafts_wait_for_their_programs(monkeypatch):
    base, wanted = random_runner(), requests([9], GREEDY)
    expected = alone(base, wanted)
    engine, asked = make(base), []
    programs = engine.runner.programs
    never: Future = Future()

    def compile_aside(key, done):
        if not isinstance(key, missing):
            return None if isinstance(key, DraftFill | DraftSteps) else programs.base.start(key, done)
        asked.append(key)
        return never

    monkeypatch.setattr(programs, "start", compile_aside)
    monkeypatch.setattr(engine.runner, "compiled_aside", lambda: None)
    for missing in (DraftFill, DraftSteps):
        assert run(engine, requests([9], GREEDY)) == expected
        assert {type(key) for key in asked} == {missing} and counts(engine)[0] == 0
        asked.clear()


def test_all_programs_of_a_draft_model_are_listed(monkeypatch):
    engine = make(random_runner())
    listed, used = set(engine.runner.programs.keys()), []
    monkeypatch.setattr(
        engine.runner, "draft", lambda key, parts, run=engine.runner.draft: used.append(key) or run(key, parts)
    )
    run(engine, mixed(EDGES))
    assert used and listed.issuperset(used)
    assert set(largest_keys(engine.runner.program, engine.runner.shapes)) <= listed
