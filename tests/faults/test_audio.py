"""A Whisper with a tokenizer: texts and segments; bad audio and options are errors that name the prompt, the others go
on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import checkpoint, whisper
from support.whisper import RATE, sound, write_folder

from jaxinfer import LLM, SamplingParams, Transcript

pytestmark = [pytest.mark.xdist_group("whisper"), pytest.mark.slow]

SETTINGS = dict(max_num_seqs=8, block_size=4, kv_cache_memory_bytes=1 << 21, check_invariants=True, use_tqdm=False)
PARAMS = SamplingParams(temperature=0, max_tokens=12)
SOUND = sound(0.6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def shared_llm(folder) -> Iterator[LLM]:
    with LLM(folder, **SETTINGS) as llm:
        yield llm


def ask(audio: Any = (SOUND, RATE), **options: Any) -> dict[str, Any]:
    return {"multi_modal_data": {"audio": audio}, **options}


def tokens(outputs) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_every_form_of_a_prompt_gives_the_same(llm):
    features = llm._opened.cross.processor.window(llm._opened.cross.audio((SOUND, RATE), "x"), "x")
    start = "<|startoftranscript|><|en|><|transcribe|><|notimestamps|>"
    ids = llm.get_tokenizer().convert_tokens_to_ids(list(whisper.SPECIAL))
    forms = [
        ask(language="en"),
        ask([(SOUND, RATE)], language="English", task="transcribe"),
        ask(language="<|en|>", timestamps=False),
        {"multi_modal_data": {"input_features": features}, "language": "en"},
        ask(prompt=start),
        ask(prompt_token_ids=[ids[1], ids[2], ids[5], ids[8]]),
    ]
    made = llm.generate(forms, PARAMS)
    assert tokens(made) == tokens(made[:1]) * len(forms)
    readings = {metric.name: metric.value for metric in llm.get_metrics()}
    assert readings["jaxinfer:encoder_inputs"] == 1, "one sound, one run"


def test_special_tokens_are_not_text(llm):
    [plain, timed] = llm.generate([ask(language="en"), ask(language="en", timestamps=True)], PARAMS)
    assert plain.outputs[0].text and "<|" not in plain.outputs[0].text
    assert timed.outputs[0].text.startswith("<|0.")
    updates = list(llm.stream(ask(language="en"), PARAMS))
    assert "".join(update.outputs[0].text for update in updates) == plain.outputs[0].text


def test_the_language_that_is_detected_is_in_the_tokens(llm):
    [output] = llm.generate(ask(), PARAMS)
    tokenizer, made = llm.get_tokenizer(), list(output.outputs[0].token_ids)
    head = tokenizer.convert_ids_to_tokens(made[:3])
    assert head[0] in ("<|en|>", "<|de|>") and head[1:] == ["<|transcribe|>", "<|notimestamps|>"]
    assert len(made) <= PARAMS.max_tokens + 3, "they are not counted"
    [same] = llm.generate(ask(language=head[0]), PARAMS)
    assert list(same.outputs[0].token_ids) == made[3:] and same.outputs[0].text == output.outputs[0].text


def test_samples_share_what_the_encoder_made(llm):
    params = SamplingParams(temperature=0.7, n=4, seed=5, max_tokens=12)
    [output] = llm.generate(ask(language="en"), params)
    alone = [
        llm.generate(ask(language="en"), SamplingParams(temperature=0.7, seed=5, max_tokens=12))[0].outputs[0].token_ids
    ]
    assert list(output.outputs[0].token_ids) == list(alone[0])
    assert len({tuple(sample.token_ids) for sample in output.outputs}) > 1


def test_a_transcript_is_text_and_segments(llm):
    long = sound(3.2, 1)
    first, second = llm.transcribe([(long, RATE), (SOUND, RATE)], language="en", use_tqdm=False)
    assert isinstance(first, Transcript) and first.language == "en" and first.duration == pytest.approx(3.2)
    assert "<|" not in first.text and all("<|" not in segment.text for segment in first.segments)
    assert [segment.start for segment in first.segments] == sorted(segment.start for segment in first.segments)
    assert first.segments[-1].start > 1 and all(segment.end >= segment.start for segment in first.segments)
    alone = llm.transcribe((SOUND, RATE), language="en", use_tqdm=False)
    assert alone == [second]
    assert llm.transcribe([], use_tqdm=False) == []


NAN, STEREO = SOUND.copy(), np.stack([SOUND, SOUND], axis=1)
NAN[7] = np.nan


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (ask((SOUND[:0], RATE)), ValueError, "prompt 1, audio is empty"),
        (ask((0 * SOUND, RATE)), ValueError, "prompt 1, audio is silent"),
        (ask((NAN, RATE)), ValueError, "prompt 1, audio has 1 values that are NaN or infinite, of 9600"),
        (ask((STEREO, RATE)), ValueError, r"prompt 1, audio has shape \[9600, 2\].*average its channels"),
        (ask((SOUND, 0)), ValueError, "prompt 1, audio: the sampling rate is int 0"),
        (ask(SOUND), TypeError, "prompt 1, audio must be a pair"),
        (ask("a.wav"), TypeError, "prompt 1, audio .*got str"),
        (
            ask((sound(1.5), RATE)),
            ValueError,
            "prompt 1, audio is 1.50 s long; the model takes at most 1 s at once. Use LLM.transcribe",
        ),
        (ask([(SOUND, RATE)] * 2), ValueError, "prompt 1, audio: got a list of 2; a prompt takes exactly one"),
        (ask([]), ValueError, "prompt 1, audio: got a list of 0"),
        (
            {"prompt": "hello"},
            ValueError,
            "prompt 1 has no audio, which this model requires; pass {'multi_modal_data'",
        ),
        ("hello", ValueError, "prompt 1 has no audio, which this model requires"),
        (
            {"multi_modal_data": {"image": SOUND}},
            ValueError,
            "prompt 1: multi_modal_data has str 'image'; this model takes 'audio'",
        ),
        (
            {"multi_modal_data": {"audio": (SOUND, RATE), "input_features": SOUND}},
            ValueError,
            "prompt 1: multi_modal_data has both 'audio' and 'input_features'; pass one",
        ),
        (
            {"multi_modal_data": {"input_features": np.zeros((20, 99), np.float32)}},
            ValueError,
            r"prompt 1: input_features has shape",
        ),
        (
            ask(language="klingon"),
            ValueError,
            "prompt 1: 'language' is 'klingon', which this model does not support; supported: de, en",
        ),
        (ask(language="fr"), ValueError, "prompt 1: 'language' is 'fr'"),
        (ask(language=3), TypeError, "prompt 1: 'language' must be a string"),
        (
            ask(task="summarise"),
            ValueError,
            "prompt 1: 'task' is str 'summarise'; it must be 'transcribe' or 'translate'",
        ),
        (ask(timestamps="yes"), TypeError, "prompt 1: 'timestamps' must be True or False"),
        (
            ask(prompt="<|startoftranscript|>", language="en"),
            ValueError,
            "prompt 1: 'language' cannot be combined with 'prompt'",
        ),
        (ask(prompt_token_ids=[10**6]), ValueError, "prompt 1: token id 1000000 at position 0 is out of"),
        (
            ask(temperature=1),
            ValueError,
            "prompt 1: unknown key str 'temperature'; the keys are .*language, task, timestamps",
        ),
    ],
)
def test_a_bad_prompt_ends_the_call_by_name(llm, wrong, error, message):
    with pytest.raises(error, match=message):
        llm.generate([ask(language="en"), wrong, ask(language="de")], PARAMS)
    assert not llm._engine.requests


def test_the_others_are_unharmed(llm):
    before = tokens(llm.generate([ask(language="en"), ask(language="de")], PARAMS))
    for wrong in ((NAN, RATE), (STEREO, RATE)):
        with pytest.raises(ValueError, match="prompt 1"):
            llm.generate([ask(language="en"), ask(wrong)], PARAMS)
        with pytest.raises(ValueError, match="audio 1"):
            llm.transcribe([(SOUND, RATE), wrong], use_tqdm=False)
    assert tokens(llm.generate([ask(language="en"), ask(language="de")], PARAMS)) == before


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (dict(language="klingon"), ValueError, "prompt 0: 'language' is 'klingon'"),
        (dict(task="sing"), ValueError, "prompt 0: 'task' is str 'sing'"),
        (dict(sampling_params=SamplingParams(n=2)), ValueError, "n must be 1 for transcription, got 2"),
        (dict(sampling_params={"n": 1}), TypeError, "sampling_params must be one SamplingParams, got dict"),
    ],
)
def test_options_of_a_transcription(llm, call, error, message):
    with pytest.raises(error, match=message):
        llm.transcribe((SOUND, RATE), use_tqdm=False, **call)
    assert not llm._engine.requests


def test_a_tokenizer_that_knows_no_timestamps(llm, folder):
    """As Whisper's first ones: they are made all the same, and are no text."""
    old = checkpoint.tokenizer()
    old.add_special_tokens({"additional_special_tokens": list(whisper.SPECIAL)})
    with LLM(folder, tokenizer=old, **SETTINGS) as other:
        [found] = other.transcribe((SOUND, RATE), language="en", use_tqdm=False)
    [expected] = llm.transcribe((SOUND, RATE), language="en", use_tqdm=False)
    assert found == expected
