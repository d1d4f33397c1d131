"""Scores of continuations, and parameters of generations, without lm_eval."""

import math

import numpy as np
import pytest

from jaxinfer import SamplingParams
from jaxinfer.integrations.scoring import check, sampling_params, score
from jaxinfer.outputs import CompletionOutput, RequestOutput

pytestmark = pytest.mark.xdist_group("demo")


@pytest.fixture(scope="module")
def llm():
    from jaxinfer import LLM, demo

    with LLM(demo.path(), max_model_len=64, max_num_seqs=4, use_tqdm=False) as made:
        yield made


def test_a_greedy_answer_scores_as_it_was_generated(llm):
    prompt = llm.get_tokenizer().encode("What is 17 plus 25?")
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=1, ignore_eos=True)
    [output] = llm.generate([{"prompt_token_ids": prompt}], params)
    answer = list(output.outputs[0].token_ids)
    other = [*answer[:-1], (answer[-1] + 1) % 300]
    right, wrong = score(llm, [(prompt, answer), (prompt, other)], 60)
    assert right.greedy and right.logprob == pytest.approx(output.outputs[0].cumulative_logprob, abs=1e-4)
    assert not wrong.greedy and wrong.logprob < right.logprob


def test_a_long_context_is_cut_off_at_the_left(llm):
    ids = np.random.default_rng(0).integers(3, 300, 90).tolist()
    cut, short = score(llm, [(ids[:80], ids[80:90]), (ids[69:80], ids[80:90])], 20)
    assert cut == short and math.isfinite(cut.logprob)
    assert score(llm, [], 20) == []
    [longest] = score(llm, [(ids[:60], ids[60:70])], 63)  # 64 tokens with the last, which is max_model_len
    assert math.isfinite(longest.logprob)
    with pytest.raises(ValueError, match="21 tokens, and max_length is 20"):
        score(llm, [(ids[:5], ids[5:26])], 20)
    for pair in (([], [1]), ([1], [])):
        with pytest.raises(ValueError, match="at least one token each"):
            score(llm, [pair], 20)


def test_parameters_of_a_task():
    greedy = sampling_params({"do_sample": False, "temperature": 0.7}, ["\n"], 5)
    assert (greedy.temperature, greedy.stop, greedy.max_tokens) == (0.0, ("\n",), 5)
    assert sampling_params({}, [], 5).temperature == 0.0
    assert sampling_params({"do_sample": True, "top_p": 0.5}, [], 5).top_p == 0.5
    assert sampling_params({"do_sample": True}, [], 5).temperature == 1.0
    with pytest.raises(ValueError, match="'num_beams', which jaxinfer does not know; it takes until"):
        sampling_params({"num_beams": 2}, [], 5)
    with pytest.raises(ValueError, match="'n'"):
        sampling_params({"n": 2}, [], 5)


def test_a_failed_request_is_an_error():
    sample = CompletionOutput(0, "", [], finish_reason="error", stop_reason="out of blocks")
    with pytest.raises(RuntimeError, match="out of blocks"):
        check(RequestOutput("7", None, [], [sample], True))
