"""A Whisper with a tokenizer: texts and segments; bad audio and options are errors that name the prompt, the others go
on."""

import asyncio
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults.conftest import assert_idle
from scipy.io import wavfile
from serve.conftest import MODEL, serving
from support import checkpoint, whisper
from support.stepping import PATIENCE, Held
from support.whisper import RATE, sound, write_folder

from jaxinfer import LLM, AsyncLLM, SamplingParams, Transcript
from jaxinfer.media import read_wav

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


# --- The server ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(shared_llm) -> Iterator[Any]:
    """OpenAI's client of a server of this model."""
    import openai

    with serving(shared_llm) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def wav(seconds: float = 2.3, rate: int = 22_050) -> bytes:
    """A stereo WAV file."""
    file, samples = io.BytesIO(), np.stack([sound(seconds, 1, rate)] * 2, axis=1)
    wavfile.write(file, rate, (samples * 2**14).astype("<i2"))
    return file.getvalue()


def test_the_servers_transcripts_are_those_of_transcribe(shared_llm, server):
    data = wav()
    [expected] = shared_llm.transcribe([read_wav(data)], language="en")
    given = {"model": MODEL, "file": ("a.wav", data), "language": "en"}
    found = {
        shape: server.audio.transcriptions.create(**given, response_format=shape)
        for shape in ("json", "text", "verbose_json", "srt", "vtt")
    }
    text = expected.text.strip()
    assert found["json"].text == text and found["text"] == text + "\n"
    assert found["verbose_json"].language == "en" and found["verbose_json"].duration == pytest.approx(2.3, abs=0.01)
    segments = [(one.start, one.end, one.text, one.tokens) for one in found["verbose_json"].segments]
    assert segments == [(one.start, one.end, one.text, list(one.token_ids)) for one in expected.segments]
    assert found["vtt"].startswith("WEBVTT\n\n00:00:0") and found["srt"].startswith("1\n00:00:0")
    assert found["srt"].count(" --> ") == found["vtt"].count(" --> ") == len(expected.segments)
    [english] = shared_llm.transcribe([read_wav(data)], task="translate")
    assert server.audio.translations.create(model=MODEL, file=("a.wav", data)).text == english.text.strip()


@pytest.mark.parametrize(
    ("changed", "param", "words"),
    [
        ({"file": ("a.mp3", b"ID3 no wav")}, None, "file 'a.mp3' is not a WAV file"),
        ({"response_format": "docx"}, "response_format", "must be one of json, text, srt, verbose_json, vtt"),
        ({"language": "Klingon"}, None, "language"),
        ({"temperature": -1}, "temperature", "temperature"),
        ({"prompt": "Umm,"}, "prompt", "is not supported"),
        ({"timestamp_granularities": ["word"]}, "timestamp_granularities[]", "is not supported"),
        ({"extra_body": {"hotwords": "x"}}, "hotwords", "Unrecognized"),
        ({"model": "other"}, "model", "does not exist"),
    ],
)
def test_bad_transcriptions_name_the_field(server, changed, param, words):
    import openai

    given = {"model": MODEL, "file": ("a.wav", wav(0.2))} | changed
    with pytest.raises(openai.APIStatusError, match=words) as error:
        server.audio.transcriptions.create(**given)
    assert error.value.status_code in (400, 404) and (param is None or error.value.body["param"] == param)


def test_a_form_that_is_none_is_refused(server):
    import httpx

    url = f"{server.base_url}audio/transcriptions"
    for headers, content, words in (
        ({"content-type": "application/json"}, b"{}", "must be multipart/form-data"),
        ({"content-type": "multipart/form-data"}, b"x", "not a valid multipart form"),
        ({"content-type": "multipart/form-data; boundary=b"}, b"x", "not a valid multipart form"),
    ):
        answer = httpx.post(url, headers=headers, content=content, timeout=PATIENCE)
        assert answer.status_code == 400 and words in answer.json()["error"]["message"]
    answer = httpx.post(url, files={"other": ("a.wav", b"")}, timeout=PATIENCE)
    assert answer.json()["error"]["param"] == "other"
    assert httpx.post(url, data={"model": MODEL}, files={}, timeout=PATIENCE).status_code == 400


def test_a_cancelled_transcription_is_aborted(shared_llm):
    async def run() -> None:
        llm = AsyncLLM.of(shared_llm)
        task = asyncio.ensure_future(llm.transcribe((sound(30.0), RATE), language="en"))
        while not shared_llm._engine.requests:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while shared_llm._engine.requests:
            await asyncio.sleep(0.005)

    engine = shared_llm._engine
    with Held(engine, until=lambda: not engine.requests):
        asyncio.run(asyncio.wait_for(run(), PATIENCE))
    assert_idle(shared_llm)
