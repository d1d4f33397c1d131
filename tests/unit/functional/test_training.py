"""The differentiable form of a model: same logits as in serving, and correct gradients."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.cross import CONFIG as BART
from support.tiny import BLOCK, VOCAB, config, prompt

from jaxinfer import functional
from jaxinfer.errors import ConfigError
from jaxinfer.functional import training
from jaxinfer.kernels.state.slots import Segments
from jaxinfer.loading import weights as loading
from jaxinfer.sharding import make_mesh

LENGTH = 41
"""More than a chunk of the recurrence, and not a multiple of one."""
SEQUENCES = [prompt(LENGTH, seed) for seed in (1, 2)]
families = pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=pytest.mark.slow)
        for family in ("kimi_linear", "llama", "gpt_oss", "gemma2", "qwen3_next")
    ],
)


def served(module: nnx.Module) -> np.ndarray:
    """Logits `[B, L, V]` of a prefill of both sequences."""
    program, params = functional.split(module, matmul_kernel="xla", attention_kernel="xla")
    width = -(-LENGTH // BLOCK)
    tables = np.arange(program.layout.groups * 2 * width).reshape(-1, 2, width)
    batch = functional.prefill_batch([(ids, 0, LENGTH) for ids in SEQUENCES], tables if len(tables) > 1 else tables[0])
    if program.layout.states:
        starts = np.array([0, LENGTH])
        states = Segments(starts, starts * 0 + LENGTH, starts * 0 + 9, np.arange(2), np.zeros(2, bool))
        batch = replace(batch, states=states)
    cache = functional.init_cache(program, tables.size, BLOCK, slots=2)
    hidden, _ = jax.jit(functional.prefill_hidden, static_argnums=0)(program, params, cache, batch)
    return np.asarray(program.module(params).logits(hidden))[:, :VOCAB].reshape(2, LENGTH, VOCAB)


@families
def test_training_logits_equal_serving_logits(family):
    module = loading.random(config(family), make_mesh(1))
    expected = served(module)
    training.prepare(module)
    graph, weights = nnx.split(module, nnx.Param)
    found = jax.jit(lambda weights: training.logits(nnx.merge(graph, weights), jnp.array(SEQUENCES)))(weights)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


@families
def test_gradients_equal_finite_differences(family):
    module = loading.random(config(family), make_mesh(1))
    training.prepare(module)
    graph, weights = nnx.split(module, nnx.Param)

    direction = np.random.default_rng(3).normal(size=(2, LENGTH, VOCAB)).astype(np.float32)

    @jax.jit
    def value_and_slope(weights):
        return jax.value_and_grad(
            lambda weights: jnp.vdot(direction, training.logits(nnx.merge(graph, weights), jnp.array(SEQUENCES)))
        )(weights)

    gradient = jax.tree.map(np.asarray, value_and_slope(weights)[1])
    scale = np.sqrt(sum(np.sum(g * g) for g in jax.tree.leaves(gradient)))
    assert np.isfinite(scale)
    step = 3e-5  # relative to weight rows with a norm of about 0.1; too small to change the routing of a token
    moved = [
        float(
            value_and_slope(jax.tree.map(lambda w, g, s=sign: np.asarray(w) + s * step * g / scale, weights, gradient))[
                0
            ]
        )
        for sign in (1, -1)
    ]
    assert (moved[0] - moved[1]) / (2 * step) == pytest.approx(scale, rel=2e-2)
    still = [path for path, g in nnx.to_flat_state(gradient) if not np.abs(g[...]).max()]
    assert all(path[-1] == "correction" for path in still), "every other weight has a gradient"


def test_training_refuses_multimodal_models():
    with pytest.raises(ConfigError, match="training supports text-only models"):
        training.prepare(loading.random(BART, make_mesh(1)))
