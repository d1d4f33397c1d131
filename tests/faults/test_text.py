"""Text at the ends: streams that add up, split characters, stop strings, chat, padding of the vocabulary."""

import gc
import inspect
import math
import time
import weakref
from dataclasses import replace
from functools import partial

import pytest
from transformers import GenerationConfig

from jaxinfer import LLM, SamplingParams
from jaxinfer.errors import ConfigError, EngineClosedError
from jaxinfer.loading import weights
from jaxinfer.results import progress
from jaxinfer.results.logprobs import LogprobTable
from jaxinfer.sampling_params import RequestOutputKind
from jaxinfer.sharding import make_mesh

pytestmark = pytest.mark.xdist_group("faults")

WARM = SamplingParams(temperature=2.0, seed=5, max_tokens=40, ignore_eos=True)
DELTA = RequestOutputKind.DELTA
EMOJI = "\U0001f600"


@pytest.fixture(scope="module")
def module(folder):
    """The model of `llm`."""
    return weights.load(folder, make_mesh(1), progress=False)


def warm(**fields):
    return SamplingParams(**dict(temperature=2.0, seed=5, max_tokens=40, ignore_eos=True) | fields)


def token_id(llm, piece):
    [found] = llm.get_tokenizer().encode(piece, add_special_tokens=False)
    return found


@pytest.mark.parametrize("n", [1, 3])
def test_deltas_add_up(llm, n):
    """Random bytes: many characters are split over tokens, many bytes are none at all."""
    prompts = ["hello", f"the cat {EMOJI}", [5, 6, 7]]
    final = llm.generate(prompts, warm(n=n))
    text = {(r, i): "" for r in range(3) for i in range(n)}
    ids: dict = {key: [] for key in text}
    names: dict = {}
    ends = {}
    for update in llm.stream(prompts, warm(n=n, output_kind=DELTA)):
        place = names.setdefault(update.request_id, len(names))
        for output in update.outputs:
            text[place, output.index] += output.text
            ids[place, output.index] += output.token_ids
            ends[place, output.index] = output.finish_reason
    for r, result in enumerate(final):
        for output in result.outputs:
            assert ids[r, output.index] == list(output.token_ids)
            assert text[r, output.index] == output.text
            assert ends[r, output.index] == output.finish_reason == "length"
    decode = partial(llm.get_tokenizer().decode, skip_special_tokens=True)
    for result in final:
        for output in result.outputs:
            assert decode(result.prompt_token_ids) + output.text == decode(
                [*result.prompt_token_ids, *output.token_ids]
            )
    assert any("\N{REPLACEMENT CHARACTER}" in output.text for result in final for output in result.outputs)


def test_cumulative_and_final_only(llm):
    final = llm.generate("hello", WARM)[0].outputs[0]
    *_, last = llm.stream("hello", warm(output_kind=RequestOutputKind.CUMULATIVE))
    assert (last.outputs[0].text, last.outputs[0].token_ids) == (final.text, final.token_ids)
    [only] = llm.stream("hello", warm(output_kind=RequestOutputKind.FINAL_ONLY))
    assert only.finished and only.outputs[0].text == final.text


def force(llm, text):
    """Parameters under which the model writes the tokens of `text`, one after another, and nothing else."""
    ids = llm.get_tokenizer().encode(text, add_special_tokens=False)
    assert len(set(ids)) == len(ids)
    pairs = tuple((a, b) for i, a in enumerate(ids) for b in ids if b != (ids[i + 1] if i + 1 < len(ids) else b))
    bias = {ids[0]: 100.0}
    return dict(
        temperature=0,
        max_tokens=len(ids),
        ignore_eos=True,
        allowed_token_ids=ids,
        logit_bias=bias,
        _bad_words_token_ids=pairs,
    )


def test_an_emoji_is_written_whole(llm):
    """Its four tokens give no text until the last, and then all of it."""
    updates = list(llm.stream("hello", SamplingParams(**force(llm, EMOJI), output_kind=DELTA)))
    assert [u.outputs[0].text for u in updates if u.outputs[0].text] == [EMOJI]
    assert sum(len(u.outputs[0].token_ids) for u in updates) == 4


def test_output_that_ends_inside_a_character(llm):
    cut = SamplingParams(**force(llm, EMOJI) | dict(max_tokens=2))
    assert llm.generate("hello", cut)[0].outputs[0].text == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_across_tokens(llm, include):
    """ "z8" lies across two tokens, the "8" in the middle of what is forced; nothing of it leaks early."""
    params = SamplingParams(**force(llm, "yz89k"), stop=["z8"], include_stop_str_in_output=include, output_kind=DELTA)
    updates = list(llm.stream("hello", params))
    text = "".join(u.outputs[0].text for u in updates)
    assert text == ("yz8" if include else "y")
    last = updates[-1].outputs[0]
    assert (last.finish_reason, last.stop_reason) == ("stop", "z8")
    assert sum(len(u.outputs[0].token_ids) for u in updates) == 3
    [whole] = llm.generate("hello", params)
    assert whole.outputs[0].text == text


def test_a_stop_string_that_is_an_emoji(llm):
    params = SamplingParams(**force(llm, f"y{EMOJI}k"), stop=[EMOJI])
    [result] = llm.generate("hello", params)
    assert (result.outputs[0].text, result.outputs[0].stop_reason) == ("y", EMOJI)


def chosen(token_ids, table):
    """The text of the tokens that are there, by a table of log-probabilities."""
    return "".join(entry[token].decoded_token for token, entry in zip(token_ids, table, strict=True))


def test_a_stop_string_that_is_a_special_token(llm):
    """It ends the output although special tokens are no part of the text; the text before it is cut exactly."""
    forced = force(llm, "yz<|end|>k") | dict(ignore_eos=True, output_kind=DELTA)
    for stop, text, count in (("<|end|>", "yz", 3), ("z<|end|>", "y", 3), ("z<|end|>k", "y", 4), ("zk", "y", 4)):
        updates = list(llm.stream("hello", SamplingParams(**forced, stop=[stop])))
        assert "".join(u.outputs[0].text for u in updates) == text
        last = updates[-1].outputs[0]
        assert (last.finish_reason, last.stop_reason) == ("stop", stop)
        assert sum(len(u.outputs[0].token_ids) for u in updates) == count
    [ended] = llm.generate("hello", SamplingParams(**forced | dict(ignore_eos=False), stop=["z<|end|>"]))
    assert (ended.outputs[0].text, ended.outputs[0].stop_reason) == ("y", "z<|end|>"), "by EOS itself"


def test_a_stop_string_that_the_end_of_the_output_completes(llm):
    """A character that is cut off becomes a replacement character only when the last token is there."""
    cut = force(llm, f"y{EMOJI}") | dict(max_tokens=3, stop=["y\N{REPLACEMENT CHARACTER}"])
    [output] = llm.generate("hello", SamplingParams(**cut))[0].outputs
    assert (output.text, output.finish_reason, output.stop_reason) == ("", "stop", "y\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize("skip", [True, False])
def test_tokens_in_tables_join_to_the_text(llm, skip):
    """Those of the output to its text, those of the prompt to the prompt's, in every form of a stream."""
    tokenizer = llm.get_tokenizer()
    prompts = [f"the cat {EMOJI}", [*tokenizer.encode("x<s>" + EMOJI, add_special_tokens=False)[:-1]]]
    asked = warm(logprobs=2, prompt_logprobs=1, skip_special_tokens=skip, max_tokens=30)
    results = llm.generate(prompts, asked)
    for result in results:
        [output] = result.outputs
        assert chosen(output.token_ids, output.logprobs) == output.text
        ids = result.prompt_token_ids
        assert tokenizer.decode(ids[:1]) + chosen(ids[1:], result.prompt_logprobs[1:]) == tokenizer.decode(ids)
    streamed = {"text": ["", ""], "logprobs": [[], []]}
    for update in llm.stream(prompts, asked):
        at = [list(r.prompt_token_ids) for r in results].index(list(update.prompt_token_ids))
        streamed["text"][at] += update.outputs[0].text
        streamed["logprobs"][at] += update.outputs[0].logprobs
        assert update.prompt_logprobs == results[at].prompt_logprobs
    assert streamed == {name: [getattr(r.outputs[0], name) for r in results] for name in streamed}
    last = {}
    for update in llm.stream(prompts, replace(asked, output_kind=RequestOutputKind.CUMULATIVE)):
        last[update.request_id] = update
    for update, result in zip(last.values(), results, strict=True):
        assert update.outputs == result.outputs and update.prompt_logprobs == result.prompt_logprobs


def test_the_token_that_ends_an_output_has_no_text_in_its_table(llm):
    """Where it could have come and did not, it is shown."""
    ids = [token_id(llm, "y"), 2]
    ending = dict(temperature=0, max_tokens=9, allowed_token_ids=ids, logit_bias={2: 100.0}, min_tokens=1, logprobs=20)
    [output] = llm.generate("hello", SamplingParams(**ending))[0].outputs
    assert output.text == "y" == chosen(output.token_ids, output.logprobs) and len(output.token_ids) == 2
    special = {entry[2].decoded_token for entry in output.logprobs[:1] if 2 in entry}
    assert special <= {"<|end|>"}


def test_a_stream_makes_each_table_once(llm, monkeypatch):
    """What an update costs does not grow with the prompt or with the tokens before."""
    made = []
    row = LogprobTable.row
    monkeypatch.setattr(
        LogprobTable, "row", lambda self, *args, **kwargs: made.append(args) or row(self, *args, **kwargs)
    )
    asked = warm(logprobs=1, prompt_logprobs=1, max_tokens=12, output_kind=RequestOutputKind.CUMULATIVE)
    tables = [update.prompt_logprobs for update in llm.stream([[5] * 40], asked)]
    assert len(tables) == 12 and len(made) == 39 + 12
    assert all(table is tables[0] for table in tables)


def test_only_a_caller_who_gave_no_max_tokens_is_told_of_the_default(llm, caplog):
    progress._warn_truncated.cache_clear()
    llm.generate("hello", SamplingParams(temperature=0, ignore_eos=True, max_tokens=16))
    llm.generate("hello", replace(SamplingParams(temperature=0, ignore_eos=True), max_tokens=16))
    assert "cut at max_tokens" not in caplog.text
    llm.generate("hello", replace(SamplingParams(ignore_eos=True), temperature=0))
    assert "cut at max_tokens=16, the default" in caplog.text


def test_several_eos_ids(llm):
    """Both of generation_config.json end an output and are no part of its text."""
    for end in (1, 2):
        ids = [token_id(llm, "y"), end]
        params = dict(temperature=0, max_tokens=9, allowed_token_ids=ids, logit_bias={end: 100.0}, min_tokens=2)
        [result] = llm.generate("hello", SamplingParams(**params))
        output = result.outputs[0]
        assert list(output.token_ids) == [ids[0], ids[0], end]
        assert (output.finish_reason, output.stop_reason, output.text) == ("stop", None, "yy")
        [result] = llm.generate("hello", SamplingParams(**params | dict(ignore_eos=True, min_tokens=0)))
        assert list(result.outputs[0].token_ids) == [end] * 9


def test_a_stop_token_id(llm):
    stop = token_id(llm, "z")
    params = SamplingParams(temperature=0, logit_bias={stop: 100.0}, stop_token_ids=[stop], max_tokens=9)
    [result] = llm.generate("hello", params)
    assert (result.outputs[0].finish_reason, result.outputs[0].stop_reason) == ("stop", stop)
    assert list(result.outputs[0].token_ids) == [stop] and result.outputs[0].text == ""


def test_padding_of_the_vocabulary_is_never_sampled(llm):
    """The embedding has 320 rows, the tokenizer fewer ids; the hottest sampling never meets the rest."""
    known = len(llm.get_tokenizer())
    assert known < 320
    hot = SamplingParams(temperature=1e6, n=8, max_tokens=100, ignore_eos=True, seed=1)
    [result] = llm.generate("hello", hot)
    made = {token for output in result.outputs for token in output.token_ids}
    assert max(made) < known and len(made) > known * 0.7
    biased = SamplingParams(temperature=0, logit_bias={319: 100.0}, max_tokens=3, ignore_eos=True)
    assert max(llm.generate("hello", biased)[0].outputs[0].token_ids) < known


def test_logprobs_of_a_padded_vocabulary(llm):
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=20, ignore_eos=True)
    [result] = llm.generate("hello", params)
    [table] = result.outputs[0].logprobs
    ranks = sorted(entry.rank for entry in table.values())
    assert ranks[:20] == list(range(1, 21))
    chosen = table[result.outputs[0].token_ids[0]]
    assert chosen.decoded_token == llm.get_tokenizer().decode(result.outputs[0].token_ids)
    assert math.isclose(result.outputs[0].cumulative_logprob, chosen.logprob)


def test_a_generation_config_is_taken(llm):
    config = GenerationConfig(max_new_tokens=5, do_sample=False)
    [result] = llm.generate("hello", config)
    [expected] = llm.generate("hello", SamplingParams(temperature=0, max_tokens=5))
    assert result.outputs[0].token_ids == expected.outputs[0].token_ids
    with pytest.raises(ValueError, match="num_beams"):
        llm.generate("hello", GenerationConfig(num_beams=4))


def test_nul_and_every_script_are_text(llm):
    odd = "a\x00b \u0645\u0631\u062d\u0628\u0627 \u4f60\u597d e\u0301 \U0001f468\u200d\U0001f469\u200d\U0001f467"
    [result] = llm.generate(odd, SamplingParams(max_tokens=2))
    assert llm.get_tokenizer().decode(result.prompt_token_ids) == odd


def test_a_lone_surrogate_and_ten_megabytes_are_refused_at_once(llm):
    with pytest.raises(ValueError, match="prompt 1.*surrogate"):
        llm.generate(["fine", "bad \ud800"])
    start = time.monotonic()
    with pytest.raises(ValueError, match="prompt 0.*10000000 characters"):
        llm.generate("x" * 10_000_000)
    assert time.monotonic() - start < 20
    assert not llm._engine.has_work


def test_chat_renders_the_template_and_runs_to_the_end(llm):
    [result] = llm.chat([{"role": "user", "content": "hello"}])
    assert result.prompt == "<s>user: hello<|end|>assistant: "
    assert result.prompt_token_ids[0] == 0 and list(result.prompt_token_ids).count(0) == 1, "one <s>, the template's"
    output = result.outputs[0]
    assert output.finish_reason == "stop" or len(result.prompt_token_ids) + len(output.token_ids) == 128
    two = llm.chat([[{"role": "user", "content": c}] for c in ("a", "b")], SamplingParams(max_tokens=2))
    assert ["user: a" in two[0].prompt, "user: b" in two[1].prompt] == [True, True]


def test_a_streamed_answer_continues_a_message_as_a_whole_one_does(llm):
    """`stream_chat` has every option of `chat`, and gives the same text."""
    options = [set(inspect.signature(call).parameters) for call in (llm.chat, llm.stream_chat)]
    assert options[0] - options[1] == {"use_tqdm"} and not options[1] - options[0]
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": [{"type": "text", "text": "the "}]}]
    how = dict(sampling_params=warm(max_tokens=4), add_generation_prompt=False, continue_final_message=True)
    [whole] = llm.chat(chat, **how)
    assert whole.prompt.endswith("the ")
    assert "".join(update.outputs[0].text for update in llm.stream_chat(chat, **how)) == whole.outputs[0].text


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (dict(chat_template_kwargs={"tokenize": True}), ValueError, "tokenize"),
        (dict(chat_template="{{ raise_exception('no such role') }}"), ValueError, "no such role"),
        (dict(chat_template="{% for i in range(10**9) %}x{% endfor %}"), ValueError, "range|template"),
    ],
)
def test_templates_that_fail_are_the_calls_own(llm, kwargs, error, message):
    with pytest.raises(error, match=message):
        llm.chat([{"role": "user", "content": "hello"}], **kwargs)
    assert llm.generate("hello", SamplingParams(max_tokens=1))[0].finished


@pytest.mark.slow
def test_token_ids_only(llm, make_llm):
    bare = make_llm(skip_tokenizer_init=True)
    try:
        with pytest.raises(ValueError, match="prompt 0 is text"):
            bare.generate("hello")
        with pytest.raises(ValueError, match="stop strings need a tokenizer"):
            bare.generate([[1, 2]], SamplingParams(stop="x"))
        with pytest.raises(ValueError, match="chat needs the tokenizer"):
            bare.chat([{"role": "user", "content": "x"}])
        greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, allowed_token_ids=range(300))
        [result] = bare.generate([[10, 11]], greedy)
        assert (result.prompt, result.outputs[0].text) == (None, "")
        assert result.outputs[0].token_ids == llm.generate([[10, 11]], greedy)[0].outputs[0].token_ids
    finally:
        bare.close()


@pytest.mark.slow
def test_the_module_itself_is_taken(llm, module):
    with LLM(module, tokenizer=llm.get_tokenizer(), max_model_len=64, max_num_seqs=2, max_num_batched_tokens=8) as own:
        greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        assert own.generate("hello", greedy, use_tqdm=False)[0].outputs[0].text == (
            llm.generate("hello", greedy)[0].outputs[0].text
        )


def test_more_logprobs_than_the_llm_was_made_for_are_refused(make_llm):
    with make_llm(max_logprobs=2) as llm:
        for name in ("logprobs", "prompt_logprobs"):
            with pytest.raises(ValueError, match=f"{name} is 3, more than max_logprobs = 2"):
                llm.generate([[5, 6, 7]], SamplingParams(**{name: 3}))


def test_a_closed_llm_lets_its_tokenizer_go(make_llm):
    llm = make_llm()
    llm.generate("hello", SamplingParams(max_tokens=2, stop="x", logprobs=1))
    held = weakref.ref(llm.get_tokenizer())
    llm.close()
    gc.collect()
    assert held() is None
    with pytest.raises(EngineClosedError):
        llm.get_tokenizer()


@pytest.mark.parametrize("wrong", [5, None, [5]])
def test_abort_wants_ids(llm, wrong):
    with pytest.raises(TypeError, match="request_id must be a string or a list of strings"):
        llm.abort(wrong)


def test_a_module_without_weights_is_refused(llm):
    with pytest.raises(ConfigError, match="embedding.weight is a shape without values; load the weights"):
        LLM(llm._opened.module, tokenizer=llm.get_tokenizer())


def test_a_module_with_a_tokenizer_stops_at_its_end(llm, module):
    with LLM(module, tokenizer=llm.get_tokenizer(), use_tqdm=False) as other:
        assert other._input_processor.limits.eos_token_ids == (llm.get_tokenizer().eos_token_id,)
    with pytest.raises(TypeError, match="tokenizer must be a directory, a Hub id or a tokenizer, got int"):
        LLM(module, tokenizer=5)
