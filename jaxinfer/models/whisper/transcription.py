"""Audio of any length, one window of time after the other: where each begins, and what its tokens say was said when.

The sequential algorithm of Whisper (arXiv:2212.04356, section 3.8), as transformers runs it for audio longer than a
window: each window begins where the last whole segment of the one before ended. No window is decoded again at a higher
temperature, none is left out as silent, and none reads the text of the one before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from jaxinfer._utils.checks import describe
from jaxinfer.outputs import RequestOutput
from jaxinfer.sampling_params import SamplingParams


@dataclass(frozen=True)
class Segment:
    """What was said from one time to another."""

    start: float
    """Seconds from the beginning of the audio."""
    end: float
    text: str
    """Empty where there is no tokenizer."""
    token_ids: Sequence[int]
    """Its tokens, timestamps among them."""


@dataclass(frozen=True)
class Transcript:
    """What `LLM.transcribe` gives of one audio."""

    text: str
    """All that was said."""
    segments: Sequence[Segment]
    """The same in parts, with their times."""
    language: str | None
    """Its code ("en"), as asked for or as detected; None: the model knows one only."""
    duration: float
    """Seconds of the audio."""
    finish_reason: str
    """"stop"; "length" where a window reached the limit of tokens; "error" where one failed, and nothing follows it."""


class Piece(NamedTuple):
    """A segment in the units of its window."""

    start: int
    """In timestamps."""
    end: int
    tokens: list[int]


def cut(tokens: Sequence[int], zero: int, frames: int, stride: int) -> tuple[list[Piece], int]:
    """What a window's tokens say, and how many frames on the next window begins.

    Two timestamps side by side end a segment and begin the next. What follows the last such pair is unfinished, and
    belongs into the next window, unless a single timestamp ends it: then nothing more is said in this one.

    Args:
        tokens: of the window, without the end token.
        zero: the token of 0.00 s.
        frames: of the window, without the silence behind it.
        stride: frames a timestamp counts.
    """
    stamps = [token >= zero for token in tokens]
    pairs = [at + 1 for at in range(len(tokens) - 1) if stamps[at] and stamps[at + 1]]
    if not pairs:
        last = next((token - zero for token in reversed(tokens) if token >= zero), 0)
        return [Piece(0, last or frames // stride, list(tokens))], frames
    single = stamps[-2:] == [False, True]
    # The second timestamp of the last pair stays with the segment, so that its tokens show that it is no single one.
    ends = [*pairs, len(tokens)] if single else [*pairs[:-1], pairs[-1] + 1]
    pieces = []
    for first, end in zip([0, *ends], ends):
        closing = tokens[end - 1] if single or end != ends[-1] else tokens[end - 2]
        pieces.append(Piece(tokens[first] - zero, closing - zero, list(tokens[first:end])))
    on = frames if single else pieces[-1].end * stride
    return pieces, on if 0 < on <= frames else frames


@dataclass(eq=False)
class Transcribing:
    """One audio on its way through the windows."""

    reader: Any
    """Of the model's prompts (`models.whisper_prompt.WhisperReader`)."""
    features: np.ndarray
    """`[mel bins, frames]` of all of it."""
    frames: int
    """Those of them that are audio, and no silence behind it."""
    options: dict[str, Any]
    """What each window is asked beside its features: language, task."""
    seek: int = 0
    """Frame at which the next window begins."""
    pieces: list[tuple[float, Piece]] = field(default_factory=list)
    """Each with the time at which its window begins, in seconds."""
    language: str | None = None
    """Known from the first window on."""
    finish_reason: str = "stop"

    @property
    def left(self) -> bool:
        """Whether there is another window."""
        return self.seek < self.frames and self.finish_reason != "error"

    @property
    def total(self) -> float:
        """Seconds of the audio."""
        return self.frames * self.reader.frame_seconds

    @property
    def seconds(self) -> float:
        """How far it is."""
        return min(self.seek * self.reader.frame_seconds, self.total)

    def prompt(self) -> dict[str, Any]:
        """The next window as `LLM.generate` takes it; what lies beyond the audio's end is zero."""
        size = self.reader.window
        own = self.features[:, self.seek : self.seek + size]
        own = np.pad(own, ((0, 0), (0, size - own.shape[1])))
        return {"multi_modal_data": {"input_features": own}, "timestamps": True, **self.options}

    def take(self, output: RequestOutput, rule: int) -> None:
        """What was made of that window; `rule`: what its tokens were to be (`Request.rule`)."""
        [made] = output.outputs
        if made.finish_reason in ("error", "abort"):
            self.finish_reason = "error"
            return
        if made.finish_reason == "length":
            self.finish_reason = "length"
        self.language, tokens = self.reader.said(output.prompt_token_ids, made.token_ids, rule)
        if self.language is not None:
            self.options["language"] = self.language
        frames = min(self.reader.window, self.frames - self.seek)
        pieces, on = cut(tokens, self.reader.zero, frames, self.reader.stride)
        self.pieces += [(self.seek * self.reader.frame_seconds, piece) for piece in pieces if piece.tokens]
        self.seek += on

    def transcript(self, tokenizer: Any) -> Transcript:
        """All that was said."""
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
        return tokenizer.decode([token for token in tokens if token < self.reader.zero], skip_special_tokens=True)


def begin(reader: Any, audio: Any, params: Any, options: Mapping[str, Any]) -> list[Transcribing]:
    """One an audio, all checked; `audio`: `(array, sampling_rate)` or a list of these.

    Raises:
        TypeError, ValueError: audio that cannot be taken, or a model that does not transcribe.
    """
    if not getattr(reader, "transcribes", False):
        raise ValueError("this model does not transcribe audio with timestamps; use generate")
    if not isinstance(params, SamplingParams):
        raise TypeError(f"sampling_params must be one SamplingParams, got {describe(params)}.")
    if params.n > 1:
        raise ValueError(f"n must be 1 to transcribe, got {params.n}: each window begins where the one before ended.")
    several = audio if isinstance(audio, list) else [audio]
    heard = [reader.audio(one, f"audio {index}") for index, one in enumerate(several)]
    return [Transcribing(reader, reader.whole(one), reader.frames(one), dict(options)) for one in heard]
