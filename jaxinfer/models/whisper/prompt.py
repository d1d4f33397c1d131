"""Whisper prompts: an audio window, its language, the task, and whether to predict timestamps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxinfer._utils.checks import describe
from jaxinfer.media.audio import Audio, as_audio, as_features
from jaxinfer.media.cross import CrossPrompt, ParsedPrompt, PromptForms, ReaderSources
from jaxinfer.media.extractor import AudioProcessor
from jaxinfer.media.inputs import CrossInputs, EncoderInput
from jaxinfer.models.whisper.tokens import RuleFlags, WhisperTokens

TASKS = ("transcribe", "translate")
AUDIO, FEATURES = "audio", "input_features"


class WhisperReader:
    """Build decoder prompts and encoder inputs from user prompts.

    A prompt is a dict with `"multi_modal_data": {"audio": (array, sampling_rate)}`, or `{"input_features": array}` of
    one preprocessed window, and optionally

    - `"language"`: its code ("en"), name ("english") or token; by default it is detected;
    - `"task"`: "transcribe", the default, or "translate" (into English);
    - `"timestamps"`: whether to predict timestamps; False by default.

    Defaults come from generation_config.json if it has any. With `"prompt"` or `"prompt_token_ids"` the decoder starts
    with exactly that.
    """

    forms = PromptForms(media=True, promptless=True, options=("language", "task", "timestamps"))
    marker: str | None = None
    """Marker of audio in a text: none."""

    def __init__(self, sources: ReaderSources):
        self.source = sources.config.cross
        self.modality = self.source.modality
        self._rule: WhisperTokens | None = sources.config.rule
        self._defaults = sources.generation
        self._forced = sources.generation.get("forced_decoder_ids", sources.hf.get("forced_decoder_ids")) or ()
        directory = sources.directory
        self.processor = None if directory is None else AudioProcessor(directory, self.source.shape)

    def read(self, prompt: ParsedPrompt, index: int, encode: Callable[[str, bool], list[int]]) -> CrossPrompt:
        """Read one prompt.

        Raises:
            TypeError, ValueError: the audio, language or task is not supported; names the prompt.
        """
        cross = CrossInputs((self._input(prompt.media, index),))
        options = prompt.options
        if prompt.token_ids is None and prompt.text is None:
            ids, flags = self._begin(options, index)
            extra = 0 if self._rule is None else self._rule.forced(flags)
            return CrossPrompt(ids, cross, rule=int(flags), extra_tokens=extra)
        for name in options:
            raise ValueError(
                f"prompt {index}: {name!r} cannot be combined with 'prompt' or 'prompt_token_ids', whose tokens "
                "determine it; remove one of them."
            )
        ids = list(prompt.token_ids) if prompt.token_ids is not None else encode(prompt.text, False)
        if self._rule is None:
            return CrossPrompt(ids, cross)
        timed = self._rule.no_timestamps is not None and self._rule.no_timestamps not in ids
        return CrossPrompt(ids, cross, rule=int(RuleFlags.TEXT | (RuleFlags.TIMESTAMPS if timed else 0)))

    @property
    def transcribes(self) -> bool:
        """Whether the model predicts timestamps, as needed by `models.whisper.transcription`."""
        return self._rule is not None and self._rule.no_timestamps is not None

    @property
    def window(self) -> int:
        """Number of frames in a window."""
        return self.source.shape[1]

    @property
    def stride(self) -> int:
        """Number of frames per timestamp step, which is one encoder position."""
        return self.window // self.source.rows

    @property
    def zero(self) -> int:
        """Token id of timestamp 0.00."""
        return self._rule.first_timestamp

    @property
    def frame_seconds(self) -> float:
        """Duration of a frame in seconds."""
        return self.processor.frame_seconds

    def parse_output(self, prompt: Sequence[int], made: Sequence[int], flags: int) -> tuple[str | None, list[int]]:
        """Return the language and the output tokens of a window, without forced tokens and EOS."""
        skipped = self._rule.forced(flags)
        languages = map(self._rule.language, [*prompt, *made[:skipped]])
        return next(filter(None, languages), None), [token for token in made[skipped:] if token != self._rule.eos]

    def extract(self, audio: Audio) -> np.ndarray:
        """Compute the features of audio of any length (`AudioProcessor.extract`)."""
        return self.processor.extract(audio)

    def frames(self, audio: Audio) -> int:
        """Return the number of feature frames that are audio (`AudioProcessor.frames`)."""
        return self.processor.frames(audio)

    def audio(self, value: Any, where: str) -> Audio:
        """Check audio of any length; requires a feature extractor."""
        audio = as_audio(value, where)
        if self.processor is None:
            raise ValueError(f"{where}: there is no checkpoint with a feature extractor; pass {FEATURES!r}.")
        return audio

    def _input(self, media: Mapping[str, Any] | None, index: int) -> EncoderInput:
        given, where = dict(media or {}), f"prompt {index}, audio"
        for key in given:
            if key not in (AUDIO, FEATURES):
                raise ValueError(
                    f"prompt {index}: multi_modal_data has {describe(key)}; this model takes {AUDIO!r}, or "
                    f"preprocessed {FEATURES!r}."
                )
        if not given:
            raise ValueError(
                f"prompt {index} has no audio, which this model requires; pass "
                f"{{'multi_modal_data': {{{AUDIO!r}: (array, sampling_rate)}}}}, or {FEATURES!r}."
            )
        if len(given) != 1:
            raise ValueError(f"prompt {index}: multi_modal_data has both {AUDIO!r} and {FEATURES!r}; pass one of them.")
        [(key, value)] = given.items()
        if isinstance(value, list):
            if len(value) != 1:
                raise ValueError(f"{where}: got a list of {len(value)}; a prompt takes exactly one.")
            value = value[0]
        if key == FEATURES:
            features = as_features(value, self.source.shape, f"prompt {index}: {FEATURES}")
        else:
            features = self.processor.window(self.audio(value, where), where)
        return EncoderInput(self.modality, features[None], self.source.rows)

    def _begin(self, options: Mapping[str, Any], index: int) -> tuple[list[int], RuleFlags]:
        """Return the decoder's first tokens and the rule for the following ones."""
        rule = self._rule
        if rule is None:
            raise ValueError(
                f"prompt {index}: neither generation_config.json nor config.json names the start token; pass "
                "prompt_token_ids."
            )
        timed = options.get("timestamps", self._defaults.get("return_timestamps") or False)
        if not isinstance(timed, bool):
            raise TypeError(f"prompt {index}: 'timestamps' must be True or False, got {describe(timed)}.")
        if timed and rule.no_timestamps is None:
            raise ValueError(
                f"prompt {index}: this model has no timestamps: generation_config.json has no no_timestamps_token_id."
            )
        flags = RuleFlags.TEXT | (RuleFlags.TIMESTAMPS if timed else 0)
        language, task = self._language(options, index), self._task(options, index)
        if rule.languages and language is None:
            return [rule.start], flags | RuleFlags.DETECT | (RuleFlags.TRANSLATE if task == "translate" else 0)
        ids = [rule.start]
        if rule.languages:
            ids += [language, *([dict(rule.tasks)[task]] if rule.tasks else [])]
        return ids + ([] if timed or rule.no_timestamps is None else [rule.no_timestamps]), flags

    def _language(self, options: Mapping[str, Any], index: int) -> int | None:
        """Return the language token; None to detect it, or for English-only models."""
        rule, given = self._rule, options.get("language")
        if given is None and "task" not in options and not self._defaults.get("task"):
            # Old generation_config.json files have this in place of language and task.
            forced = next((token for place, token in self._forced if place == 1), None)
            if forced in dict(rule.languages).values():
                return forced
        given = self._defaults.get("language") if given is None else given
        if given is None:
            return None
        if not isinstance(given, str):
            raise TypeError(f"prompt {index}: 'language' must be a string, got {describe(given)}.")
        if not rule.languages:
            raise ValueError(
                f"prompt {index}: 'language' is {given!r}, but this model supports English only; remove it."
            )
        name, known = given.lower(), dict(rule.languages)
        for token in (name, f"<|{name}|>", f"<|{_codes().get(name)}|>"):
            if token in known:
                return known[token]
        codes = ", ".join(sorted(token.strip("<|>") for token in known))
        raise ValueError(
            f"prompt {index}: 'language' is {given[:50]!r}, which this model does not support; supported: {codes}."
        )

    def _task(self, options: Mapping[str, Any], index: int) -> str:
        rule, given = self._rule, options.get("task")
        if given is not None and given not in TASKS:
            raise ValueError(f"prompt {index}: 'task' is {describe(given)}; it must be 'transcribe' or 'translate'.")
        if given is not None and not rule.tasks:
            raise ValueError(
                f"prompt {index}: 'task' is {given!r}, but this model only transcribes English; remove it."
            )
        forced = next((token for place, token in self._forced if place == 2), None)
        known = {token: name for name, token in rule.tasks}
        return given or self._defaults.get("task") or known.get(forced, "transcribe")


def _codes() -> Mapping[str, str]:
    """Return transformers' table of language names to codes."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    return TO_LANGUAGE_CODE
