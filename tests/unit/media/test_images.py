"""Images: accepted and refused values."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxinfer.media.images import MAX_PIXELS, MODES, as_rgb, as_values

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
GREY = RGB[..., 0]


def decoded(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def file(kind: str) -> bytes:
    target = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(target, kind)
    return target.getvalue()


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(RGB), RGB),
        (Image.fromarray(GREY), np.dstack([GREY] * 3)),
        (Image.fromarray(np.dstack([RGB, GREY])), RGB),
        (RGB, RGB),
        (jnp.asarray(RGB), RGB),
        (RGB.astype(np.int64), RGB),
        (GREY, np.dstack([GREY] * 3)),
        (GREY[..., None], np.dstack([GREY] * 3)),
        (GREY[None], np.dstack([GREY] * 3)),
        (RGB.transpose(2, 0, 1), RGB),
        (np.dstack([RGB, GREY]), RGB),
        (RGB / 255, RGB),
        ((RGB / 255).astype(np.float32), RGB),
        (np.zeros((3, 4, 3), np.uint8), np.zeros((3, 4, 3), np.uint8)),
        (np.full((1, 2), 200, np.uint8), np.full((1, 2, 3), 200, np.uint8)),
    ],
)
def test_accepted_images(image, expected):
    found = as_rgb(image, "prompt 0, image 0")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_what_pil_makes_of_it(mode):
    if mode in ("LAB", "La", "RGBa", "PA"):  # PIL cannot convert RGB to these
        image = Image.new(mode, (4, 3))
    else:
        image = Image.fromarray(RGB).convert(mode)
    try:
        expected = np.asarray(image.convert("RGB"))
    except ValueError:
        with pytest.raises(ValueError, match="image 0 cannot be decoded"):
            as_rgb(image, "image 0")
        return
    np.testing.assert_array_equal(as_rgb(image, "image 0"), expected)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("cat.png", TypeError, r"must be a PIL image or a NumPy array, got str; .*PIL\.Image\.open\(path\)"),
        (b"\x89PNG", TypeError, r"got bytes; open it: PIL\.Image\.open\(io\.BytesIO"),
        (None, TypeError, "got None"),
        (3, TypeError, "got int 3"),
        ([[0]], TypeError, "got list"),
        (Image.new("RGB", (0, 3)), ValueError, "no pixels: it is 3 high and 0 wide"),
        (np.zeros((4, 0, 3), np.uint8), ValueError, "no pixels: it is 4 high and 0 wide"),
        (Image.new("L", (1, 1)), ValueError, "1 x 1 pixels; the minimum is 2"),
        (np.zeros((1, 1, 3), np.uint8), ValueError, "1 x 1 pixels; the minimum is 2"),
        (Image.new("F", (2, 2)), ValueError, "mode 'F'; supported: 1, L"),
        (Image.new("I;16", (2, 2)), ValueError, "mode 'I;16'"),
        (np.zeros((2, 2, 2), np.uint8), ValueError, r"shape \[2, 2, 2\]; an array must be"),
        (np.zeros((1, 2, 2, 3), np.uint8), ValueError, r"shape \[1, 2, 2, 3\]"),
        (np.zeros(4, np.uint8), ValueError, r"shape \[4\]"),
        (np.full((2, 2), np.nan), ValueError, "4 of 4 values are NaN or infinite"),
        (
            np.full((2, 2), 1.5),
            ValueError,
            r"values from 1\.5 to 1\.5; values of float64 arrays must be from 0 to 1.*pixel_values",
        ),
        (np.full((2, 2), -1), ValueError, "values of int64 arrays must be from 0 to 255"),
        (np.zeros((2, 2), bool), TypeError, "dtype bool"),
        (np.full((2, 2), "a"), TypeError, "dtype <U1"),
        (
            np.broadcast_to(np.uint8(0), (2**14, 2**14)),
            ValueError,
            f"16384 x 16384 pixels; the maximum is {MAX_PIXELS}",
        ),
    ],
)
def test_refused_images(image, error, message):
    with pytest.raises(error, match=f"^prompt 1, image 2.*{message}"):
        as_rgb(image, "prompt 1, image 2")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_files_are_named(kind):
    data = file(kind)
    assert as_rgb(decoded(data), "image 0").shape == (64, 64, 3)
    with pytest.raises((ValueError, OSError)) as error:  # PIL may already detect it when it opens the file
        as_rgb(decoded(data[: len(data) * 2 // 3]), "image 0")
    if kind in ("PNG", "JPEG", "BMP"):
        assert str(error.value).startswith("image 0 cannot be decoded, it is truncated or corrupt")


def test_a_corrupt_file_is_named():
    data = bytearray(file("PNG"))
    data[200:260] = bytes(60)
    with pytest.raises(ValueError, match="image 0 cannot be decoded, it is truncated or corrupt"):
        as_rgb(decoded(bytes(data)), "image 0")


def test_preprocessed_tiles():
    values = np.ones((2, 3, 4, 4), np.float16)
    assert as_values(values, (3, 4, 4), "image 0").dtype == np.float32
    assert as_values(jnp.asarray(values, jnp.bfloat16), (3, 4, 4), "image 0").shape == (2, 3, 4, 4)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([[1.0]], TypeError, "must be a NumPy array of pixel values, got list"),
        (np.ones((1, 3, 4, 4), np.uint8), TypeError, "must have floats"),
        (np.ones((1, 3, 4, 5)), ValueError, r"shape \[1, 3, 4, 5\]; this model takes tiles \[n, 3, 4, 4\]"),
        (np.ones((3, 4, 4)), ValueError, r"shape \[3, 4, 4\]"),
        (np.ones((0, 3, 4, 4)), ValueError, "n of 1 or more"),
        (np.full((1, 3, 4, 4), np.inf), ValueError, "48 of 48 values are NaN or infinite"),
    ],
)
def test_refused_tiles(values, error, message):
    with pytest.raises(error, match=f"^image 0.*{message}"):
        as_values(values, (3, 4, 4), "image 0")
