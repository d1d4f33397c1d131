"""Audio as users pass it, checked and made one channel of float32; WAV files; other sampling rates."""

from __future__ import annotations

import math
import wave
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxinfer._utils.checks import describe, is_array

RATES = (1_000, 768_000)
"""Samples a second, least and most; what lies outside is a mistake, of units most often."""
MAX_SAMPLES = 2**29
"""Of one input: two hours at 48 kHz take 1.3 GB as float32."""
LOUDEST = 2.0**31
"""Of floats: full scale of the largest integers that sound is kept in. What is beyond it is no sound, and its spectrum
overflows."""
PCM = {"uint8": (128, 2.0**7), "int16": (0, 2.0**15), "int32": (0, 2.0**31)}
"""Integers that WAV files hold: what silence is, and what full scale is."""


class Audio(NamedTuple):
    """One channel of sound."""

    samples: np.ndarray
    """`[n]` float32, full scale at 1."""
    rate: int
    """Samples a second."""

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self.samples) / self.rate


def as_audio(value: Any, where: str) -> Audio:
    """`(array, sampling_rate)` as a user passes it.

    The array has the samples of one channel, `[n]`: floats with full scale at 1, or the integers of a WAV file (uint8,
    int16, int32), which are scaled so.

    Args:
        value: what the user passed.
        where: "prompt 0, audio", for messages.

    Raises:
        TypeError: something else, such as a path, an array without its rate, or a list of numbers.
        ValueError: no samples, several channels, samples that are not finite, beyond any scale or all silent, an
            impossible rate.
    """
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(f"{where} must be a pair (array, sampling_rate), got {_shown(value)}.")
    rate = _rate(value[1], where)
    if not is_array(value[0]):
        raise TypeError(f"{where}: the samples must be a NumPy array, got {_shown(value[0])}.")
    return Audio(_samples(np.asarray(value[0]), where), rate)


def as_features(value: Any, shape: tuple[int, ...], where: str) -> np.ndarray:
    """Features `shape` that were made elsewhere, as float32.

    Raises:
        TypeError: no array of floats.
        ValueError: another shape, or a value that is not finite.
    """
    if not is_array(value):
        raise TypeError(f"{where} must be a NumPy array of log-mel features, got {describe(value)}.")
    made = np.asarray(value)
    if made.dtype.kind != "f" and made.dtype.name != "bfloat16":
        raise TypeError(f"{where} must have floats, as the model's feature extractor makes them, got {made.dtype}.")
    if made.shape != shape:
        raise ValueError(
            f"{where} has shape {list(made.shape)}; this model takes {list(shape)}: mel bins by frames of one "
            "window, padded to its end."
        )
    return _finite(made, where)


def resample(audio: Audio, rate: int) -> np.ndarray:
    """`[n']` float32 samples at another rate: a polyphase filter with a Kaiser window
    (`scipy.signal.resample_poly`)."""
    if audio.rate == rate:
        return audio.samples
    from scipy.signal import resample_poly  # a dependency of JAX; imported when it is needed, as it takes a while

    shared = math.gcd(audio.rate, rate)
    return resample_poly(audio.samples, rate // shared, audio.rate // shared).astype(np.float32)


def read_wav(file: Path | str) -> Audio:
    """A WAV file of PCM samples (8, 16, 24 or 32 bits); several channels are averaged.

    Raises:
        ValueError: it cannot be read, or is of another kind; names the file and the remedy.
    """
    try:
        with wave.open(str(file), "rb") as opened:
            channels, width, rate = opened.getnchannels(), opened.getsampwidth(), opened.getframerate()
            data = opened.readframes(opened.getnframes())
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror or error}") from error
    except (wave.Error, EOFError) as error:
        raise ValueError(
            f"{file} is no WAV file of PCM samples ({str(error) or 'it is truncated'}); convert it: "
            "ffmpeg -i IN -c:a pcm_s16le OUT.wav"
        ) from error
    whole = len(data) // (width * channels) * width * channels  # a file may end within a sample
    return Audio(_decode(data[:whole], width).reshape(-1, channels).mean(axis=1, dtype=np.float32), rate)


def _decode(data: bytes, width: int) -> np.ndarray:
    """`[n]` float32 of little-endian samples of so many bytes."""
    if width == 3:  # the three bytes become the upper ones of four
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        data, width = wide.tobytes(), 4
    return _scaled(np.frombuffer(data, {1: "u1", 2: "<i2", 4: "<i4"}[width]))


def _scaled(samples: np.ndarray) -> np.ndarray:
    silence, full = PCM[samples.dtype.name]
    return ((samples.astype(np.float64) - silence) / full).astype(np.float32)


def _rate(value: Any, where: str) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{where}: the sampling rate must be an integer, in samples a second, got {describe(value)}.")
    low, high = RATES
    if not low <= value <= high or value != int(value):
        raise ValueError(
            f"{where}: the sampling rate is {describe(value)}; it must be a whole number of samples a second "
            f"from {low} to {high}, such as 16000."
        )
    return int(value)


def _samples(array: np.ndarray, where: str) -> np.ndarray:
    if array.ndim != 1:
        axis = 0 if array.ndim == 2 and array.shape[0] <= array.shape[1] else 1
        remedy = f"; average its channels: array.mean(axis={axis})" if array.ndim == 2 else ""
        raise ValueError(f"{where} has shape {list(array.shape)}; the samples of one channel, [n], are taken{remedy}.")
    if not array.size:
        raise ValueError(f"{where} is empty: it has no samples.")
    if array.size > MAX_SAMPLES:
        raise ValueError(f"{where} has {array.size} samples; at most {MAX_SAMPLES} are taken. Cut it.")
    if array.dtype.name in PCM:
        array = _scaled(array)
    elif array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise TypeError(
            f"{where} has dtype {array.dtype}; samples are floats with full scale at 1, or {', '.join(PCM)}."
        )
    array = _finite(array, where)
    if (loudest := max(float(array.max()), -float(array.min()))) > LOUDEST:  # no copy of hours of sound
        raise ValueError(
            f"{where} has samples of up to {loudest:.3g}, and full scale is 1; at most {LOUDEST:.0f} is taken. "
            "Divide by what full scale is in it."
        )
    if not array.any():
        raise ValueError(
            f"{where} is silent: all of its {array.size} samples are 0, and what a model hears in them it makes "
            "up. Leave it out."
        )
    return array


def _finite(array: np.ndarray, where: str) -> np.ndarray:
    """In float32, as it is computed with."""
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    finite = np.isfinite(array)
    if not finite.all():
        raise ValueError(
            f"{where} has {int((~finite).sum())} values that are NaN or infinite, of {array.size} (the first at "
            f"{int(np.argmin(finite))}); replace them, for instance by np.nan_to_num, or leave it out."
        )
    return array


def _shown(value: Any) -> str:
    """What was passed, and what to do about it."""
    if isinstance(value, str) or hasattr(value, "__fspath__"):
        return f"{type(value).__name__}; nothing is read from paths or URLs: jaxinfer.media.read_wav(path)"
    if isinstance(value, dict):  # as Hugging Face's datasets have them
        return "a dict; pass (value['array'], value['sampling_rate'])"
    if is_array(value):
        return "an array alone; its rate belongs with it, such as (array, 16000)"
    if hasattr(value, "numpy"):
        return f"{describe(value)}; pass .numpy()"
    return describe(value)
