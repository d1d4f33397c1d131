"""Reader of a prompt's `multi_modal_data`: preprocesses images and places them among the prompt's tokens."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxinfer._utils.checks import describe, plural
from jaxinfer.errors import CheckpointError
from jaxinfer.media.images import as_rgb, as_values
from jaxinfer.media.inputs import EncoderInput, Features, PlacedInputs
from jaxinfer.media.processor import ImageFormat, ImageProcessor
from jaxinfer.media.rope_positions import with_grids

PREPROCESSED = "pixel_values"


class MediaReader:
    """Reads the images of prompts for one model.

    Args:
        features: the model's `config.features`.
        tokenizer: transformers tokenizer, or None.
        form: image format of the model's family; None if only tokens and pixel values are accepted.
        processor: image processor; None if only pixel values are accepted.
    """

    def __init__(
        self,
        features: Features,
        tokenizer: Any = None,
        form: ImageFormat | None = None,
        processor: ImageProcessor | None = None,
    ):
        self.features, self.form, self._processor = features, form, processor
        known = {} if tokenizer is None or form is None else tokenizer.get_vocab()
        self.placeholder = (
            known.get(form.placeholder, -1) if features.placeholder < 0 and form else features.placeholder
        )

    @property
    def marker(self) -> str | None:
        """Text of an image in a chat whose template does not handle images."""
        return None if self.form is None else self.form.chat or self.form.placeholder

    def read(self, data: Mapping[str, Any] | None, index: int) -> tuple[EncoderInput, ...]:
        """Validate and preprocess the images of prompt number `index`.

        Raises:
            TypeError, ValueError: an input is not an image that the model supports; names prompt and image.
        """
        given, whole = data or {}, self.features.joint is not None
        keys = (self.features.modality, *(() if whole else (PREPROCESSED,)))
        for key in given:
            if key not in keys:
                also = "" if whole else f", or preprocessed {PREPROCESSED!r}"
                raise ValueError(
                    f"prompt {index}: multi_modal_data has {describe(key)}; this model takes {keys[0]!r}{also}."
                )
        if len(given) > 1:
            raise ValueError(
                f"prompt {index}: multi_modal_data has both {keys[0]!r} and {keys[1]!r}; pass one of them."
            )
        for key, value in given.items():
            several = value if isinstance(value, (list, tuple)) else [value]
            return tuple(self._input(one, key, f"prompt {index}, image {at}") for at, one in enumerate(several))
        return ()

    def _input(self, value: Any, key: str, where: str) -> EncoderInput:
        features = self.features
        if key == PREPROCESSED:
            return EncoderInput(
                features.modality, as_values(value, features.shape, f"{where}: pixel_values"), features.rows
            )
        rgb = as_rgb(value, where)
        if self._processor is None:
            instead = f"pass {PREPROCESSED!r}" if features.joint is None else "load the model from its checkpoint"
            raise ValueError(f"{where}: there is no checkpoint with an image processor; {instead}.")
        try:
            values, numbers = self._processor(rgb)
        except (CheckpointError, ImportError):
            raise
        except Exception as error:  # any error of transformers or Pillow
            raise ValueError(
                f"{where} of {rgb.shape[0]} x {rgb.shape[1]} pixels cannot be preprocessed: {type(error).__name__}: "
                f"{error}."
            ) from error
        return EncoderInput(features.modality, values, features.rows, numbers=numbers)

    def expand(self, text: str, inputs: Sequence[EncoderInput], index: int) -> str:
        """Replace each image marker of a text by as many placeholders as the image has rows.

        Raises:
            ValueError: the numbers of markers and of images differ.
        """
        if not inputs or self.form is None:
            return text
        form, names = self.form, (self.form.placeholder, *self.form.aliases)
        parts = re.split("|".join(map(re.escape, names)), text)
        if len(parts) - 1 != len(inputs):
            raise ValueError(
                f"prompt {index}: the text has {plural(len(parts) - 1, 'image marker')} ({' or '.join(names)}) "
                f"for {plural(len(inputs), 'image')}; put one where each image belongs."
            )
        made = [form.before + form.placeholder * one.length + form.after for one in inputs]
        return "".join(piece for pair in zip(parts, [*made, ""], strict=True) for piece in pair)

    def place(self, token_ids: Sequence[int], inputs: tuple[EncoderInput, ...], index: int) -> PlacedInputs | None:
        """Return the positions of the images' rows among the tokens; None if there are no images.

        Raises:
            ValueError: the number of image tokens differs from the images' rows.
        """
        if self.placeholder < 0 and not inputs:
            return None
        if self.placeholder < 0:
            raise ValueError(
                f"prompt {index}: neither config.json nor the tokenizer names the image token; pass tokenizer= with "
                "that token."
            )
        places = np.flatnonzero(np.asarray(token_ids, np.int64) == self.placeholder)
        wanted = sum(one.length for one in inputs)
        if len(places) == wanted:
            return self._placed(inputs, places, index) if inputs else None
        found = f"prompt {index} has {plural(len(places), 'image token')} (id {self.placeholder})"
        if not inputs:
            raise ValueError(
                f"{found}, but no image is given; pass multi_modal_data={{{self.features.modality!r}: ...}}."
            )
        tiles = " + ".join(str(one.count) for one in inputs)
        each = f"tiles x {self.features.rows} tokens" if self.features.joint is None else "tokens"
        raise ValueError(
            f"{found}, but {plural(len(inputs), 'image')} of {tiles} {each} need {wanted}; prompt_token_ids must "
            "contain them all."
        )

    def _placed(self, inputs: tuple[EncoderInput, ...], places: np.ndarray, index: int) -> PlacedInputs:
        """Return the inputs at their places, with rope's positions if the model has positions of its own."""
        placed = PlacedInputs(inputs, places)
        if not self.features.rope_axes:
            return placed
        for at, (one, own) in enumerate(placed.spans()):
            if own[-1] - own[0] != one.length - 1:
                raise ValueError(
                    f"prompt {index}: other tokens stand between the {one.length} image tokens (id {self.placeholder}) "
                    f"of image {at}; put them next to each other, as their positions are those of a grid."
                )
        return PlacedInputs(inputs, places, with_grids([(own, one.numbers) for one, own in placed.spans()]))
