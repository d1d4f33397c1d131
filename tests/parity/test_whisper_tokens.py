"""Whisper's token rule and segments against transformers' own code."""

from functools import partial

import jax
import numpy as np
import pytest
from support import whisper
from support.whisper import EOS, ZERO

pytest.importorskip("torch", reason="the reference of the parity tests; it comes with the extra `test`")

import torch
import transformers
from transformers.generation.logits_process import (
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    WhisperTimeStampLogitsProcessor,
)
from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

from jaxinfer.models.whisper.tokens import RuleFlags, WhisperTokens
from jaxinfer.models.whisper.transcription import cut

RULE = WhisperTokens.of(whisper.GENERATION, {})
BEGIN, LENGTH, VOCAB = 3, 16, ZERO + 51


@partial(jax.jit, static_argnums=0)
def allowed(rule: WhisperTokens, *arrays: jax.Array) -> jax.Array:
    return rule(*arrays)


def histories(seed: int, count: int) -> list[list[int]]:
    """Output tokens so far: text, and non-decreasing timestamps."""
    generator, made = np.random.default_rng(seed), []
    for _ in range(count):
        tokens, stamp = [], ZERO
        for _ in range(generator.integers(0, 9)):
            if generator.random() < 0.5:
                stamp = min(VOCAB - 1, stamp + int(generator.integers(0, 9)))
                tokens.append(stamp)
            else:
                tokens.append(int(generator.integers(8, EOS)))
        made.append(tokens)
    return made


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_the_token_rule_equals_transformers_processors(timed: bool, scale: float):
    settings = transformers.GenerationConfig(**whisper.GENERATION)
    lists = [
        SuppressTokensAtBeginLogitsProcessor(settings.begin_suppress_tokens, begin_index=BEGIN),
        SuppressTokensLogitsProcessor(settings.suppress_tokens),
    ]
    if timed:
        lists.append(WhisperTimeStampLogitsProcessor(settings, begin_index=BEGIN))
    made = histories(int(10 * scale), 150)
    logits = (scale * np.random.default_rng(1).standard_normal((len(made), VOCAB))).astype(np.float32)
    history = np.full((len(made), LENGTH), VOCAB - 1, np.int32)  # unknown positions must not be read
    position = np.array([BEGIN + len(tokens) for tokens in made], np.int32)
    for row, tokens in enumerate(made):
        history[row, : position[row]] = [*[whisper.START] * BEGIN, *tokens]
    says = np.full(len(made), RuleFlags.TEXT | (RuleFlags.TIMESTAMPS if timed else 0), np.int32)
    found = np.asarray(allowed(RULE, logits, history, position, np.full(len(made), BEGIN, np.int32), says))
    for row, tokens in enumerate(made):
        expected = torch.tensor(logits[row : row + 1])
        for one in lists:
            expected = one(torch.tensor([history[row, : position[row]].tolist()]), expected)
        np.testing.assert_array_equal(found[row], expected[0].numpy(), err_msg=str(tokens))
    forbidden = np.isinf(found).mean(axis=1)
    assert len(set(forbidden)) > (5 if timed else 1), "different histories forbid different tokens"


def test_rows_without_a_rule_are_left_as_they_are():
    logits = np.random.default_rng(0).standard_normal((1, VOCAB)).astype(np.float32)
    one = np.ones(1, np.int32)
    found = allowed(RULE, logits, np.zeros((1, LENGTH), np.int32), one, one, 0 * one)
    np.testing.assert_array_equal(found, logits)


@pytest.mark.parametrize(
    "says",
    [
        RuleFlags.DETECT,
        RuleFlags.DETECT | RuleFlags.TIMESTAMPS,
        RuleFlags.DETECT | RuleFlags.TRANSLATE,
        RuleFlags.DETECT | RuleFlags.TRANSLATE | RuleFlags.TIMESTAMPS,
    ],
)
def test_language_is_detected_and_following_tokens_are_forced(says: RuleFlags):
    """The most likely of the languages, even if other tokens are more likely; suppression applies after the forced
    tokens.
    """
    logits = np.random.default_rng(0).standard_normal((1, VOCAB)).astype(np.float32)
    logits[0, 20], logits[0, whisper.GERMAN], logits[0, 7] = 90, 50, 80
    tokens, position = [whisper.START], 1
    task = whisper.TRANSLATE if says & RuleFlags.TRANSLATE else whisper.TRANSCRIBE
    end = [] if says & RuleFlags.TIMESTAMPS else [whisper.NO_TIMESTAMPS]
    for expected in [whisper.GERMAN, task, *end]:
        history = np.zeros((1, LENGTH), np.int32)
        history[0, :position] = tokens
        found = allowed(RULE, logits, history, *(np.array([n], np.int32) for n in (position, 1, says | RuleFlags.TEXT)))
        assert np.flatnonzero(np.isfinite(found[0])).tolist() == [expected]
        tokens.append(expected)
        position += 1
    assert RULE.forced(says) == position - 1
    history[0, :position] = tokens
    found = allowed(RULE, logits, history, *(np.array([n], np.int32) for n in (position, 1, says | RuleFlags.TEXT)))
    left = np.isfinite(np.asarray(found)[0])
    assert left[ZERO : ZERO + 21].all() and not left[ZERO + 21 :].any() if end == [] else left[20] and not left[7]


def reference_segments(tokens: list[int], frames: int) -> tuple[list[tuple[int, int, list[int]]], int]:
    """transformers' `_retrieve_segment`, with times in timestamp steps."""
    segments, on = WhisperGenerationMixin._retrieve_segment(
        seek_sequence=torch.tensor(tokens),
        seek_outputs=[None],
        time_offset=torch.zeros(1),
        timestamp_begin=ZERO,
        seek_num_frames=torch.tensor([frames]),
        time_precision=1.0,
        time_precision_features=0.5,
        input_stride=2,
        prev_idx=0,
        idx=0,
        return_token_timestamps=False,
        decoder_input_ids=torch.zeros(1, 3),
    )
    return [(round(float(s["start"])), round(float(s["end"])), s["tokens"].tolist()) for s in segments], int(on)


@pytest.mark.parametrize(
    "tokens",
    [
        [ZERO, 1, 2, ZERO + 9],
        [ZERO, 1, 2, ZERO + 9, ZERO + 9],
        [ZERO, 1, ZERO + 9, ZERO + 9, 2, ZERO + 20],
        [ZERO, 1, ZERO + 9, ZERO + 9, 2, 3],
        [ZERO, 1, ZERO + 9, ZERO + 9, 2, ZERO + 20, ZERO + 20],
        [1, 2, 3],
        [ZERO, 1, 2],
        [ZERO + 4, 1, 2],
        [ZERO, 1, ZERO + 5, ZERO + 6, 2, ZERO + 20, ZERO + 30, 3],
        [ZERO],
        [ZERO + 3, ZERO + 3],
    ],
)
@pytest.mark.parametrize("frames", [100, 61])
def test_segments_are_those_of_transformers(tokens: list[int], frames: int):
    pieces, on = cut(tokens, ZERO, frames, 2)
    expected, seek = reference_segments(tokens, frames)
    assert [tuple(piece) for piece in pieces] == expected
    assert on == min(seek, frames), "the next window is at most at the end of the audio"
