"""Real checkpoints give transformers' tokens, log-probabilities and perplexity, and what the rest of the surface
promises."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import scripts

from jaxinfer import LLM, SamplingParams

WORKSHOP = Path(__file__).parent / "data" / "workshop.txt"

pytest.importorskip("torch", reason="the reference of the tests of real checkpoints; it comes with the extra `test`")
pytestmark = pytest.mark.slow

TEXTS = (
    "The lighthouse keeper wrote in his diary that",
    "Старый маяк стоял на берегу, и каждую ночь",
    "Ο παλιός φάρος στεκόταν στην ακτή και",
    "كان الفنار القديم يقف على الشاطئ وكل ليلة",
    "המגדלור הישן עמד על החוף ובכל לילה",
    "पुराना प्रकाशस्तंभ तट पर खड़ा था और हर रात",
    "ประภาคารเก่าตั้งอยู่ริมทะเลและทุกคืน",
    "古老的灯塔矗立在岸边，每天晚上",
    "古い灯台は海辺に立ち、毎晩",
    "오래된 등대는 해안에 서 있었고 매일 밤",
    "🗼🌊🌙✨ 👩\u200d🚀🇬🇷 👍🏽",
)
"""The beginning of one story in ten scripts, and emoji."""
LENGTHS = (1, 2, 15, 16, 17, 255, 1000, 3000)
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, logprobs=4)
SMOL = pytest.mark.only("SmolLM2-135M-Instruct")
QUESTION = [{"role": "user", "content": "Name three colours of the rainbow."}]


def generate(model, prompts, params=GREEDY, dtype="float32"):
    """The results for prompts of token ids."""
    return model.llm(dtype).generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


def ids_of(result, sample=0):
    return list(result.outputs[sample].token_ids)


def assert_greedy(model, prompt, made):
    """Each token is the likeliest by transformers' own log-probabilities, which are returned."""
    theirs = model.reference_logprobs([*prompt, *made], len(made))
    assert theirs.argmax(-1).tolist() == made
    return theirs


def test_tokens_and_log_probabilities_are_transformers(model):
    encoded = [model.tokenizer(text).input_ids for text in TEXTS]
    start = model.tokenizer("").input_ids[:1]  # BOS, if the tokenizer adds one
    prompts = encoded + [[*start, *model.workshop][:length] for length in LENGTHS] + [sum(encoded, [])]
    for prompt, result in zip(prompts, generate(model, prompts), strict=True):
        theirs = assert_greedy(model, prompt, ids_of(result))
        for row, ours in zip(theirs, result.outputs[0].logprobs, strict=True):
            likely = [[token, one.logprob] for token, one in ours.items()]
            np.testing.assert_allclose(
                [value for _, value in likely], row[[token for token, _ in likely]], rtol=0, atol=3e-4
            )
            assert [one.rank for one in ours.values()] == list(range(1, len(ours) + 1))


class Keeping:
    """An LLM that keeps what it generates: the log-probabilities that a perplexity is made of."""

    def __init__(self, llm):
        self.llm, self.results, self.get_tokenizer = llm, [], llm.get_tokenizer

    def generate(self, *args, **keywords):
        self.results = self.llm.generate(*args, **keywords)
        return self.results

    def logprobs(self):
        """`[T]` of all tokens that were scored."""
        return np.array(
            [
                row[token].logprob
                for one in self.results
                for token, row in zip(one.prompt_token_ids[1:], one.prompt_logprobs[1:], strict=True)
            ]
        )


def test_perplexity_is_transformers_and_bfloat16_errs_no_more(model):
    script, text = scripts.load("perplexity"), WORKSHOP.read_text(encoding="utf-8")[:9000]
    ours, measured = {}, {}
    for dtype in ("float32", "bfloat16"):
        keeping = Keeping(model.llm(dtype))
        measured[dtype] = script.measure(keeping, text).perplexity
        ours[dtype] = keeping.logprobs()
    windows = [list(one.prompt_token_ids) for one in keeping.results]
    exact = [model.reference_scores(ids) for ids in windows]
    rounded = model.reference_scores(windows[0], "bfloat16")
    model.forget("bfloat16")
    perplexity = math.exp(-np.concatenate(exact).mean(dtype=np.float64))
    print(f"perplexity of transformers in float32 {perplexity:.4f}, here", measured)
    assert measured["float32"] == pytest.approx(perplexity, rel=1e-4)
    assert measured["bfloat16"] == pytest.approx(perplexity, rel=3e-3)
    first = slice(len(rounded))
    assert error(ours["bfloat16"][first], exact[0]) <= 1.2 * error(rounded, exact[0])
    assert error(ours["float32"][first], exact[0]) < 1e-4


def test_int8_costs_at_most_one_percent_of_perplexity(model):
    script, text = scripts.load("perplexity"), WORKSHOP.read_text(encoding="utf-8")[:9000]
    exact = script.measure(model.llm(), text).perplexity
    rounded = script.measure(model.llm("int8"), text).perplexity
    model.forget("int8")
    print(f"perplexity in float32 {exact:.4f}, in int8 {rounded:.4f}")
    assert rounded <= 1.01 * exact


@pytest.mark.parametrize(("codes", "most"), [("int8", 1.003), ("fp8", 1.01)])
def test_perplexity_with_a_quantised_cache(model, codes: str, most: float):
    script, text = scripts.load("perplexity"), WORKSHOP.read_text(encoding="utf-8")
    exact = script.measure(model.llm(), text).perplexity
    rounded = script.measure(model.llm(f"float32/{codes}"), text).perplexity
    model.forget(f"float32/{codes}")
    print(f"perplexity in float32 {exact:.4f}, with a cache in {codes} {rounded:.4f}")
    assert 0.99 * exact < rounded <= most * exact


def error(found, exact):
    """Root of the mean square."""
    return np.sqrt(np.square(found - exact).mean())


def test_a_known_prefix_changes_nothing(model):
    llm, prompt = model.llm(), model.workshop[500:1300]
    llm.reset_prefix_cache()
    first, second = generate(model, [prompt])[0], generate(model, [prompt])[0]
    branched = generate(model, [prompt[:700] + model.workshop[:60]])[0]
    assert (first.num_cached_tokens, second.num_cached_tokens, branched.num_cached_tokens) == (0, 784, 688)
    assert ids_of(first) == ids_of(second)
    assert_greedy(model, list(branched.prompt_token_ids), ids_of(branched))


@SMOL
def test_samples_of_a_request_are_those_of_their_seed(model):
    prompt = model.tokenizer(TEXTS[0]).input_ids
    drawn = SamplingParams(temperature=1, top_p=0.9, seed=7, n=4, max_tokens=12)
    alone = generate(model, [prompt], drawn)[0]
    beside = generate(model, [model.workshop[:40], prompt, model.workshop[40:90]], drawn)[1]
    samples = [ids_of(alone, i) for i in range(4)]
    assert samples == [ids_of(beside, i) for i in range(4)] and len(set(map(tuple, samples))) > 1


@SMOL
def test_chat_streams_and_stops(model):
    llm, params = model.llm(), SamplingParams(temperature=0, max_tokens=32)
    [whole] = llm.chat(QUESTION, params, use_tqdm=False)
    prompt = model.tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(whole.prompt_token_ids) == prompt
    assert_greedy(model, prompt, ids_of(whole))
    text = model.tokenizer.decode(ids_of(whole), skip_special_tokens=True)
    assert whole.outputs[0].text == text and len(text) > 20
    updates = [update.outputs[0] for update in llm.stream_chat(QUESTION, params)]
    assert "".join(update.text for update in updates) == text and len(updates) > 8
    assert [token for update in updates for token in update.token_ids] == ids_of(whole)
    for stop in (text[10:14], text[15]):
        [cut] = llm.chat(QUESTION, SamplingParams(temperature=0, max_tokens=32, stop=stop), use_tqdm=False)
        assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == ("stop", stop)
        assert cut.outputs[0].text == text[: text.index(stop)]


@SMOL
@pytest.mark.parametrize("text", [TEXTS[0], TEXTS[1]])
def test_beams_are_transformers(model, text):
    import torch

    prompt = model.tokenizer(text).input_ids
    [found] = model.llm().beam_search([{"prompt_token_ids": prompt}], 3, max_tokens=10, use_tqdm=False)
    theirs = model.reference().generate(
        torch.tensor([prompt]),
        num_beams=3,
        num_return_sequences=3,
        do_sample=False,
        max_new_tokens=10,
        return_dict_in_generate=True,
        output_scores=True,
    )
    made = [
        [token for token in row if token != model.tokenizer.pad_token_id]
        for row in theirs.sequences[:, len(prompt) :].tolist()
    ]
    end = model.reference().generation_config.eos_token_id
    assert [[token for token in one.token_ids if token != end] for one in found.outputs] == [
        [token for token in row if token != end] for row in made
    ]
    np.testing.assert_allclose([one.score for one in found.outputs], theirs.sequences_scores.numpy(), rtol=0, atol=3e-4)


@SMOL
def test_a_converted_folder_is_the_checkpoint(model, tmp_path):
    prompts, params = (
        [model.workshop[:30], model.tokenizer(TEXTS[3]).input_ids],
        SamplingParams(temperature=0, max_tokens=6),
    )
    expected = [ids_of(one) for one in generate(model, prompts, params)]
    script, out = Path(scripts.SCRIPTS) / "convert.py", tmp_path / "out"
    done = subprocess.run(
        [sys.executable, str(script), "--model", str(model.folder), "--out", str(out), "--dtype", "float32"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(scripts.SCRIPTS.parent)},
    )
    assert done.returncode == 0, done.stderr
    small = dict(
        max_model_len=128, max_num_seqs=2, prefill_buckets=(64,), decode_buckets=(2,), max_num_batched_tokens=64
    )
    with LLM(str(out), **small, kv_cache_memory_bytes=1 << 26, use_tqdm=False) as llm:
        assert [
            ids_of(one) for one in llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        ] == expected
