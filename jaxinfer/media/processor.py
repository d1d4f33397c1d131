"""How a family's images become tiles: by transformers' own image processor, in its PIL version."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer._utils.transformers import from_transformers
from jaxinfer.errors import CheckpointError
from jaxinfer.media.preprocessor_config import described


@dataclass(frozen=True)
class Tiling:
    """An image processor that config.json describes."""

    name: str
    """Of transformers' class, as in preprocessor_config.json."""
    settings: Mapping[str, Any]
    thumbnail: bool = True
    """Whether an image of several tiles has its thumbnail as the last."""


@dataclass(frozen=True)
class ImageFormat:
    """How the prompts of a family name images, and its images become tiles: declared with the family's model."""

    placeholder: str
    """Text of the token whose places an image's rows take; in a prompt, once for each image."""
    before: str = ""
    after: str = ""
    """What stands around the rows of an image."""
    aliases: tuple[str, ...] = ()
    """What users may write for `placeholder`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of each call of the checkpoint's image processor, as the family's processor in transformers passes them."""
    tiling: Callable[[Mapping[str, Any]], Tiling | None] = lambda hf: None
    """What config.json itself says of images; None: the checkpoint has a processor's files."""


class ImageProcessor:
    """RGB images to tiles. transformers and Pillow are imported when the first image comes.

    Args:
        form: of the family.
        directory: of the checkpoint.
        hf: its config.json.
        shape: of the tiles that the model takes, `(C, height, width)`.
    """

    def __init__(self, form: ImageFormat, directory: Path, hf: Mapping[str, Any], shape: tuple[int, ...]):
        self._form, self._directory, self._shape = form, directory, shape
        self._tiling = form.tiling(hf)
        self._made: Any = None

    def __call__(self, rgb: np.ndarray) -> np.ndarray:
        """An image `[height, width, 3]` uint8 -> its tiles `[n, C, height, width]` float32.

        Raises:
            CheckpointError: no usable description of the processor, or one that is not for this model.
            ImportError: Pillow or transformers' processor is missing; says what to install.
        """
        tiles = np.asarray(self.outputs(rgb)["pixel_values"], np.float32)
        if self._tiling is not None and not self._tiling.thumbnail and len(tiles) > 1:
            tiles = tiles[:-1]
        if tiles.shape[1:] != self._shape:
            raise CheckpointError(
                f"{self._directory}: the image processor makes tiles of shape {list(tiles.shape[1:])}, but the model "
                "takes "
                f"{list(self._shape)}; preprocessor_config.json and config.json do not belong together"
            )
        return tiles

    def outputs(self, rgb: np.ndarray) -> Mapping[str, Any]:
        """All that transformers' processor makes of an image `[height, width, 3]` uint8; raises as a call."""
        if self._made is None:
            self._made = self._make()
        options = self._form.options if self._tiling is None else {}
        return self._made([rgb], return_tensors="np", input_data_format="channels_last", **options)

    def _make(self) -> Any:
        name, settings = self._described()
        try:
            importlib.import_module("PIL.Image")
        except ImportError as error:
            raise ImportError("images need Pillow: pip install 'jaxinfer[vision]' (or pip install pillow)") from error
        cls = _find(name.removesuffix("Fast"))
        if cls is None:
            raise CheckpointError(
                f"{self._directory}: image_processor_type is {name!r}, which this transformers does not have; install "
                "a "
                "newer one, or pass multi_modal_data={'pixel_values': ...}"
            )
        return cls(**settings)

    def _described(self) -> tuple[str, dict[str, Any]]:
        """The class and its settings: of config.json, processor_config.json or preprocessor_config.json."""
        if self._tiling is not None:
            return self._tiling.name, dict(self._tiling.settings)
        found = described(self._directory, "image_processor")
        if found is not None:
            return found
        raise CheckpointError(
            f"{self._directory} has no preprocessor_config.json or processor_config.json that names an image "
            "processor; add "
            "the model's own, or pass multi_modal_data={'pixel_values': ...}"
        )


def _find(name: str) -> Any:
    """transformers' class that needs no torch: the one in PIL, which older versions have under the plain name."""
    if not name.endswith("ImageProcessor"):
        return None
    return from_transformers(f"{name}Pil") or from_transformers(name)
