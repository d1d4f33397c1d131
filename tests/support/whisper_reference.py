"""Reference implementation of Whisper (transformers). Needs torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from support import whisper

Model = transformers.WhisperForConditionalGeneration


def model(seed: int = 0, **changes: Any) -> Model:
    """Return a tiny model with random weights."""
    hf = whisper.CONFIG | changes
    made = Model(transformers.WhisperConfig(**hf, attn_implementation="eager")).float().eval()
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        for name, value in made.named_parameters():
            value.copy_(torch.tensor(whisper.noise(name, tuple(value.shape), generator)))
    made.generation_config = transformers.GenerationConfig(**whisper.GENERATION)
    return made


def save(reference: Model, folder: Path, **how: Any) -> Path:
    """Call `save_pretrained` and write the other files of the checkpoint."""
    reference.save_pretrained(folder, **how)
    return whisper.add_files(folder)


@torch.no_grad()
def encoded(reference: Model, features: np.ndarray) -> np.ndarray:
    """Return the encoder's output for windows, `[n, S, M]`."""
    return reference.model.encoder(torch.tensor(features)).last_hidden_state.numpy()


@torch.no_grad()
def logits(reference: Model, features: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """Return float32 logits `[T, V]` of one window at every position."""
    out = reference(input_features=torch.tensor(features)[None], decoder_input_ids=torch.tensor([ids]), use_cache=False)
    return out.logits[0].float().numpy()


def features(sound: np.ndarray) -> np.ndarray:
    """Return log-mel features of one window, `[BINS, FRAMES]`, or of the whole audio if longer."""
    extractor = transformers.WhisperFeatureExtractor(feature_size=whisper.BINS, chunk_length=1)
    padding = "max_length" if len(sound) <= whisper.RATE else "longest"
    out = extractor(sound, sampling_rate=whisper.RATE, padding=padding, truncation=False, return_tensors="np")
    return out["input_features"][0]


def generate(reference: Model, features: np.ndarray, count: int, **how: Any) -> list[int]:
    """Return the tokens of `generate` for one window, start tokens included."""
    out = reference.generate(
        torch.tensor(features)[None], do_sample=False, max_new_tokens=count, force_unique_generate_call=True, **how
    )
    return out[0].tolist()


def segments(reference: Model, sound: np.ndarray, language: str | None) -> list[tuple[float, float, list[int]]]:
    """Return start, end and tokens of each segment that `generate` finds in audio of any length."""
    out = reference.generate(
        torch.tensor(features(sound))[None],
        do_sample=False,
        return_timestamps=True,
        return_segments=True,
        language=language,
        task="transcribe",
    )
    return [(round(float(s["start"]), 4), round(float(s["end"]), 4), s["tokens"].tolist()) for s in out["segments"][0]]
