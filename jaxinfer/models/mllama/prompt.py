"""Llama 3.2 Vision prompts: text with images, and the images visible to each token."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxinfer._utils.checks import describe, plural
from jaxinfer.errors import CheckpointError
from jaxinfer.media import EncoderInput, ImageFormat, ImageProcessor
from jaxinfer.media.cross import CrossPrompt, ParsedPrompt, PromptForms, ReaderSources
from jaxinfer.media.images import as_rgb, as_values
from jaxinfer.media.inputs import CrossInputs

IMAGES = ImageFormat(placeholder="<|image|>", aliases=("<image>",))
"""One token per image, however many tiles it has."""
IMAGE, PIXELS, CANVASES = "image", "pixel_values", "aspect_ratio_ids"


class MllamaReader:
    """Read prompts with `"multi_modal_data": {"image": one or a list of images}`.

    The text has one `<|image|>` per image.

    Or, preprocessed by transformers' processor, `{"pixel_values": [images, tiles, C, height, width],
    "aspect_ratio_ids": [images]}`.
    """

    forms = PromptForms(media=True)

    def __init__(self, sources: ReaderSources):
        self._config, self.source = sources.config, sources.config.cross
        self.modality, self.marker = self.source.modality, IMAGES.placeholder
        directory = sources.directory
        self._processor = (
            None if directory is None else ImageProcessor(IMAGES, directory, sources.hf, self.source.shape[1:])
        )

    def read(self, prompt: ParsedPrompt, index: int, encode: Callable[[str, bool], list[int]]) -> CrossPrompt:
        """Read one prompt.

        Raises:
            TypeError, ValueError: an image is not supported, or the numbers of images and of image tokens differ.
        """
        images = self._images(dict(prompt.media or {}), index)
        ids = list(prompt.token_ids or ())
        if prompt.token_ids is None:
            ids = encode(self._marked(prompt.text, bool(images)), prompt.special_tokens)
        places = np.flatnonzero(np.asarray(ids, np.int64) == self._config.image_token).tolist()
        if len(places) != len(images):
            raise ValueError(
                f"prompt {index} has {plural(len(places), 'image token')} ({self.marker}, id "
                f"{self._config.image_token}) for "
                f"{plural(len(images), 'image')}; put one where each image belongs, and pass each image in "
                f"multi_modal_data={{{IMAGE!r}: ...}}."
            )
        if not images:
            return CrossPrompt(ids, None)
        return CrossPrompt(ids, CrossInputs(images, ranges(places, [one.length for one in images])))

    def _marked(self, text: str, images: bool) -> str:
        """Replace aliases of the image token in the text."""
        for alias in IMAGES.aliases if images else ():
            text = text.replace(alias, self.marker)
        return text

    def _images(self, given: Mapping[str, Any], index: int) -> tuple[EncoderInput, ...]:
        for key in given:
            if key not in (IMAGE, PIXELS, CANVASES):
                raise ValueError(
                    f"prompt {index}: multi_modal_data has {describe(key)}; this model takes {IMAGE!r}, or "
                    f"preprocessed {PIXELS!r} and {CANVASES!r}."
                )
        if IMAGE in given and len(given) > 1:
            raise ValueError(f"prompt {index}: multi_modal_data has both {IMAGE!r} and {PIXELS!r}; pass one of them.")
        if IMAGE in given:
            value = given[IMAGE]
            several = value if isinstance(value, (list, tuple)) else [value]
            return tuple(self._processed(one, f"prompt {index}, image {at}") for at, one in enumerate(several))
        return self._preprocessed(given, index) if given else ()

    def _processed(self, image: Any, where: str) -> EncoderInput:
        rgb = as_rgb(image, where)
        if self._processor is None:
            raise ValueError(
                f"{where}: there is no checkpoint with an image processor; pass {PIXELS!r} and {CANVASES!r}."
            )
        try:
            out = self._processor.outputs(rgb)
        except (CheckpointError, ImportError):
            raise
        except Exception as error:  # any error of transformers or Pillow
            raise ValueError(
                f"{where} of {rgb.shape[0]} x {rgb.shape[1]} pixels cannot be preprocessed: {type(error).__name__}: "
                f"{error}."
            ) from error
        tiles, canvas = np.asarray(out[PIXELS], np.float32), np.asarray(out[CANVASES]).ravel()
        vision = self._config.vision
        if tiles.shape[2:] != self.source.shape or not 1 <= canvas[0] <= len(vision.ratios):
            raise CheckpointError(
                f"the image processor returns tiles of shape {list(tiles.shape[2:])} on canvas {canvas[0]}, but the "
                f"model takes {list(self.source.shape)} and has {len(vision.ratios)} canvases; "
                "preprocessor_config.json and config.json do not match"
            )
        return self._input(tiles[0, 0], int(canvas[0]))

    def _preprocessed(self, given: Mapping[str, Any], index: int) -> tuple[EncoderInput, ...]:
        if PIXELS not in given or CANVASES not in given:
            raise ValueError(
                f"prompt {index}: multi_modal_data must have {PIXELS!r} and {CANVASES!r} together, as the model's "
                "processor makes them."
            )
        tiles = as_values(given[PIXELS], self.source.shape, f"prompt {index}: {PIXELS}")
        canvases, most = np.asarray(given[CANVASES]), len(self._config.vision.ratios)
        if canvases.shape != tiles.shape[:1] or canvases.dtype.kind not in "iu":
            raise ValueError(
                f"prompt {index}: {CANVASES} must be {len(tiles)} integers, one an image, got "
                f"{canvases.dtype} of shape {list(canvases.shape)}."
            )
        if canvases.min() < 1 or canvases.max() > most:
            raise ValueError(
                f"prompt {index}: {CANVASES} has values from {canvases.min()} to {canvases.max()}; this model has "
                f"canvases 1 to {most}."
            )
        return tuple(self._input(one, int(canvas)) for one, canvas in zip(tiles, canvases, strict=True))

    def _input(self, tiles: np.ndarray, canvas: int) -> EncoderInput:
        """Return an encoder input with only the rows of the image's own tiles."""
        kept = self._config.vision.tiles_of(canvas) * self._config.vision.patches
        return EncoderInput(self.modality, tiles[None], self.source.rows, kept, np.array([[canvas]], np.int32))


def ranges(places: Sequence[int], lengths: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """Return `CrossInputs.ranges`: each image token sees the images of its run of image tokens, up to its own."""
    made, first, end = [], 0, 0
    for at, (place, length) in enumerate(zip(places, lengths, strict=True)):
        if at and place > places[at - 1] + 1:
            first = end
        end += length
        made.append((place, first, end))
    return tuple(made)
