"""Image preprocessing with transformers' image processors, in their PIL versions."""

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
    """An image processor configured by config.json."""

    name: str
    """Class name in transformers, as in preprocessor_config.json."""
    settings: Mapping[str, Any]
    thumbnail: bool = True
    """Whether the last tile of an image with several tiles is its thumbnail."""


@dataclass(frozen=True)
class ImageFormat:
    """Image markers in prompts and preprocessing of images; declared with the family's model."""

    placeholder: str
    """Text of the placeholder token; in a prompt, one for each image."""
    before: str = ""
    after: str = ""
    """Text before and after the rows of an image."""
    chat: str | None = None
    """Text of an image in a chat whose template does not handle images; None for the placeholder."""
    aliases: tuple[str, ...] = ()
    """Alternatives for `placeholder` that users may write."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of each call of the checkpoint's image processor, as passed by the family's processor in transformers."""
    tiling: Callable[[Mapping[str, Any]], Tiling | None] = lambda hf: None
    """Return the image processor configured by config.json; None if the checkpoint has processor files."""
    units: Callable[[Any, Mapping[str, Any], tuple[int, ...]], tuple[np.ndarray, np.ndarray]] | None = None
    """Return the values `[n, *shape]` and the integers `[n, A]` of an image that is encoded whole (`Features.joint`),
    from its processor in transformers, the outputs of that and the values' shape; None for tiles.
    """


class ImageProcessor:
    """Image processor from RGB images to tiles. transformers and Pillow are imported for the first image.

    Args:
        form: image format of the family.
        directory: folder of the checkpoint.
        hf: its config.json.
        shape: shape of the model's tiles, `(C, height, width)`.
    """

    def __init__(self, form: ImageFormat, directory: Path, hf: Mapping[str, Any], shape: tuple[int, ...]):
        self._form, self._directory, self._shape = form, directory, shape
        self._tiling = form.tiling(hf)
        self._made: Any = None

    def __call__(self, rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Preprocess an image `[height, width, 3]` uint8 to values `[n, *shape]` float32, such as tiles.

        Returns:
            The values, and the integers `[n, A]` that come with them, None for tiles.

        Raises:
            CheckpointError: the processor's configuration is missing, unusable, or does not match the model.
            ImportError: Pillow or transformers' processor is missing; the message says what to install.
        """
        if self._form.units is not None:
            outputs = self.outputs(rgb)
            try:
                return self._form.units(self._made, outputs, self._shape)
            except CheckpointError as error:
                raise CheckpointError(f"{self._directory}: {error}") from error
        tiles = np.asarray(self.outputs(rgb)["pixel_values"], np.float32)
        if self._tiling is not None and not self._tiling.thumbnail and len(tiles) > 1:
            tiles = tiles[:-1]
        if tiles.shape[1:] != self._shape:
            raise CheckpointError(
                f"{self._directory}: the image processor returns tiles of shape {list(tiles.shape[1:])}, but the model "
                f"takes {list(self._shape)}; preprocessor_config.json and config.json do not match"
            )
        return tiles, None

    def outputs(self, rgb: np.ndarray) -> Mapping[str, Any]:
        """Run transformers' processor on an image `[height, width, 3]` uint8; raises as `__call__`."""
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
                f"{self._directory}: image_processor_type is {name!r}, which the installed transformers does not have; "
                f"upgrade it{self._instead}"
            )
        return cls(**settings)

    def _described(self) -> tuple[str, dict[str, Any]]:
        """Return class name and settings from config.json, processor_config.json or preprocessor_config.json."""
        if self._tiling is not None:
            return self._tiling.name, dict(self._tiling.settings)
        found = described(self._directory, "image_processor")
        if found is not None:
            return found
        raise CheckpointError(
            f"{self._directory} has no preprocessor_config.json or processor_config.json that names an image "
            f"processor; add the model's own{self._instead}"
        )

    @property
    def _instead(self) -> str:
        """What else an error can advise: families with tiles take preprocessed ones."""
        return "" if self._form.units else ", or pass multi_modal_data={'pixel_values': ...}"


def _find(name: str) -> Any:
    """Return transformers' PIL class, which needs no torch; older releases have it under the plain name."""
    if not name.endswith("ImageProcessor"):
        return None
    return from_transformers(f"{name}Pil") or from_transformers(name)
