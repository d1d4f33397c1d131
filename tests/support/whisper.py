"""Tiny Whisper: config.json, generation_config.json, weights written without torch, audio."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerFast

from support import checkpoint

VOCAB, BINS, POSITIONS, LENGTH = 160, 20, 50, 64
"""Vocabulary size; mel bins; positions of the encoder (one second); maximum tokens of the decoder."""
RATE, FRAMES = 16_000, 2 * POSITIONS
EOS, START, ENGLISH, GERMAN, TRANSLATE, TRANSCRIBE, PREVIOUS, NO_SPEECH, NO_TIMESTAMPS = range(100, 109)
ZERO = NO_TIMESTAMPS + 1
"""Timestamp token of 0.00 s, the first of `POSITIONS` + 1."""

CONFIG = dict(
    architectures=["WhisperForConditionalGeneration"],
    model_type="whisper",
    vocab_size=VOCAB,
    num_mel_bins=BINS,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=40,
    max_source_positions=POSITIONS,
    max_target_positions=LENGTH,
    pad_token_id=EOS,
    bos_token_id=EOS,
    eos_token_id=EOS,
    decoder_start_token_id=START,
    dtype="float32",
    begin_suppress_tokens=[7, EOS],
)
GENERATION = dict(
    eos_token_id=EOS,
    pad_token_id=EOS,
    decoder_start_token_id=START,
    suppress_tokens=[5, 6, START, PREVIOUS, NO_SPEECH],
    begin_suppress_tokens=[7, EOS],
    no_timestamps_token_id=NO_TIMESTAMPS,
    max_initial_timestamp_index=20,
    lang_to_id={"<|en|>": ENGLISH, "<|de|>": GERMAN},
    task_to_id={"translate": TRANSLATE, "transcribe": TRANSCRIBE},
    is_multilingual=True,
    max_length=LENGTH,
    prev_sot_token_id=PREVIOUS,
    return_timestamps=False,
)
EXTRACTOR = dict(
    feature_extractor_type="WhisperFeatureExtractor",
    feature_size=BINS,
    chunk_length=1,
    sampling_rate=RATE,
    hop_length=160,
    n_fft=400,
    padding_side="right",
    padding_value=0.0,
    return_attention_mask=False,
)


def noise(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Return random values of a tensor, scaled for activations of order one; no bias or norm is neutral."""
    values = generator.standard_normal(shape, np.float32)
    if name.endswith("norm.weight"):
        return 1 + 0.4 * values
    if name.endswith("bias"):
        return 0.5 * values
    if "embed" in name:  # tied with the head: a larger token embedding would make every token predict itself
        return (0.2 if "tokens" in name else 1.5) * values
    scale = 3.0 if "fc2" in name or "encoder_attn" in name else 1.5
    return scale * np.float32(np.prod(shape[1:]) ** -0.5) * values


def write(folder: Path, generation: Mapping[str, Any] | None = None, *, seed: int = 0, **changes: Any) -> Path:
    """Write a checkpoint of random weights with its other files."""
    folder.mkdir(parents=True, exist_ok=True)
    hf, generator = CONFIG | changes, np.random.default_rng(seed)
    made = {name: noise(name, value.shape, generator) for name, value in sorted(checkpoint.tensors(hf).items())}
    save_file(made, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf))
    return add_files(folder, generation)


def add_files(folder: Path, generation: Mapping[str, Any] | None = None) -> Path:
    """Write the files of a checkpoint other than weights and config.json."""
    (folder / "generation_config.json").write_text(json.dumps(GENERATION if generation is None else generation))
    (folder / "preprocessor_config.json").write_text(json.dumps(EXTRACTOR))
    return folder


SPECIAL = (
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|en|>",
    "<|de|>",
    "<|translate|>",
    "<|transcribe|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
)
"""Texts of the special tokens `EOS`, `START`, ..."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of `support.checkpoint` with Whisper's tokens; as in real checkpoints, timestamp tokens are
    not special."""
    made = checkpoint.tokenizer()
    made.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    made.add_tokens([f"<|{step / POSITIONS:.2f}|>" for step in range(POSITIONS + 1)])
    made.eos_token = SPECIAL[0]
    return made


def write_folder(folder: Path, seed: int = 0) -> Path:
    """Write a checkpoint with a tokenizer whose special-token ids differ from the constants of this module."""
    made = tokenizer()
    ids = dict(
        zip(
            (EOS, START, ENGLISH, GERMAN, TRANSLATE, TRANSCRIBE, PREVIOUS, NO_SPEECH, NO_TIMESTAMPS),
            made.convert_tokens_to_ids(list(SPECIAL)),
            strict=True,
        )
    )

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: moved(one) for name, one in value.items()}
        if isinstance(value, list):
            return [moved(one) for one in value]
        return ids.get(value, value) if type(value) is int else value

    named = {name: moved(value) for name, value in CONFIG.items() if name.endswith(("token_id", "tokens"))}
    generation = {name: value if name.startswith("max_") else moved(value) for name, value in GENERATION.items()}
    write(folder, generation, seed=seed, **named | {"vocab_size": len(made)})
    made.save_pretrained(folder)
    return folder


def sound(seconds: float = 0.6, seed: int = 0, rate: int = RATE) -> np.ndarray:
    """Return float32 audio of a few tones and noise."""
    generator, at = np.random.default_rng(seed), np.arange(int(seconds * rate)) / rate
    tones = [np.sin(2 * np.pi * hertz * at) for hertz in generator.uniform(100, 4000, 4)]
    return (0.2 * np.sum(tones, axis=0) + 0.05 * generator.standard_normal(len(at))).astype(np.float32)


def features(count: int, seed: int = 0) -> np.ndarray:
    """Return log-mel features of `count` windows, `[count, BINS, FRAMES]`."""
    return np.random.default_rng(seed).uniform(-1, 1.5, (count, BINS, FRAMES)).astype(np.float32)
