"""Images of Qwen3-VL: the marker in prompts, and the processor's patches as values of whole images."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxinfer.errors import CheckpointError
from jaxinfer.media import ImageFormat


def units(processor: Any, outputs: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return an image's values `[n, merged, C, P, P]` and their places in its grid, `[n, 4]` (`media.inputs.Joint`).

    The processor's patches come in the order of values, each `C * frames * P * P`; the frames of an image are equal.

    Raises:
        CheckpointError: the processor's settings do not match the model.
    """
    merged, channels, patch, _ = shape
    patches, (frames, down, across) = np.asarray(outputs["pixel_values"]), np.asarray(outputs["image_grid_thw"])[0]
    merge = processor.merge_size
    if (merge**2, processor.patch_size, patches.shape[1] % (channels * patch**2), frames) != (merged, patch, 0, 1):
        raise CheckpointError(
            f"the image processor has patch_size {processor.patch_size}, merge_size {merge} and patches of "
            f"{patches.shape[1]} values, but the model takes patches of {patch} x {patch} x {channels}, {merged} of "
            "which become a token; preprocessor_config.json and config.json do not match"
        )
    values = patches.reshape(-1, merged, channels, patches.shape[1] // (channels * patch**2), patch, patch)[:, :, :, 0]
    rows, columns = int(down) // merge, int(across) // merge
    grid = np.stack(np.divmod(np.arange(rows * columns), columns), axis=1)
    sizes = np.broadcast_to(np.array([rows, columns]), grid.shape)
    return np.ascontiguousarray(values, np.float32), np.concatenate([grid, sizes], axis=1).astype(np.int32)


IMAGES = ImageFormat(placeholder="<|image_pad|>", chat="<|vision_start|><|image_pad|><|vision_end|>", units=units)
"""The model's chat template writes the marker between <|vision_start|> and <|vision_end|>."""
