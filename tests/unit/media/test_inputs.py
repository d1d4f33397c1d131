"""Placement of images in a prompt, and the media content of its blocks."""

import numpy as np
import pytest

from jaxinfer.kv.digests import root
from jaxinfer.kv.prefix import PrefixIndex
from jaxinfer.media import EncoderInput, PlacedInputs

ROWS, P = 3, 4
ROOT = root(b"model")


def image(count: int = 1, seed: int = 0) -> EncoderInput:
    return EncoderInput("image", np.full((count, 1, 2, 2), seed, np.float32), ROWS)


def placed(*parts: int | EncoderInput) -> tuple[np.ndarray, PlacedInputs]:
    """Tokens of a prompt with these numbers of words and these images (whose token is 9), and the images' places."""
    lengths = [part if isinstance(part, int) else part.length for part in parts]
    tokens = np.concatenate(
        [np.full(length, 1 if isinstance(part, int) else 9) for part, length in zip(parts, lengths, strict=True)]
    )
    images = tuple(part for part in parts if not isinstance(part, int))
    return tokens.astype(np.int32), PlacedInputs(images, np.flatnonzero(tokens == 9))


def chain(*parts: int | EncoderInput) -> list[bytes]:
    tokens, inputs = placed(*parts)
    return PrefixIndex(P).chain(tokens, ROOT, (), inputs.extras(P))


def test_a_digest_is_of_the_content():
    one = image()
    assert one.digest == EncoderInput("image", one.values.astype(np.float64), ROWS).digest and len(one.digest) == 32
    others = [
        image(seed=1),
        image(2),
        EncoderInput("image", one.values.reshape(1, 1, 4, 1), ROWS),
        EncoderInput("audio", one.values, ROWS),
        EncoderInput("image", one.values, 1),
    ]
    assert len({one.digest, *(other.digest for other in others)}) == 6


def test_each_token_takes_the_row_of_its_input():
    a, b = image(2), image(seed=1)
    _, inputs = placed(2, a, 1, b)
    index = inputs.index({a.digest: (4, 1), b.digest: (0,)}, 14)
    assert index.tolist() == [-1, -1, 12, 13, 14, 3, 4, 5, -1, 0, 1, 2, -1, -1]
    assert inputs.index({b.digest: (0,)}, 12).tolist() == [-1] * 9 + [0, 1, 2]
    assert inputs.index({}, 12).max() == -1


def test_an_image_twice_is_one_input():
    a = image()
    _, inputs = placed(a, 1, image(), 1)
    assert list(inputs.distinct()) == [a.digest]
    assert inputs.index({a.digest: (2,)}, 8).tolist() == [6, 7, 8, -1, 6, 7, 8, -1]


@pytest.mark.parametrize("start", range(10))
def test_only_what_tokens_from_here_on_read_is_wanted(start: int):
    a, b = image(), image(seed=1)
    _, inputs = placed(2, a, 1, b, 1)  # a at 2 to 4, b at 6 to 8
    assert list(inputs.wanted(start)) == [one.digest for one, last in ((a, 4), (b, 8)) if start <= last]


def test_blocks_before_an_image_are_shared_and_those_with_it_and_after_are_not():
    mine, yours = chain(5, image(), 5), chain(5, image(seed=1), 5)  # the image is at 5 to 7
    assert [a == b for a, b in zip(mine, yours, strict=True)] == [True, False, False]
    assert mine == chain(5, image(), 5)
    tokens, _ = placed(5, image(), 5)
    text = PrefixIndex(P).chain(tokens, ROOT)
    assert [a == b for a, b in zip(mine, text, strict=True)] == [True, False, False]


def test_an_image_over_several_blocks_is_hashed_into_each():
    _, inputs = placed(3, image(3), 4)  # at 3 to 11
    extras = inputs.extras(P)
    assert sorted(extras) == [0, 1, 2]
    assert len(set(extras.values())) == 3, "each block has other rows"


def test_two_images_in_one_block_count_in_order():
    a, b = EncoderInput("image", np.zeros((1, 1)), 2), EncoderInput("image", np.ones((1, 1)), 2)
    assert len({*(tuple(chain(*parts)) for parts in ((a, b, 1), (b, a, 1), (a, a, 1)))}) == 3
