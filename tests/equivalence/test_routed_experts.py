"""Experts of a rollout: the same however it is computed, and taken by training in place of the routers' choice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.cases import poison
from support.tiny import BLOCK, deterministic_runner, make_engine, make_request, prompt

from jaxinfer.engine.engine import Engine
from jaxinfer.engine.request import Request
from jaxinfer.engine.runner.buckets import step_shape
from jaxinfer.errors import ConfigError
from jaxinfer.functional import training
from jaxinfer.functional.taps import EXPERTS
from jaxinfer.results.output_processor import Handle
from jaxinfer.sampling_params import SamplingParams

PER_TOKEN, COUNT, LAYERS = 3, 8, 2
"""Of the tiny Qwen3-MoE."""
pytestmark = pytest.mark.xdist_group("deterministic qwen3_moe")
PREFIX = prompt(3 * BLOCK, 4)


def requests() -> list[Request]:
    params = SamplingParams(temperature=0.9, seed=2, max_tokens=9, n=2, logprobs=0)
    return [make_request(str(i), PREFIX + prompt(1 + 7 * i, i), params) for i in range(4)]


def run(engine: Engine, wanted: list[Request]) -> list[list[np.ndarray]]:
    for request in wanted:
        engine.add(request)
    while engine.has_work:
        engine.step()
    outputs = [Handle(request, None, None).output() for request in wanted]
    for request, output in zip(wanted, outputs, strict=True):
        for sample in output.outputs:
            shape = len(request.prompt) + len(sample.token_ids) - 1, LAYERS, PER_TOKEN
            assert sample.routed_experts.shape == shape and sample.routed_experts.dtype == np.uint8
    return [[sample.routed_experts for sample in output.outputs] for output in outputs]


def test_experts_do_not_depend_on_what_else_runs():
    """In a batch, in small chunks, computed twice, after preemptions, and for forks of a prompt."""
    runner = deterministic_runner("qwen3_moe", capture=(EXPERTS,))
    alone = [run(make_engine(runner), [request])[0] for request in requests()]
    assert all(len({*row.tolist()}) == PER_TOKEN for one in alone for row in one[0][:, 0])
    assert any((one[0][-5:] != one[1][-5:]).any() for one in alone), "samples do not differ, so this shows nothing"
    for settings in (dict(), dict(budget=5), dict(decode_steps=4), dict(block_sharing=False), dict(pool_blocks=16)):
        engine = make_engine(runner, **settings)
        poison(runner)
        for _ in range(2):  # prefixes are published by the first, and not used, as they keep no experts
            wanted = requests()
            for found, expected in zip(run(engine, wanted), alone, strict=True):
                for one, other in zip(found, expected, strict=True):
                    np.testing.assert_array_equal(one, other)
            assert not any(request.cached_tokens for request in wanted)
        assert (engine.scheduler.preempted > 0) == ("pool_blocks" in settings)


def test_training_takes_the_experts_of_a_rollout():
    runner, [request] = deterministic_runner("qwen3_moe", capture=(EXPERTS,)), requests()[2:3]
    [[experts, _]] = run(make_engine(runner), [request])
    sequence = request.sequences[0]
    ids = np.concatenate([request.prompt, sequence.output_ids])[None]
    module = runner.program.module(runner.params)
    training.prepare(module)
    graph, weights = nnx.split(module, nnx.Param)
    shape = step_shape(runner.program, runner.shapes, "auto")

    @jax.jit
    def find(weights: nnx.State, experts: jax.Array | None) -> tuple[jax.Array, ...]:
        own = nnx.merge(graph, weights)
        found = (training.logprobs(own, jnp.asarray(ids), serving=s, routed_experts=experts) for s in (shape, None))
        slope = jax.grad(
            lambda w: training.logprobs(
                nnx.merge(graph, w), jnp.asarray(ids), serving=shape, routed_experts=experts
            ).sum()
        )(weights)
        return (*found, sum(jnp.abs(leaf.astype(jnp.float32)).sum() for leaf in jax.tree.leaves(slope)))

    replayed, plain, slope = find(weights, jnp.asarray(experts)[None])
    chosen = find(weights, None)
    start = len(request.prompt) - 1
    assert replayed[0, start:].tolist() == [own for own, *_ in sequence.logprobs]
    np.testing.assert_array_equal(replayed, chosen[0])
    np.testing.assert_allclose(plain, chosen[1], atol=0.05)
    other = (jnp.asarray(experts)[None].astype(jnp.int32) + 1) % COUNT
    for found, before in zip(find(weights, other), (replayed, plain, slope), strict=True):
        assert np.abs(np.asarray(found) - np.asarray(before)).max() > 1e-2, "given experts make no difference"


@pytest.mark.parametrize("shape", [(1, 3, 2, 3), (1, 9, 1, 3), (1, 9, 2, 2), (2, 9, 2, 3), (9, 2, 3)])
def test_experts_of_another_shape_are_named(shape):
    runner = deterministic_runner("qwen3_moe", capture=(EXPERTS,))
    module = runner.program.module(runner.params)
    with pytest.raises(ConfigError, match="routed_experts has shape"):
        training.logprobs(module, jnp.zeros((1, 9), jnp.int32), routed_experts=jnp.zeros(shape, jnp.int32))
    dense = deterministic_runner("llama").program.module(deterministic_runner("llama").params)
    with pytest.raises(ConfigError, match="0 layers with experts and no experts"):
        training.logprobs(dense, jnp.zeros((1, 9), jnp.int32), routed_experts=jnp.zeros((1, 9, 2, 3), jnp.int32))
