"""Image markers and tiling of InternVL, for both kinds of checkpoints.

Both divide an image into tiles of one size, their number by its aspect ratio, and add a thumbnail: "dynamic high
resolution" of InternVL 1.5 (arXiv:2404.16821). transformers' processor for it is GOT-OCR2's.
"""

from collections.abc import Mapping
from typing import Any

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.errors import ConfigError
from jaxinfer.media import ImageFormat, Tiling

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet, as used by the original code."""
BICUBIC = 3
"""Bicubic resampling in PIL."""
MOST_TILES = 4096


def tiling(hf: Mapping[str, Any]) -> Tiling | None:
    """Return an original checkpoint's tiling, from config.json as its code does; None for transformers' ones."""
    if hf.get("llm_config") is None:
        return None
    reader = ConfigReader(hf, "InternVLChatModel")
    if reader.get_bool("pad2square", False):
        raise ConfigError("config.json: pad2square is true, which is not supported; only tiling is (pad2square false)")
    vision = hf.get("vision_config") or {}
    side = reader.get_int("force_image_size", None) or ConfigReader(vision, "vision_config").get_int("image_size")
    least, most = reader.get_int("min_dynamic_patch", 1), reader.get_int("max_dynamic_patch", 12)
    dynamic = reader.get_bool("dynamic_image_size", True)
    settings = dict(
        size={"height": side, "width": side},
        crop_to_patches=dynamic,
        min_patches=min(least, MOST_TILES),
        max_patches=min(most, MOST_TILES),
        image_mean=MEAN,
        image_std=STD,
        resample=BICUBIC,
    )
    return Tiling("GotOcr2ImageProcessor", settings, thumbnail=reader.get_bool("use_thumbnail", True))


IMAGES = ImageFormat(
    placeholder="<IMG_CONTEXT>",
    before="<img>",
    after="</img>",
    aliases=("<image>",),
    tiling=tiling,
    options={"crop_to_patches": True},
)
"""Markers of the tokenizers; "<image>" is replaced by the original code."""
