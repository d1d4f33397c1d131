"""Beam searches through `LLM`: texts and scores, and what cannot be served is refused before anything is queued."""

import numpy as np
import pytest
from faults.conftest import settle

from jaxinfer import SamplingParams
from jaxinfer.engine.metrics import PREFIX
from jaxinfer.errors import CapacityError

pytestmark = [pytest.mark.xdist_group("faults"), pytest.mark.slow]

IDS = [10, 11, 12, 13, 14]


def test_results_are_texts_best_first(llm):
    outputs = llm.beam_search(["hello world", {"prompt_token_ids": IDS}], 3, 8, use_tqdm=False)
    assert [len(output.outputs) for output in outputs] == [3, 3]
    assert outputs[0].prompt == "hello world" and outputs[1].prompt_token_ids == IDS
    for output in outputs:
        assert output.finished and [one.index for one in output.outputs] == [0, 1, 2]
        scores = [one.score for one in output.outputs]
        assert scores == sorted(scores, reverse=True) and len({tuple(one.token_ids) for one in output.outputs}) == 3
        for one in output.outputs:
            assert (
                one.finish_reason == ("stop" if one.token_ids[-1] in (1, 2) else "length") and one.stop_reason is None
            )
            assert one.cumulative_logprob / len(one.token_ids) == pytest.approx(one.score, rel=1e-6)
            shown = [token for token in one.token_ids if token not in (0, 1, 2)]
            assert one.text == llm.get_tokenizer().decode(shown)


def test_one_beam_is_greedy(llm):
    [greedy] = llm.generate([IDS], SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, logprobs=0))
    ignoring = SamplingParams(ignore_eos=True)
    [beam] = llm.beam_search([IDS], 1, 10, sampling_params=ignoring)
    assert beam.outputs[0].token_ids == greedy.outputs[0].token_ids
    assert beam.outputs[0].cumulative_logprob == pytest.approx(greedy.outputs[0].cumulative_logprob, rel=1e-5)


def test_some_of_the_beams(llm):
    [every], [few] = llm.beam_search([IDS], 4, 6), llm.beam_search([IDS], 4, 6, num_return_sequences=2)
    assert [one.token_ids for one in few.outputs] == [one.token_ids for one in every.outputs[:2]]


def test_a_stop_token_is_told_and_left_out_of_the_text(llm):
    [plain] = llm.beam_search([IDS], 1, 4, sampling_params=SamplingParams(ignore_eos=True))
    last = plain.outputs[0].token_ids[1]
    stop = dict(stop_token_ids=[last], ignore_eos=True)
    hidden, shown = (
        llm.beam_search([IDS], 1, 4, sampling_params=SamplingParams(**stop, include_stop_str_in_output=include))[
            0
        ].outputs[0]
        for include in (False, True)
    )
    assert hidden.token_ids == shown.token_ids and hidden.token_ids[-1] == last == hidden.stop_reason
    assert hidden.finish_reason == "stop" and shown.text.startswith(hidden.text) and shown.text != hidden.text


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([IDS], 0), ValueError, "width must be between 1 and 256, got 0"),
        (([IDS], 9), CapacityError, "width 9 runs 9 sequences at a time, more than max_num_seqs = 8"),
        (([IDS], 4, 0), ValueError, "max_tokens must be at least 1, got 0"),
        (([IDS, [10**6]], 4), ValueError, "prompt 1: .*1000000"),
        (([IDS, []], 4), ValueError, "prompt 1"),
        (
            ([IDS], 200),
            ValueError,
            "prompt 0: width must be at most 93 with 2 tokens that end a beam, got 200: a step looks at 600",
        ),
    ],
)
def test_refused_before_anything_is_queued(llm, arguments, error, message):
    with pytest.raises(error, match=message):
        llm.beam_search(*arguments)
    assert not llm._engine.requests and not llm._engine.has_work


def test_a_search_that_never_fits_the_pool(llm, host):
    """What fits one sequence may not fit four beams; the error says what would."""
    with host(pool_blocks=20) as engine:
        assert engine.capacity.longest == 80
        with pytest.raises(
            CapacityError, match="prompt 0: .* 9 tokens and 40 more takes up to 46 blocks of 4, and the cache has 20"
        ):
            llm.beam_search([[9] * 9], 4, 40)
        assert not engine.requests
        [output] = llm.beam_search([[9] * 9], 4, 6)
        assert len(output.outputs) == 4


def test_a_search_in_parts_of_the_pool_is_the_same(llm, host):
    expected = llm.beam_search([IDS, IDS[::-1]], 3, 12)
    with host(pool_blocks=14, prefix_caching=False) as engine:
        found = llm.beam_search([IDS, IDS[::-1]], 3, 12)
        assert engine.scheduler.preempted > 0
    assert [[o.token_ids for o in r.outputs] for r in found] == [[o.token_ids for o in r.outputs] for r in expected]


def test_other_settings_apply(llm):
    """Masks hold for every beam; a tokens' minimum holds back the ends."""
    allowed = list(range(20, 60))
    [output] = llm.beam_search([IDS], 4, 8, sampling_params=SamplingParams(allowed_token_ids=allowed))
    assert {token for one in output.outputs for token in one.token_ids} <= set(allowed)
    ends = SamplingParams(logit_bias={1: 100.0}, min_tokens=3)
    [output] = llm.beam_search([IDS], 2, 8, sampling_params=ends, length_penalty=0.0)
    assert min(len(one.token_ids) for one in output.outputs) == 4


def test_every_token_masked_on_the_way(llm):
    """Nothing may come a second time, of two tokens that may come at all."""
    few = SamplingParams(allowed_token_ids=[20, 21], no_repeat_ngram_size=1, ignore_eos=True)
    [output] = llm.beam_search([IDS], 2, 8, sampling_params=few)
    assert output.outputs[0].finish_reason == "error" and "masked" in output.outputs[0].stop_reason


def test_an_interrupt_leaves_nothing_behind(llm, monkeypatch):
    calls = iter(range(100))
    real = llm._engine.step

    def step():
        if next(calls) == 4:
            raise KeyboardInterrupt
        real()

    monkeypatch.setattr(llm._engine, "step", step)
    with pytest.raises(KeyboardInterrupt):
        llm.beam_search([IDS], 4, 12)
    monkeypatch.undo()
    settle(llm)
    assert not llm._engine.requests
    assert len(llm.beam_search([IDS], 4, 3)[0].outputs) == 4


def test_counted(llm):
    def read() -> dict[str, float]:
        return {metric.name.removeprefix(PREFIX): metric.value for metric in llm.get_metrics()}

    before = read()
    llm.beam_search([IDS], 4, 6, sampling_params=SamplingParams(ignore_eos=True))
    assert read()["generation_tokens"] - before["generation_tokens"] == 1 + 4 * 5
    assert np.isfinite(read()["compile_seconds"])
