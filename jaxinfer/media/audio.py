"""Audio passed by users: validation, conversion to one float32 channel, WAV files and resampling."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxinfer._utils.checks import describe, is_array

RATES = (1_000, 768_000)
"""Minimum and maximum sampling rate in Hz; values outside are mistakes, mostly of units."""
MAX_SAMPLES = 2**29
"""Maximum number of samples of one input: two hours at 48 kHz take 1.3 GB as float32."""
LOUDEST = 2.0**31
"""Maximum absolute value of float samples: full scale of the largest integer format. The spectrum of larger values
overflows.
"""
MAX_FRAME = 64
"""Bytes of the largest frame, one sample of each channel, for which a file's end is searched: 8 channels, 64 bits.
"""
PCM = {"uint8": (128, 2.0**7), "int16": (0, 2.0**15), "int32": (0, 2.0**31)}
"""Integer sample formats of WAV files: (value of silence, full scale)."""


class Audio(NamedTuple):
    """One channel of audio."""

    samples: np.ndarray
    """Samples, `[n]` float32, full scale at 1."""
    rate: int
    """Sampling rate in Hz."""

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return len(self.samples) / self.rate


def as_audio(value: Any, where: str) -> Audio:
    """Validate `(array, sampling_rate)` as passed by a user.

    The array contains the samples of one channel, `[n]`: floats with full scale at 1, or the integers of a WAV file
    (uint8, int16, int32), which are scaled to that.

    Args:
        value: the user's value.
        where: name for messages, such as "prompt 0, audio".

    Raises:
        TypeError: something else, such as a path, an array without its rate, or a list of numbers.
        ValueError: there are no samples, several channels, samples that are not finite, too large or all 0, or the
            sampling rate is invalid.
    """
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(f"{where} must be a pair (array, sampling_rate), got {_shown(value)}.")
    rate = _rate(value[1], where)
    if not is_array(value[0]):
        raise TypeError(f"{where}: the samples must be a NumPy array, got {_shown(value[0])}.")
    return Audio(_samples(np.asarray(value[0]), where), rate)


def as_features(value: Any, shape: tuple[int, ...], where: str) -> np.ndarray:
    """Validate precomputed features of shape `shape`; return them as float32.

    Raises:
        TypeError: not an array of floats.
        ValueError: the shape is wrong, or a value is not finite.
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
    """Resample with a polyphase filter and a Kaiser window (`scipy.signal.resample_poly`); returns `[n']` float32."""
    if audio.rate == rate:
        return audio.samples
    from scipy.signal import resample_poly  # a dependency of JAX; imported lazily, as it is slow

    shared = math.gcd(audio.rate, rate)
    return resample_poly(audio.samples, rate // shared, audio.rate // shared).astype(np.float32)


def read_wav(file: Path | str | bytes, name: str | None = None) -> Audio:
    """Read a WAV file with `scipy.io.wavfile`, averaging several channels.

    Args:
        file: path of the file, or its contents.
        name: what errors call it; by default its path.

    Samples may be integers of 8, 16, 24 or 32 bits or floats of 32 or 64 bits, plain or as WAVE_FORMAT_EXTENSIBLE.

    Raises:
        ValueError: the file cannot be read, or is of another format; names the file and the remedy.
    """
    name = name or ("the audio" if isinstance(file, bytes) else str(file))
    try:
        rate, data = _read_frames(file if isinstance(file, bytes) else Path(file).read_bytes())
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror or error}") from error
    except Exception as error:  # SciPy raises errors of many kinds for broken headers
        raise _not_wav(name, str(error) or "it is truncated") from error
    if data.dtype.kind != "f" and data.dtype.name not in PCM:
        raise _not_wav(name, f"its samples are {data.dtype}")
    samples = data if data.dtype.kind == "f" else _scaled(data)
    return Audio(samples.reshape(len(samples), -1).mean(axis=1, dtype=np.float32), int(rate))


def _read_frames(raw: bytes) -> tuple[int, np.ndarray]:
    """Return the sampling rate and the samples, `[n]` or `[n, channels]`.

    SciPy refuses a file that ends within a frame, as that of an interrupted recording; its end is cut off then.
    """
    from scipy.io import wavfile  # imported lazily, as it is slow

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", wavfile.WavFileWarning)  # of metadata, and of the end of the file
        try:
            return wavfile.read(io.BytesIO(raw))
        except ValueError:
            for cut in range(1, MAX_FRAME):
                with contextlib.suppress(Exception):
                    return wavfile.read(io.BytesIO(raw[:-cut]))
            raise


def _not_wav(name: str, reason: str) -> ValueError:
    return ValueError(
        f"{name} is not a WAV file of integer or float samples ({reason}); convert it: "
        "ffmpeg -i IN -c:a pcm_s16le OUT.wav"
    )


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
        raise ValueError(f"{where} has shape {list(array.shape)}; it must be one channel, [n]{remedy}.")
    if not array.size:
        raise ValueError(f"{where} is empty: it has no samples.")
    if array.size > MAX_SAMPLES:
        raise ValueError(f"{where} has {array.size} samples; the maximum is {MAX_SAMPLES}. Split it.")
    if array.dtype.name in PCM:
        array = _scaled(array)
    elif array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise TypeError(
            f"{where} has dtype {array.dtype}; samples are floats with full scale at 1, or {', '.join(PCM)}."
        )
    array = _finite(array, where)
    if (loudest := max(float(array.max()), -float(array.min()))) > LOUDEST:  # without copying hours of audio
        raise ValueError(
            f"{where} has samples of up to {loudest:.3g}; full scale is 1 and the maximum is {LOUDEST:.0f}. "
            "Divide the samples by their format's full scale."
        )
    if not array.any():
        raise ValueError(
            f"{where} is silent (all {array.size} samples are 0), and models hallucinate text for silence; remove it "
            "from the prompt."
        )
    return array


def _finite(array: np.ndarray, where: str) -> np.ndarray:
    """Convert to float32, in which features are computed, and check for NaN and infinite values."""
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
    """Describe a rejected value and what to pass instead."""
    if isinstance(value, str) or hasattr(value, "__fspath__"):
        return f"{type(value).__name__}; paths and URLs are not read: use jaxinfer.media.read_wav(path)"
    if isinstance(value, dict):  # the form of Hugging Face datasets
        return "a dict; pass (value['array'], value['sampling_rate'])"
    if is_array(value):
        return "an array without its sampling rate; pass both, such as (array, 16000)"
    if hasattr(value, "numpy"):
        return f"{describe(value)}; pass .numpy()"
    return describe(value)
