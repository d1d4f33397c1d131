"""The engine's interface: admission and refusal of requests, aborts in every state, metrics."""

import pytest
from support.cases import GREEDY, alone, mixed
from support.tiny import BLOCK, CHUNK, make_engine, make_request, prompt, run

from jaxinfer import LLM
from jaxinfer.config import EngineConfig
from jaxinfer.engine.sequence_state import Status
from jaxinfer.engine.sizing.settings import HostSettings
from jaxinfer.errors import CapacityError
from jaxinfer.sampling_params import SamplingParams

pytestmark = pytest.mark.xdist_group("llama")
N = SamplingParams(temperature=0.3, seed=2, n=3, max_tokens=10)


def finish(engine):
    while engine.has_work:
        engine.step()
    assert int(engine.manager.pool.num_held) == 0


def test_a_duplicate_id_is_refused_and_the_first_goes_on(runner):
    engine = make_engine(runner)
    first = make_request("same", prompt(5), GREEDY)
    engine.add(first)
    with pytest.raises(ValueError, match="request id 'same' is in use"):
        engine.add(make_request("same", prompt(6), GREEDY))
    finish(engine)
    assert [[s.output_ids.tolist() for s in first.sequences]] == alone(runner, [first])
    run(engine, [make_request("same", prompt(6), GREEDY)])


def test_a_prompt_that_never_fits_is_refused_and_the_queue_moves_on(runner):
    engine = make_engine(runner, pool_blocks=4)
    engine.add(make_request("a", prompt(BLOCK), GREEDY))
    with pytest.raises(CapacityError, match=r"16 tokens.*holds 16 tokens \(4 blocks of 4\)"):
        engine.add(make_request("b", prompt(4 * BLOCK), GREEDY))
    last = make_request("c", prompt(4 * BLOCK - 1), GREEDY)
    engine.add(last)
    finish(engine)
    assert last.sequences[0].made == 1 and last.sequences[0].finish_reason == "length"


@pytest.mark.parametrize("steps", range(8))
@pytest.mark.parametrize("params", [GREEDY, N])
@pytest.mark.parametrize("budget", [5, pytest.param(CHUNK, marks=pytest.mark.slow)])
def test_abort_in_every_state(runner, steps, params, budget):
    engine = make_engine(runner, budget=budget)
    others = mixed((6, 9))
    request = make_request("x", prompt(11), params)
    engine.add(others[0])
    engine.add(request)
    engine.add(others[1])
    for _ in range(steps):
        engine.step()
    held = int(engine.manager.pool.num_held)
    states = {s.status for s in request.sequences}
    engine.abort("x")
    engine.abort("x")
    assert request.finished and {s.finish_reason for s in request.sequences} == {"abort"}
    assert int(engine.manager.pool.num_held) < held or Status.RUNNING not in states
    engine.manager.check()
    finish(engine)
    assert [[s.output_ids.tolist() for s in r.sequences] for r in others] == alone(runner, others)
    assert all(
        s.output_ids.tolist() == whole[: s.made]
        for s, whole in zip(request.sequences, alone(runner, [make_request("x", prompt(11), params)])[0], strict=True)
    )


def test_abort_of_unknown_and_finished_ids(runner):
    engine = make_engine(runner)
    request = make_request("x", prompt(4), GREEDY)
    run(engine, [request])
    engine.abort("x")
    engine.abort("never there")
    assert request.sequences[0].finish_reason == "length"


def test_aborted_blocks_are_found_by_later_prompts(runner):
    engine = make_engine(runner)
    engine.add(make_request("x", prompt(3 * BLOCK), GREEDY))
    engine.step()
    engine.abort("x")
    again = make_request("y", prompt(3 * BLOCK), GREEDY)
    assert run(engine, [again]) == alone(runner, [again])
    assert again.cached_tokens == 2 * BLOCK


def test_nothing_is_published_before_its_step_was_dispatched(runner, monkeypatch):
    engine = make_engine(runner)
    seen = []
    dispatch = runner.run

    def watch(*arguments):
        seen.append(int(engine.manager.pool.published.sum()))
        return dispatch(*arguments)

    monkeypatch.setattr(runner, "run", watch)
    run(engine, [make_request("x", prompt(3 * BLOCK), GREEDY)])
    # The prompt's three blocks after the first step; output blocks one by one, once their tokens are known.
    assert seen[0] == 0 and seen[1] == 3
    assert sorted(seen) == seen and seen[-1] <= 5


def test_the_engine_reports_what_it_did(runner):
    engine = make_engine(runner)
    requests = mixed((6, 9, 17))
    run(engine, requests)
    run(engine, [make_request("again", prompt(17, 2), GREEDY)])
    read = {m.name.removeprefix("jaxinfer:"): m.value for m in engine.readings() if not m.labels}
    assert read["prompt_tokens"] == 6 + 9 + 17 + 17
    assert read["prefix_cache_hits"] == read["prompt_tokens_cached"] == 16
    assert read["generation_tokens"] == 40
    assert read["num_requests_running"] == read["num_requests_waiting"] == read["kv_cache_usage_perc"] == 0
    assert sum(read["e2e_request_latency_seconds"].counts) == 4
    assert sum(read["time_to_first_token_seconds"].counts) == 4
    reasons = {m.labels: m.value for m in engine.readings() if m.name.endswith("request_success")}
    assert reasons == {(("finished_reason", "length"),): 4}


def test_reset_prefix_cache_while_running(runner):
    engine = make_engine(runner)
    requests = mixed((9, 18))
    for request in requests:
        engine.add(request)
    for _ in range(3):
        engine.step()
    engine.reset_prefix_cache()
    assert len(engine.manager.index) == 0
    finish(engine)
    assert [[s.output_ids.tolist() for s in r.sequences] for r in requests] == alone(runner, requests)


def test_close_ends_everything(runner):
    engine = make_engine(runner)
    requests = mixed((9, 18, 30))
    for request in requests:
        engine.add(request)
    engine.step()
    engine.close()
    assert all(r.finished for r in requests) and not engine.has_work


def test_the_token_budget_setting_limits_a_step(runner):
    """The setting applies, not the room of the largest bucket, which only applies by default."""
    largest = runner.shapes.prefill_buckets[-1]
    for asked, budget in ((largest - 1, largest - 1), (largest, largest), (None, largest)):
        assert HostSettings.of(EngineConfig(max_num_batched_tokens=asked), runner).token_budget == budget


def test_default_parameters_cannot_be_set():
    with pytest.raises(AttributeError, match="default_params"):
        LLM.__new__(LLM).default_params = SamplingParams(max_tokens=3)


def test_the_log_is_told_when_work_begins_after_none(runner, monkeypatch):
    engine, told = make_engine(runner), []
    monkeypatch.setattr(engine.metrics, "wake", lambda: told.append(len(engine.requests)))
    for _ in range(2):
        engine.add(make_request("a", prompt(4), GREEDY))
        engine.add(make_request("b", prompt(5), GREEDY))
        finish(engine)
    assert told == [0, 0]
