"""Attention within whole inputs, in XLA with and without a loop and in the Triton kernel, against a plain softmax."""

from collections.abc import Callable

import jax
import numpy as np
import pytest
from support.interpret import interpreted

from jaxinfer.kernels.attention import whole
from jaxinfer.kernels.attention.triton_attention import TritonAttention
from jaxinfer.kernels.triton.triton_launch import Target

TRITON = TritonAttention(Target(90, 2))
SIZES = [(2, 5, 3, 4), (2, 45, 2, 20)]
"""Inputs, tokens, heads, width: a part of a tile of queries, and more than one."""


def expected(q: np.ndarray, k: np.ndarray, v: np.ndarray, padding: np.ndarray | None) -> np.ndarray:
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scores = np.einsum("nqhd,nkhd->nhqk", q, k) / np.sqrt(q.shape[-1])
    if padding is not None:
        scores[np.broadcast_to((padding[:, :, None] & padding[:, None])[:, None], scores.shape)] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("nhqk,nkhd->nqhd", weights / weights.sum(axis=-1, keepdims=True), v)


def check(call: Callable[..., jax.Array], *, padded: bool) -> None:
    for sizes in SIZES:
        generator = np.random.default_rng(sizes[1])
        q, k, v = generator.standard_normal((3, *sizes), np.float32)
        padding = generator.random(sizes[:2]) < 0.4 if padded else None
        if padded:
            padding[:, 1] = False
            padding[-1, 2:] = True  # all but the first two tokens
        found = np.asarray(jax.jit(call)(q, k, v, padding))
        np.testing.assert_allclose(found, expected(q, k, v, padding), atol=2e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_tokens_read_their_own_input_and_padding_no_padding(padded: bool):
    check(whole.attend_whole, padded=padded)


@pytest.mark.parametrize("padded", [False, True])
def test_pieces_without_a_loop(monkeypatch: pytest.MonkeyPatch, padded: bool):
    monkeypatch.setattr(whole, "QUERIES", 2)
    call = lambda *operands: whole.attend_whole(*operands, unrolled=True)  # noqa: E731
    check(call, padded=padded)
    shape = jax.ShapeDtypeStruct((1, 7, 1, 4), "float32")
    assert "scan" in str(jax.make_jaxpr(whole.attend_whole)(shape, shape, shape))
    assert "scan" not in str(jax.make_jaxpr(call)(shape, shape, shape))


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True])
def test_the_kernel(padded: bool):
    with interpreted():
        check(lambda *operands: whole.attend_whole(*operands, triton=TRITON), padded=padded)
