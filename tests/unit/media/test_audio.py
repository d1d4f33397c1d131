"""Audio: accepted and refused values, WAV files, resampling, features."""

import io
import json
import struct
import wave

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.errors import CheckpointError
from jaxinfer.media.audio import Audio, as_audio, as_features, read_wav, resample
from jaxinfer.media.extractor import AudioProcessor

RATE = 16_000
SOUND = np.random.default_rng(0).uniform(-1, 1, 800).astype(np.float32)
EXTRACTOR = dict(
    feature_extractor_type="WhisperFeatureExtractor",
    feature_size=20,
    chunk_length=1,
    sampling_rate=RATE,
    hop_length=160,
    n_fft=400,
    processor_class="WhisperProcessor",
    auto_map={"AutoFeatureExtractor": "evil.Evil"},
    padding_side="right",
)
SHAPE = 20, 100


def tone(rate: int, hertz: float = 440.0, seconds: float = 0.5) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate).astype(np.float32)


def processor(folder, **changes) -> AudioProcessor:
    (folder / "preprocessor_config.json").write_text(json.dumps(EXTRACTOR | changes))
    return AudioProcessor(folder, SHAPE)


def wav(samples: np.ndarray, rate: int = RATE, width: int = 2) -> bytes:
    """`[n, channels]` integers as a file."""
    target = io.BytesIO()
    with wave.open(target, "wb") as file:
        file.setparams((samples.shape[1], width, rate, 0, "NONE", ""))
        raw = samples.astype("<i4").tobytes()
        file.writeframes(b"".join(raw[i : i + width] for i in range(0, len(raw), 4)))
    return target.getvalue()


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (SOUND, SOUND),
        (SOUND.astype(np.float64), SOUND),
        (jnp.asarray(SOUND), SOUND),
        (SOUND.astype(np.float16), SOUND.astype(np.float16)),
        (np.array([0, 2**14, -(2**15)], np.int16), [0, 0.5, -1]),
        (np.array([2**30, 1], np.int32), [0.5, 2.0**-31]),
        (np.array([128, 192, 0], np.uint8), [0, 0.5, -1]),
    ],
)
def test_samples_become_floats_with_full_scale_at_one(array, expected):
    found = as_audio((array, RATE), "prompt 0, audio")
    assert found.samples.dtype == np.float32 and found.rate == RATE
    np.testing.assert_array_equal(found.samples, np.asarray(expected, np.float32))


@pytest.mark.parametrize("rate", [8000, np.int64(44_100), 22_050.0])
def test_rates_are_whole_numbers_of_any_type(rate):
    assert as_audio((SOUND, rate), "prompt 0, audio").rate == int(rate)


@pytest.mark.parametrize(
    ("audio", "error", "message"),
    [
        (
            SOUND,
            TypeError,
            r"must be a pair \(array, sampling_rate\), got an array without its sampling rate; pass both",
        ),
        ("a.wav", TypeError, r"got str; paths and URLs are not read: use jaxinfer\.media\.read_wav\(path\)"),
        (
            {"array": SOUND, "sampling_rate": RATE},
            TypeError,
            r"got a dict; pass \(value\['array'\], value\['sampling_rate'\]\)",
        ),
        (None, TypeError, "got None"),
        ((SOUND,), TypeError, "pair"),
        ((SOUND, RATE, 1), TypeError, "pair"),
        (([0.5, 0.25], RATE), TypeError, "the samples must be a NumPy array, got list"),
        ((b"RIFF", RATE), TypeError, "the samples must be a NumPy array, got bytes"),
        ((SOUND, "16k"), TypeError, "the sampling rate must be an integer, in samples a second, got str '16k'"),
        ((SOUND, True), TypeError, "got bool True"),
        ((SOUND, None), TypeError, "got None"),
        ((SOUND, 0), ValueError, "the sampling rate is int 0; it must be a whole number .* from 1000 to 768000"),
        ((SOUND, -16000), ValueError, "int -16000"),
        ((SOUND, 16), ValueError, "int 16"),
        ((SOUND, 16000.5), ValueError, "16000.5"),
        ((SOUND, float("nan")), ValueError, "nan"),
        ((SOUND, float("inf")), ValueError, "inf"),
        ((SOUND, 10**5000), ValueError, "<16610-bit integer>"),
        ((SOUND[:0], RATE), ValueError, "is empty: it has no samples"),
        ((np.zeros(800, np.float32), RATE), ValueError, r"is silent \(all 800 samples are 0\)"),
        ((np.full(800, 128, np.uint8), RATE), ValueError, "is silent"),
        (
            (np.stack([SOUND, SOUND], axis=1), RATE),
            ValueError,
            r"shape \[800, 2\]; .*average its channels: array\.mean\(axis=1\)",
        ),
        ((np.stack([SOUND, SOUND]), RATE), ValueError, r"shape \[2, 800\]; .*array\.mean\(axis=0\)"),
        ((np.float32(1), RATE), TypeError, "NumPy array"),
        ((np.zeros((1, 2, 3)), RATE), ValueError, r"shape \[1, 2, 3\]"),
        (
            (np.array([0.5, np.nan, np.inf]), RATE),
            ValueError,
            r"has 2 values that are NaN or infinite, of 3 \(the first at 1\)",
        ),
        (
            (np.array([0.5, -3e9]), RATE),
            ValueError,
            r"has samples of up to 3e\+09; full scale is 1 and the maximum is 2147483648",
        ),
        ((np.array([0.5, 1e300]), RATE), ValueError, "has 1 values that are NaN or infinite, of 2"),
        (
            (np.array([1, 2]), RATE),
            TypeError,
            "dtype int64; samples are floats with full scale at 1, or uint8, int16, int32",
        ),
        ((np.array([True]), RATE), TypeError, "dtype bool"),
        ((np.array([1j]), RATE), TypeError, "dtype complex128"),
    ],
)
def test_invalid_audio_is_refused(audio, error, message):
    with pytest.raises(error, match=message) as raised:
        as_audio(audio, "prompt 3, audio")
    assert str(raised.value).startswith("prompt 3, audio")
    assert "0x" not in str(raised.value)


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (np.zeros((20, 99), np.float32), ValueError, r"shape \[20, 99\]; this model takes \[20, 100\]"),
        (np.zeros((1, 20, 100), np.float32), ValueError, r"shape \[1, 20, 100\]"),
        (np.full(SHAPE, np.nan, np.float32), ValueError, "2000 values that are NaN"),
        (np.zeros(SHAPE, np.int64), TypeError, "int64"),
        ([[0.0]], TypeError, "got list"),
    ],
)
def test_features_of_another_model_are_refused(features, error, message):
    with pytest.raises(error, match=message):
        as_features(features, SHAPE, "prompt 0: input_features")
    assert as_features(np.zeros(SHAPE), SHAPE, "x").dtype == np.float32


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000])
def test_resampling_preserves_a_tone(rate):
    found = resample(Audio(tone(rate), rate), RATE)
    assert found.dtype == np.float32 and abs(len(found) - RATE // 2) <= 1
    middle = slice(1000, 7000)  # the filter's edges contain silence
    np.testing.assert_allclose(found[:8000][middle], tone(RATE)[middle], atol=0.01)


def test_resampling_filters_frequencies_above_the_nyquist_limit():
    high = resample(Audio(tone(48_000, 12_000.0), 48_000), RATE)
    assert np.abs(high[1000:7000]).max() < 0.05


@pytest.mark.parametrize(("width", "full"), [(2, 2**15), (3, 2**23), (4, 2**31)])
def test_wav_files_of_all_widths_and_their_channels_averaged(tmp_path, width, full):
    left, right = np.array([0.5, -1.0, 0.25]), np.array([0.0, -0.5, 0.75])
    (tmp_path / "a.wav").write_bytes(wav(np.stack([left, right], axis=1) * full, 44_100, width))
    found = read_wav(tmp_path / "a.wav")
    assert found.rate == 44_100
    np.testing.assert_allclose(found.samples, (left + right) / 2, atol=1e-6)


def test_wav_files_of_eight_bits(tmp_path):
    (tmp_path / "a.wav").write_bytes(wav(np.array([[128], [192], [0]]), width=1))
    np.testing.assert_array_equal(read_wav(tmp_path / "a.wav").samples, np.float32([0, 0.5, -1]))


def wav_of(samples: np.ndarray, tag: int, *, extensible: bool = False) -> bytes:
    """Return `[n, channels]` as a WAV file with this format tag, which WAVE_FORMAT_EXTENSIBLE has in its GUID."""
    channels, width = samples.shape[1], samples.dtype.itemsize
    fields = struct.pack("<HIIHH", channels, RATE, RATE * channels * width, channels * width, 8 * width)
    made = struct.pack("<H", 0xFFFE if extensible else tag) + fields
    if extensible:
        guid = struct.pack("<I", tag) + bytes.fromhex("00001000800000aa00389b71")
        made += struct.pack("<HHI", 22, 8 * width, 0) + guid
    body = b"WAVEfmt " + struct.pack("<I", len(made)) + made + b"data" + struct.pack("<I", samples.nbytes)
    return b"RIFF" + struct.pack("<I", len(body) + samples.nbytes) + body + samples.tobytes()


@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize(("dtype", "tag"), [("<f4", 3), ("<f8", 3), ("<i2", 1), ("<i4", 1)])
def test_wav_files_of_floats_and_of_the_extensible_format(tmp_path, dtype, tag, extensible):
    wanted = np.array([[0.5, 0.0], [-1.0, -0.5], [0.25, 0.75]])
    full = 1.0 if tag == 3 else 2.0 ** (8 * np.dtype(dtype).itemsize - 1)
    (tmp_path / "a.wav").write_bytes(wav_of((wanted * full).astype(dtype), tag, extensible=extensible))
    found = read_wav(tmp_path / "a.wav")
    assert found.rate == RATE
    np.testing.assert_allclose(found.samples, wanted.mean(axis=1), atol=1e-6)


@pytest.mark.parametrize(("channels", "width", "left"), [(1, 2, 98), (2, 2, 99), (1, 3, 99), (2, 4, 99)])
def test_a_file_that_ends_within_a_sample_gives_what_it_has(tmp_path, channels, width, left):
    (tmp_path / "a.wav").write_bytes(wav(np.arange(100 * channels).reshape(100, -1) * 100, width=width)[:-3])
    assert len(read_wav(tmp_path / "a.wav").samples) == left


def test_unsupported_wav_files_are_refused(tmp_path):
    plain = wav(np.zeros((4, 1)))
    for name, data in {
        "text": b"hello",
        "empty": b"",
        "adpcm": wav_of(np.zeros((4, 1), np.int16), 2),
        "head": plain[:20],
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name} is not a WAV file of integer or float .*; convert it: ffmpeg"):
            read_wav(tmp_path / name)
    with pytest.raises(ValueError, match="missing.wav: No such file"):
        read_wav(tmp_path / "missing.wav")


def test_features_are_those_of_transformers(tmp_path):
    from transformers import WhisperFeatureExtractor

    own = processor(tmp_path)
    expected = WhisperFeatureExtractor(feature_size=20, chunk_length=1)(SOUND, sampling_rate=RATE, return_tensors="np")
    found = own.window(Audio(SOUND, RATE), "x")
    assert found.shape == SHAPE and found.dtype == np.float32
    np.testing.assert_array_equal(found, expected["input_features"][0])
    assert (own.rate, own.frame_seconds, own.frames(Audio(SOUND, RATE))) == (RATE, 0.01, 5)
    np.testing.assert_array_equal(own.extract(Audio(SOUND, RATE)), found)


def test_audio_longer_than_a_window(tmp_path):
    own, audio = processor(tmp_path), Audio(tone(8000, seconds=1.5), 8000)
    with pytest.raises(
        ValueError, match=r"prompt 2, audio is 1\.50 s long; the model takes at most 1 s at once\. Use LLM\.transcribe"
    ):
        own.window(audio, "prompt 2, audio")
    assert own.extract(audio).shape == (20, 150) and own.frames(audio) == 150
    own.window(Audio(tone(8000, seconds=1.0), 8000), "x")


def test_default_feature_extractor_without_a_file(tmp_path):
    assert AudioProcessor(tmp_path, (20, 3000)).window(Audio(SOUND, RATE), "x").shape == (20, 3000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_size": 40}, r"windows of shape \[40, 100\] .*but the model takes \[20, 100\]"),
        (
            {"feature_extractor_type": "Wav2Vec2FeatureExtractor"},
            "feature_extractor_type is 'Wav2Vec2FeatureExtractor'",
        ),
        ({"feature_size": 10**9}, "feature_size = 1000000000; it must be from 1 to 4096"),
        ({"hop_length": 0}, "hop_length = 0"),
    ],
)
def test_mismatched_extractors_are_refused(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        processor(tmp_path, **changes).window(Audio(SOUND, RATE), "x")
