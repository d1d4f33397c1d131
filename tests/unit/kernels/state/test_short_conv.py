"""Short convolution against NumPy, over sequences of every length around the number of taps."""

import jax
import numpy as np
import pytest

from jaxinfer.kernels.state import short_conv
from jaxinfer.kernels.state.slots import DecodeSlots, Segments

COLUMNS, TAPS, SLOTS, NO_SLOT = 6, 4, 8, 99

_prefill, _decode = jax.jit(short_conv.prefill), jax.jit(short_conv.decode)
_rng = np.random.default_rng(0)
WEIGHT = _rng.normal(size=(COLUMNS, TAPS)).astype(np.float32)
STATES = _rng.normal(size=(SLOTS, TAPS - 1, COLUMNS)).astype(np.float32)
INPUTS = _rng.normal(size=(24, COLUMNS)).astype(np.float32)


def alone(x: np.ndarray, past: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Process one sequence after its past inputs, in float64; return outputs and the last inputs."""
    whole = np.concatenate([past, x]).astype(np.float64)
    y = sum(whole[j : j + len(x)] * WEIGHT[:, j] for j in range(TAPS))
    return y, whole[len(x) :]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batched_sequences_equal_each_alone(dtype):
    """Rows (tokens, source, target, continues): new sequences, continued ones, and cuts shorter than the taps."""
    rows = [
        (5, 1, 2, False),
        (1, 0, 3, True),
        (1, 0, NO_SLOT, True),
        (4, 0, 4, True),
        (1, 6, 6, False),
        (2, NO_SLOT, 5, False),
    ]
    counts = np.array([row[0] for row in rows] + [0, 0])
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    columns = zip(*(row[1:] for row in [*rows, (0, 0, 0, False), (0, 7, 7, False)]), strict=True)
    segments = Segments(starts, counts, *(np.array(column) for column in columns))
    x, states = (a.astype(jax.numpy.dtype(dtype)) for a in (INPUTS, STATES))
    wide, past = (np.asarray(a, np.float32) for a in (x, states))
    x[14:] = np.nan  # padding
    found, after = _prefill(x, WEIGHT, states, segments)
    assert found.dtype == np.float32 and after.dtype == states.dtype
    expected = past.copy()
    for start, stop, source in ((0, 11, past[1]), (11, 12, past[6]), (12, 14, np.zeros_like(past[0]))):
        np.testing.assert_allclose(found[start:stop], alone(wide[start:stop], source)[0], atol=1e-5)
    for stop, target in ((5, 2), (6, 3), (11, 4)):
        expected[target] = alone(wide[:stop], past[1])[1]
    expected[6], expected[5] = alone(wide[11:12], past[6])[1], alone(wide[12:14], 0 * past[0])[1]
    np.testing.assert_array_equal(np.asarray(after, np.float32), expected)


def test_decode_is_one_more_token_and_padding_changes_no_state():
    x = np.array(INPUTS[:3])
    x[1] = np.nan
    found, after = _decode(x, WEIGHT, STATES, DecodeSlots(np.array([3, NO_SLOT, 0]), np.array([2, NO_SLOT, 0])))
    expected = STATES.copy()
    for row, source, target in ((0, 3, 2), (2, 0, 0)):
        y, expected[target] = alone(x[row : row + 1], STATES[source])
        np.testing.assert_allclose(found[row], y[0], atol=1e-5)
    np.testing.assert_array_equal(after, expected)
