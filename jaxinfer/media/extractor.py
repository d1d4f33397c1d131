"""Log-mel features of audio, computed by transformers' feature extractor (without torch)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer._utils.checks import as_int
from jaxinfer._utils.transformers import from_transformers
from jaxinfer.errors import CheckpointError
from jaxinfer.media.audio import Audio, resample
from jaxinfer.media.preprocessor_config import described

EXTRACTOR = "WhisperFeatureExtractor"
MAX_BINS = 2**12


class AudioProcessor:
    """Feature extractor of a checkpoint: one window, or audio of any length.

    Args:
        directory: folder of the checkpoint.
        shape: shape of the model's features, `(mel bins, frames)` of one window.
    """

    def __init__(self, directory: Path, shape: tuple[int, ...]):
        self._directory, self._shape = directory, shape
        self._made: Any = None

    def window(self, audio: Audio, where: str) -> np.ndarray:
        """Compute the features of audio that fits into one window, `[mel bins, frames]` float32, padded with silence.

        Raises:
            ValueError: the audio is longer; names both lengths and the remedy.
            CheckpointError: the extractor's configuration is missing, unusable, or does not match the model.
        """
        samples, extractor = resample(audio, self.rate), self._extractor
        if len(samples) > extractor.n_samples:
            raise ValueError(
                f"{where} is {audio.seconds:.2f} s long; the model takes at most {extractor.n_samples / self.rate:g} s "
                "at once. Use LLM.transcribe for longer audio."
            )
        return self._features(samples, "max_length")

    def extract(self, audio: Audio) -> np.ndarray:
        """Compute features of audio of any length, `[mel bins, frames]` float32; pad to at least one window.

        Raises:
            CheckpointError: as `window`.
        """
        samples = resample(audio, self.rate)
        return self._features(samples, "max_length" if len(samples) <= self._extractor.n_samples else "longest")

    def frames(self, audio: Audio) -> int:
        """Return the number of frames that are audio, not padding."""
        samples = -(-len(audio.samples) * self.rate // audio.rate)
        return max(1, samples // self._extractor.hop_length)

    @property
    def rate(self) -> int:
        """Sampling rate of the model in Hz."""
        return self._extractor.sampling_rate

    @property
    def frame_seconds(self) -> float:
        """Duration of a frame in seconds."""
        return self._extractor.hop_length / self.rate

    @property
    def _extractor(self) -> Any:
        if self._made is None:
            self._made = self._make()
        return self._made

    def _features(self, samples: np.ndarray, padding: str) -> np.ndarray:
        out = self._extractor(samples, sampling_rate=self.rate, padding=padding, truncation=False, return_tensors="np")
        return np.asarray(out["input_features"], np.float32)[0]

    def _make(self) -> Any:
        name, settings = described(self._directory, "feature_extractor") or (
            EXTRACTOR,
            {"feature_size": self._shape[0]},
        )
        cls = from_transformers(EXTRACTOR) if name == EXTRACTOR else None
        if cls is None:
            raise CheckpointError(
                f"{self._directory}: feature_extractor_type is {name!r}; {EXTRACTOR} is supported. Pass "
                "multi_modal_data={'input_features': ...}"
            )
        _check(self._directory, settings)
        made = cls(**settings)
        found = made.feature_size, made.nb_max_frames
        if found != self._shape:
            raise CheckpointError(
                f"{self._directory}: the feature extractor returns windows of shape {list(found)} (mel bins, frames), "
                f"but the model takes {list(self._shape)}; preprocessor_config.json and config.json do not match"
            )
        return made


def _check(directory: Path, settings: Mapping[str, Any]) -> None:
    """Refuse sizes from which the extractor would build huge or empty tables."""
    most = {"feature_size": MAX_BINS, "sampling_rate": 10**6, "hop_length": 2**16, "chunk_length": 3600, "n_fft": 2**16}
    for name, limit in most.items():
        if name in settings and not 1 <= as_int(f"preprocessor_config.json: {name}", settings[name]) <= limit:
            raise CheckpointError(
                f"{directory}: preprocessor_config.json has {name} = {settings[name]}; it must be from 1 to {limit}"
            )
