"""Projections of one input as one GEMM or several: same results, chosen by the number of rows in a step."""

from functools import partial

import jax
import numpy as np
import pytest
from support.tiny import BLOCK, CHUNK, VOCAB, config, prompt

from jaxinfer import functional
from jaxinfer.layers import fusion
from jaxinfer.loading import weights
from jaxinfer.sharding import make_mesh

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("tp", [1, 2])
def test_fused_and_apart_give_the_same_logits(family, tp, monkeypatch):
    """qwen2 has biases on q, k and v."""
    mesh = make_mesh(tp)
    module = weights.random(config(family), mesh)
    width = 2 * CHUNK // BLOCK
    batch = functional.prefill_batch([(prompt(CHUNK), 0, CHUNK)], np.arange(width)[None])
    monkeypatch.setattr(fusion, "CROSSOVERS", {"cpu": CHUNK - 1})

    def run(asked: bool | str) -> tuple[np.ndarray, int]:
        program, params = functional.split(module, mesh, matmul_kernel="xla", fuse_projections=asked)
        cache = functional.init_cache(program, width, BLOCK)
        traced = jax.jit(partial(functional.prefill, program)).trace(params, cache, batch)
        logits, _ = traced.lower().compile()(params, cache, batch)
        return np.asarray(logits)[0, :VOCAB], str(traced.jaxpr).count("dot_general[")

    (fused, few), (apart, many), (auto, as_apart) = (run(asked) for asked in (True, False, "auto"))
    assert many - few == 2 * (2 + 1) and as_apart == many, "q, k and v, gate and up, in two layers"
    assert np.abs(fused).max() > 0.1
    np.testing.assert_allclose(apart, fused, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(apart, auto)
