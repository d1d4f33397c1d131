"""Several decode steps dispatched at once give the same tokens as single steps, however sequences end."""

import pytest
from support.cases import EDGES, GREEDY, SEEDED, alone, mixed
from support.tiny import BLOCK, CHUNK, ROWS, make_engine, make_request, prompt, random_runner, run

from jaxinfer.engine.sequence_state import Status
from jaxinfer.sampling_params import SamplingParams

pytestmark = pytest.mark.xdist_group("llama")

FEW = EDGES[:ROWS]
"""As many prompts as rows: once all are prefilled nothing waits."""


@pytest.fixture
def steps_taken(monkeypatch):
    """Number of decode steps of every plan that ran."""
    runner, taken = random_runner(), []
    dispatch = runner.run

    def watch(plan, *rest):
        taken.append(plan.steps if plan.decodes else 0)
        return dispatch(plan, *rest)

    monkeypatch.setattr(runner, "run", watch)
    return taken


@pytest.mark.parametrize("steps", [2, 3, 8])
def test_many_steps_equal_single_steps(steps, steps_taken):
    runner = random_runner()
    expected = alone(runner, mixed(FEW))
    steps_taken.clear()
    assert run(make_engine(runner, decode_steps=steps), mixed(FEW)) == expected
    assert min(steps, 5) <= max(steps_taken) <= steps
    made = {tuple(tokens) for (tokens,) in expected}
    assert len(made) == len(FEW)


def test_auto_takes_many_where_steps_are_short(steps_taken, monkeypatch):
    runner = random_runner()
    expected = alone(runner, mixed(FEW))
    steps_taken.clear()
    engine = make_engine(runner, decode_steps="auto")
    monkeypatch.setattr(type(engine.multi_step), "steps", property(lambda multi: 1 if multi._seconds is None else 4))
    assert run(engine, mixed(FEW)) == expected
    assert max(steps_taken) > 1, "the time of a step was measured"


def test_requests_wait_for_no_more_than_a_plan(steps_taken):
    """If a request waits, or a prompt is partly prefilled, the next plan has one step."""
    runner = random_runner()
    wanted = mixed(FEW)
    expected = alone(runner, wanted)
    steps_taken.clear()
    engine = make_engine(runner, decode_steps=4, budget=5)
    for request in wanted:
        engine.add(request)
        before = len(steps_taken)
        engine.step()
        assert steps_taken[before:] == [] or steps_taken[before] <= 1
        engine.step()
    while engine.has_work:
        engine.step()
    assert [[s.output_ids.tolist() for s in r.sequences] for r in wanted] == expected


@pytest.mark.parametrize("n", [3, ROWS])
def test_samples_of_one_prompt(n, steps_taken):
    params = SamplingParams(temperature=0.3, seed=11, max_tokens=10, n=n)
    runner = random_runner()
    for length in (BLOCK, BLOCK + 2, CHUNK + 1):
        wanted = make_request("all", prompt(length, length), params)
        assert run(make_engine(runner, decode_steps=8), [wanted]) == alone(runner, [wanted])
    assert max(steps_taken) == 8


def stopped(made: list[list[list[int]]], at: int) -> list[SamplingParams]:
    """Greedy parameters, each with the token sampled at this index as stop token."""
    return [SamplingParams(temperature=0, max_tokens=10, stop_token_ids=[tokens[at]]) for [tokens] in made]


@pytest.mark.parametrize("at", range(8))
def test_tokens_after_a_stop_token_are_dropped(at, steps_taken):
    runner = random_runner()
    plain = [make_request(str(i), prompt(length, i), GREEDY) for i, length in enumerate(FEW)]
    made = alone(runner, plain)
    wanted = [
        make_request(str(i), prompt(length, i), params)
        for i, (length, params) in enumerate(zip(FEW, stopped(made, at), strict=True))
    ]
    steps_taken.clear()
    engine = make_engine(runner, decode_steps=8)
    results = run(engine, wanted)
    assert results == [[tokens[: tokens.index(tokens[at]) + 1]] for [tokens] in made]
    assert {s.finish_reason for r in wanted for s in r.sequences} == {"stop"}
    assert engine.metrics.counters["generation_tokens"] == sum(len(tokens) for [tokens] in results)


class Stops:
    """A listener that ends its sequence at a number of tokens, as a stop string does."""

    def __init__(self, at: int):
        self.at, self.seen = at, []

    def on_token(self, sequence, reason):
        self.seen.append(sequence.made)
        return "END" if sequence.made == self.at else None


@pytest.mark.parametrize("at", [1, 2, 5, 9])
def test_a_stop_string_in_the_middle(at):
    runner = random_runner()
    listener = Stops(at)
    wanted = [*mixed(FEW[:3]), make_request("x", prompt(9, 40), SEEDED, listener=listener)]
    results = run(make_engine(runner, decode_steps=8), wanted)
    expected = alone(runner, wanted)
    assert results[:3] == expected[:3]
    assert results[3] == [expected[3][0][:at]]
    [stopped] = wanted[3].sequences
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", "END")
    assert listener.seen == list(range(1, at + 1)), "the listener gets each token once, and none after the end"


@pytest.mark.parametrize("steps", range(1, 6))
def test_an_abort_between(steps):
    runner = random_runner()
    others = mixed(FEW[:4])
    expected = alone(runner, others)
    engine = make_engine(runner, decode_steps=4)
    gone = make_request("gone", prompt(11), GREEDY)
    for request in (*others, gone):
        engine.add(request)
    for _ in range(steps):
        engine.step()
    engine.abort("gone")
    newcomer = make_request("new", prompt(CHUNK, 41), SEEDED)
    assert run(engine, [newcomer]) == alone(runner, [newcomer])
    assert [[s.output_ids.tolist() for s in r.sequences] for r in others] == expected
    assert gone.sequences[0].status is Status.FINISHED


@pytest.mark.parametrize("spare", [0, 2, 7])
def test_several_steps_in_a_small_pool(spare, steps_taken):
    runner = random_runner()
    needed = -(-(max(FEW) + GREEDY.max_tokens) // BLOCK)
    expected = alone(runner, mixed(FEW))
    steps_taken.clear()
    one = make_engine(runner, pool_blocks=needed + spare)
    assert run(one, mixed(FEW)) == expected
    many = make_engine(runner, pool_blocks=needed + spare, decode_steps=8)
    assert run(many, mixed(FEW)) == expected
    assert 0 < many.scheduler.preempted <= one.scheduler.preempted, "several steps cause no preemption"


def test_several_steps_with_prefix_hits_on_generated_tokens(steps_taken):
    runner = random_runner()
    engine = make_engine(runner, decode_steps=8)
    ids, made = prompt(CHUNK + 3, 90), []
    for turn in range(3):
        ids = ids + made
        request = make_request(str(turn), ids, GREEDY)
        [[made]] = run(engine, [request])
        assert [[made]] == alone(runner, [request])[0:1]
        # All but the last sampled token were written.
        assert not turn or request.cached_tokens == (len(ids) - 1) // BLOCK * BLOCK
    assert max(steps_taken) == 8


def test_changing_biases_and_multi_token_bad_words(steps_taken):
    runner = random_runner()
    plain = SamplingParams(
        temperature=0,
        max_tokens=12,
        repetition_penalty=1.3,
        frequency_penalty=0.5,
        min_tokens=5,
        logit_bias={7: 1.0},
        stop_token_ids=[5, 6],
    )
    words = SamplingParams(temperature=0, max_tokens=8, _bad_words_token_ids=((8, 9), (10,)))
    wanted = [make_request(str(i), prompt(6 + i, 500 + i), plain) for i in range(2)]
    results = run(make_engine(runner, decode_steps=8), wanted)
    assert steps_taken == [0, 4, 7], "up to where min_tokens is reached, and from there to the end"
    assert results == alone(runner, wanted)
    wanted = [make_request(r.id, r.prompt.tolist(), plain) for r in wanted]
    wanted.append(make_request("words", prompt(6, 600), words))
    steps_taken.clear()
    results = run(make_engine(runner, decode_steps=8), wanted)
    assert set(steps_taken[:8]) <= {0, 1}, "the host sees each token before the next is chosen"
    assert results == alone(runner, wanted)


def test_every_iteration_is_counted(steps_taken):
    runner = random_runner()
    wanted = mixed(FEW[:4])
    counts = []
    for steps in (1, 8):
        engine = make_engine(runner, decode_steps=steps)
        results = run(engine, mixed(FEW[:4]))
        tokens = engine.metrics.histograms["iteration_tokens_total"]
        counts.append((sum(tokens.counts), tokens.total, engine.metrics.counters["generation_tokens"]))
    assert counts[0] == counts[1]
    assert counts[0][1] == sum(len(r.prompt) for r in wanted) + sum(len(tokens) - 1 for [tokens] in results)


def test_a_step_that_fails_in_the_middle_is_computed_again(monkeypatch, caplog):
    runner = random_runner()
    expected = alone(runner, mixed(FEW))
    engine = make_engine(runner, decode_steps=8)
    run_plan, launch, middle = runner.dispatch, runner._run_launch, []

    def watch(flight):
        if flight.plan.steps > 3 and not middle:
            middle.append(flight.launches[-2])
        run_plan(flight)

    def fails(one):
        if middle and one is middle[0]:
            raise RuntimeError("device lost")
        return launch(one)

    monkeypatch.setattr(runner, "dispatch", watch)
    monkeypatch.setattr(runner, "_run_launch", fails)
    assert run(engine, mixed(FEW)) == expected
    assert middle and "device lost" in caplog.text
    caplog.clear()
