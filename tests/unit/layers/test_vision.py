"""Vision tower: bicubic resampling and patches."""

from functools import partial

import jax
import numpy as np
import pytest

from jaxinfer.layers.vision import bicubic
from jaxinfer.models.internvl.model import pixel_shuffle


def test_resampling_to_the_same_size_changes_nothing():
    np.testing.assert_array_equal(bicubic(5, 5), np.eye(5))


@pytest.mark.parametrize(("old", "new"), [(4, 6), (6, 4), (32, 37), (1, 3)])
def test_a_constant_stays_constant_and_both_ends_are_symmetric(old, new):
    made = bicubic(old, new)
    assert made.shape == (new, old)
    np.testing.assert_allclose(made.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(made, made[::-1, ::-1], atol=1e-6)


def test_doubling_places_points_a_quarter_beside_the_old_ones():
    # Keys' polynomials with a = -0.75 at distances 1.25, 0.25, 0.75 and 1.75.
    np.testing.assert_allclose(bicubic(8, 16)[7, 2:6], [-0.10546875, 0.87890625, 0.26171875, -0.03515625], atol=1e-6)


def test_points_beyond_the_edge_repeat_the_edge():
    first = bicubic(8, 16)[0]
    np.testing.assert_allclose(first[:2], [-0.03515625 + 0.26171875 + 0.87890625, -0.10546875], atol=1e-6)


_shuffle = jax.jit(partial(pixel_shuffle, block=2), static_argnames="transposed")


def test_a_block_of_patches_becomes_one_row_in_reading_order():
    patches = np.arange(16).reshape(1, 16, 1)
    rows, down = (np.asarray(_shuffle(patches, transposed=way))[0] for way in (False, True))
    assert rows.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert down.tolist() == [rows.tolist()[i] for i in (0, 2, 1, 3)]
