"""Transcription of audio of any length, window by window, with segment timestamps.

It is the sequential algorithm of Whisper (arXiv:2212.04356, section 3.8), as transformers runs it for long audio: each
window begins where the last complete segment of the previous one ended. Windows are not decoded again at a higher
temperature, silent ones are not skipped, and none is conditioned on the previous text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from jaxinfer._utils.checks import describe
from jaxinfer.checkpoint.tokenizer_errors import as_checkpoint_error
from jaxinfer.outputs import RequestOutput
from jaxinfer.sampling_params import SamplingParams


@dataclass(frozen=True)
class Segment:
    """A segment of the transcript."""

    start: float
    """Start, in seconds from the beginning of the audio; likewise `end`."""
    end: float
    text: str
    """Text of the segment; empty without a tokenizer."""
    token_ids: Sequence[int]
    """Token ids, timestamps included."""


@dataclass(frozen=True)
class Transcript:
    """Result of `LLM.transcribe` for one audio."""

    text: str
    """The whole text."""
    segments: Sequence[Segment]
    """Segments of the text with their times."""
    language: str | None
    """Language code ("en"), as requested or detected; None if the model has a single language."""
    duration: float
    """Duration of the audio in seconds."""
    finish_reason: str
    """"stop"; "length" if a window reached its token limit; "error" if one failed, which ends the transcript."""


class Piece(NamedTuple):
    """A segment in the units of its window."""

    start: int
    """Start in timestamp steps; likewise `end`."""
    end: int
    tokens: list[int]


def cut(tokens: Sequence[int], zero: int, frames: int, stride: int) -> tuple[list[Piece], int]:
    """Split a window's tokens into segments; also return by how many frames to advance to the next window.

    Two adjacent timestamps end a segment and begin the next. Text after the last such pair is unfinished and belongs to
    the next window, unless the tokens end with a single timestamp: then the window contains no more speech.

    Args:
        tokens: tokens of the window, without EOS.
        zero: token id of timestamp 0.00.
        frames: number of frames of the window, without padding.
        stride: number of frames per timestamp step.
    """
    stamps = [token >= zero for token in tokens]
    pairs = [at + 1 for at in range(len(tokens) - 1) if stamps[at] and stamps[at + 1]]
    if not pairs:
        last = next((token - zero for token in reversed(tokens) if token >= zero), 0)
        return [Piece(0, last or frames // stride, list(tokens))], frames
    single = stamps[-2:] == [False, True]
    # The second timestamp of the last pair stays in the segment, so that its tokens do not end with a single timestamp.
    ends = [*pairs, len(tokens)] if single else [*pairs[:-1], pairs[-1] + 1]
    pieces = []
    for first, end in zip([0, *ends], ends):
        closing = tokens[end - 1] if single or end != ends[-1] else tokens[end - 2]
        pieces.append(Piece(tokens[first] - zero, closing - zero, list(tokens[first:end])))
    on = frames if single else pieces[-1].end * stride
    return pieces, on if 0 < on <= frames else frames


@dataclass(eq=False)
class Transcribing:
    """State of the transcription of one audio."""

    reader: Any
    """Reader of the model's prompts (`models.whisper.prompt.WhisperReader`)."""
    features: np.ndarray
    """Features of the whole audio, `[mel bins, frames]`."""
    frames: int
    """Number of frames that are audio, without padding."""
    options: dict[str, Any]
    """Options of each window beside its features: language, task."""
    seek: int = 0
    """Frame at which the next window begins."""
    pieces: list[tuple[float, Piece]] = field(default_factory=list)
    """Segments with the start time of their window in seconds."""
    language: str | None = None
    """Language, known after the first window."""
    finish_reason: str = "stop"

    @property
    def left(self) -> bool:
        """Whether there is another window."""
        return self.seek < self.frames and self.finish_reason != "error"

    @property
    def total(self) -> float:
        """Duration of the audio in seconds."""
        return self.frames * self.reader.frame_seconds

    @property
    def seconds(self) -> float:
        """Seconds of audio processed so far."""
        return min(self.seek * self.reader.frame_seconds, self.total)

    def prompt(self) -> dict[str, Any]:
        """Return the prompt of the next window for `LLM.generate`, padded with zeros beyond the audio's end."""
        size = self.reader.window
        own = self.features[:, self.seek : self.seek + size]
        own = np.pad(own, ((0, 0), (0, size - own.shape[1])))
        return {"multi_modal_data": {"input_features": own}, "timestamps": True, **self.options}

    def take(self, output: RequestOutput, rule: int) -> None:
        """Add the output of a window; `rule` is its rule parameter (`Request.rule`)."""
        [made] = output.outputs
        if made.finish_reason in ("error", "abort"):
            self.finish_reason = "error"
            return
        if made.finish_reason == "length":
            self.finish_reason = "length"
        self.language, tokens = self.reader.parse_output(output.prompt_token_ids, made.token_ids, rule)
        if self.language is not None:
            self.options["language"] = self.language
        frames = min(self.reader.window, self.frames - self.seek)
        pieces, on = cut(tokens, self.reader.zero, frames, self.reader.stride)
        self.pieces += [(self.seek * self.reader.frame_seconds, piece) for piece in pieces if piece.tokens]
        self.seek += on

    def transcript(self, tokenizer: Any) -> Transcript:
        """Return the transcript so far."""
        step = self.reader.stride * self.reader.frame_seconds
        segments = [
            Segment(
                offset + piece.start * step,
                offset + piece.end * step,
                self._text(piece.tokens, tokenizer),
                piece.tokens,
            )
            for offset, piece in self.pieces
        ]
        text = self._text([token for _, piece in self.pieces for token in piece.tokens], tokenizer)
        return Transcript(text, segments, self.language, self.total, self.finish_reason)

    def _text(self, tokens: Sequence[int], tokenizer: Any) -> str:
        if tokenizer is None:
            return ""
        with as_checkpoint_error("the tokenizer cannot decode a transcript"):
            return tokenizer.decode([token for token in tokens if token < self.reader.zero], skip_special_tokens=True)


def begin(reader: Any, audio: Any, params: Any, options: Mapping[str, Any]) -> list[Transcribing]:
    """Create a transcription per audio, after checking all of them.

    Args:
        reader: reader of the model's prompts.
        audio: `(array, sampling_rate)`, or a list of them.
        params: sampling parameters of every window.
        options: options of every window: language, task.

    Raises:
        TypeError, ValueError: the audio is invalid, or the model does not transcribe.
    """
    if not getattr(reader, "transcribes", False):
        raise ValueError("this model does not transcribe audio with timestamps; use generate")
    if not isinstance(params, SamplingParams):
        raise TypeError(f"sampling_params must be one SamplingParams, got {describe(params)}.")
    if params.n > 1:
        raise ValueError(
            f"n must be 1 for transcription, got {params.n}: each window begins where the previous one ended."
        )
    several = audio if isinstance(audio, list) else [audio]
    recordings = [reader.audio(one, f"audio {index}") for index, one in enumerate(several)]
    return [Transcribing(reader, reader.extract(one), reader.frames(one), dict(options)) for one in recordings]
