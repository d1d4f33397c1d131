"""Whisper against transformers: encoder, decoder logits, transcription."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import encoded, whisper
from support.encoded import PromptCase
from support.loaded import assert_same_by_name

pytest.importorskip("torch", reason="the reference of the parity tests; it comes with the extra `test`")

from support import whisper_reference as ref

from jaxinfer import LLM, SamplingParams
from jaxinfer.media import CrossInputs, EncoderInput

pytestmark = pytest.mark.xdist_group("whisper")

TOLERANCE = 1e-4
"""Absolute tolerance in float32; ignoring an option must change the values by 100 times as much."""


@cache
def model() -> ref.Model:
    return ref.model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ref.save(model(), tmp_path_factory.mktemp("whisper"))


def heard(features: np.ndarray) -> EncoderInput:
    return EncoderInput("audio", features, whisper.POSITIONS)


@pytest.mark.slow
def test_the_state_dict_is_taken_and_given_back(folder: Path):
    assert_same_by_name(folder, {name: value.numpy() for name, value in model().state_dict().items()})


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_the_encoder(folder: Path, tp: int):
    """Two windows in one step; the float32 sums of another kernel differ in the last digits."""
    windows = whisper.features(2)
    found = encoded.encoder_rows(folder, heard(windows), tp=tp).reshape(2, whisper.POSITIONS, -1)
    np.testing.assert_allclose(found, ref.encoded(model(), windows), atol=TOLERANCE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_decoder_logits_with_encoder_positions(folder: Path, tp: int):
    """Several windows and prompts of several lengths in one batch, then tokens one by one."""
    windows, generator = whisper.features(3), np.random.default_rng(1)
    prompts = [generator.integers(0, whisper.EOS, size).tolist() for size in (1, 20, 4)]
    following = [generator.integers(0, whisper.EOS, size).tolist() for size in (5, 2, 0)]
    inputs = [CrossInputs((heard(window[None]),)) for window in windows]
    cases = [PromptCase(*each) for each in zip(prompts, inputs, following, strict=True)]
    for number, (found, one) in enumerate(zip(encoded.logits(folder, cases, tp=tp), cases, strict=True)):
        ids = [*one.ids, *one.following]
        expected = ref.logits(model(), windows[number], ids)
        np.testing.assert_allclose(found[:, : whisper.VOCAB], expected, atol=TOLERANCE, rtol=0)
        other = ref.logits(model(), windows[number - 1], ids)
        assert np.abs(other - expected).max() > 100 * TOLERANCE, "logits must depend on the audio"


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, skip_tokenizer_init=True, use_tqdm=False, check_invariants=True) as made:
        yield made


SOUNDS = [whisper.sound(seconds, seed) for seed, seconds in enumerate((0.6, 0.31, 1.0, 0.05))]
MADE = 24


def ask(sound: np.ndarray, **options: Any) -> dict[str, Any]:
    return {"multi_modal_data": {"audio": (sound, whisper.RATE)}, **options}


OPTIONS = {
    "as it is": {},
    "german": {"language": "German"},
    "a code": {"language": "en", "task": "translate"},
    "detected, translated": {"task": "translate"},
    "timestamps": {"timestamps": True},
    "timestamps in german": {"language": "<|de|>", "timestamps": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_transcription_of_a_window(llm: LLM, name: str):
    """Greedy, several lengths in one batch: with a prompt, or what the rule forces, and all following tokens."""
    options = OPTIONS[name]
    params = SamplingParams(temperature=0, max_tokens=MADE)
    outputs = llm.generate([ask(sound, **options) for sound in SOUNDS], params, use_tqdm=False)
    own = {"task": "transcribe"} | {key: value for key, value in options.items() if key != "timestamps"}
    several = set()
    for sound, output in zip(SOUNDS, outputs, strict=True):
        found = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        features = ref.features(sound)
        expected = ref.generate(model(), features, MADE, return_timestamps=options.get("timestamps", False), **own)
        assert found == expected
        several.add(tuple(found))
    assert len(several) == len(SOUNDS) and max(map(len, map(set, several))) > 6


@pytest.mark.slow
@pytest.mark.parametrize("language", ["de", None])
def test_long_audio_in_windows(llm: LLM, language: str | None):
    """Audio of several lengths in one batch; an unspecified language is that of the first window."""
    sounds = [whisper.sound(seconds, seed) for seed, seconds in enumerate((3.7, 1.001, 5.03))]
    found = llm.transcribe([(sound, whisper.RATE) for sound in sounds], language=language, use_tqdm=False)
    for sound, transcript in zip(sounds, found, strict=True):
        segments = [(round(s.start, 4), round(s.end, 4), list(s.token_ids)) for s in transcript.segments]
        assert segments == ref.segments(model(), sound, language)
        assert transcript.duration == pytest.approx(len(sound) / whisper.RATE, abs=0.01)
        assert transcript.language == language or language is None and transcript.language in ("en", "de")
    assert max(len(transcript.segments) for transcript in found) > 4


@pytest.mark.slow
def test_short_audio_ends_where_it_ends(llm: LLM):
    """transformers continues into the silence after it, up to the end of the window."""
    sound = whisper.sound(0.6, 1)
    [found] = llm.transcribe((sound, whisper.RATE), language="en", use_tqdm=False)
    segments = [(round(s.start, 4), round(s.end, 4), list(s.token_ids)) for s in found.segments]
    expected = ref.segments(model(), sound, "en")
    assert segments == expected[: len(segments)] and len(segments) < len(expected)
    assert expected[len(segments) - 1][1] >= 0.6 or expected[len(segments)][0] >= 0.6
