"""Projections of one input as one GEMM or several: same results."""

from functools import partial

import jax
import numpy as np
import pytest
from support.tiny import BLOCK, CHUNK, VOCAB, config, prompt

from jaxinfer import functional
from jaxinfer.loading import weights
from jaxinfer.sharding import make_mesh

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("tp", [1, 2])
def test_fused_and_apart_give_the_same_logits(tp):
    """Qwen2 has biases on q, k and v, and none on gate and up."""
    mesh = make_mesh(tp)
    module = weights.random(config("qwen2"), mesh)
    width = 2 * CHUNK // BLOCK
    batch = functional.prefill_batch([(prompt(CHUNK), 0, CHUNK)], np.arange(width)[None])

    def run(fuse: bool) -> tuple[np.ndarray, int]:
        program, params = functional.split(module, mesh, matmul_kernel="xla", fuse_projections=fuse)
        cache = functional.init_cache(program, width, BLOCK)
        traced = jax.jit(partial(functional.prefill, program)).trace(params, cache, batch)
        logits, _ = traced.lower().compile()(params, cache, batch)
        return np.asarray(logits)[0, :VOCAB], str(traced.jaxpr).count("dot_general[")

    (fused, few), (apart, many) = run(True), run(False)
    assert many - few == 2 * (2 + 1), "q, k and v, gate and up, in two layers"
    assert np.abs(fused).max() > 0.1
    np.testing.assert_allclose(apart, fused, rtol=0, atol=1e-5)
