"""Mixture of experts against a loop over tokens and experts, on one and several devices."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from support.lowering import collectives
from support.memory import MemorySource

from jaxinfer.checkpoint import rules
from jaxinfer.errors import ConfigError
from jaxinfer.layers.attention import StepContext
from jaxinfer.layers.mlp import ACTIVATIONS
from jaxinfer.layers.moe import ClampedSwiGLU, MoE, MoEConfig
from jaxinfer.layers.params import Build
from jaxinfer.layers.router import RouterConfig, route
from jaxinfer.models.moe_rules import MoENames, moe_rules
from jaxinfer.sharding import axes, make_mesh
from jaxinfer.sharding.policy import Placement

pytestmark = pytest.mark.slow

WIDTH, TOKENS, REAL = 16, 12, 9
"""M; rows of a step; real rows, followed by padding."""
CONFIGS = {
    "plain": MoEConfig(8, 2, 24),
    "gpt-oss": MoEConfig(8, 3, 24, RouterConfig(bias=True), ClampedSwiGLU(limit=1.0), bias=True),
    "deepseek": MoEConfig(
        8, 4, 8, RouterConfig("sigmoid", scale=2.5, correction=True, groups=4, chosen_groups=2), shared=16
    ),
    "qwen3-next": MoEConfig(8, 2, 8, shared=8, shared_gate=True),
    "one expert": MoEConfig(1, 1, 8, activation="gelu"),
    "crowded": MoEConfig(8, 1, 24, RouterConfig(bias=True), ClampedSwiGLU(), bias=True),
}
WAYS: Mapping[str, tuple[int, Mapping[str, str]]] = {
    "sharded over 2": (2, {}),
    "sharded over 8": (8, {}),
    "by experts over 2": (2, {"mlp": "experts"}),
    "by experts over 8": (8, {"mlp": "experts"}),
    "replicated over 2": (2, {"mlp": "replicate"}),
}


class Holder(nnx.Module):
    """A module that contains the mixture, with the names of a weight table."""

    def __init__(self, build: Build, config: MoEConfig):
        self.mlp = MoE(build.at("mlp"), WIDTH, config)


def build(mesh: Any, placement: Mapping[str, str] | None = None, quantization: str | None = None) -> Build:
    return Build(nnx.Rngs(0), jnp.dtype("float32"), mesh, quantization, Placement(placement or {}))


@cache
def tensors(name: str) -> dict[str, np.ndarray]:
    """Make a checkpoint of a mixture without neutral values."""
    rng, config = np.random.default_rng(7), CONFIGS[name]
    shapes: dict[str, tuple[int, ...]] = {
        "experts.gate_up_proj": (config.experts, 2 * config.ffn, WIDTH),
        "experts.down_proj": (config.experts, WIDTH, config.ffn),
        "gate.weight": (config.experts, WIDTH),
    }
    if config.bias:
        shapes |= {f"{key}_bias": shape[:2] for key, shape in shapes.items() if "experts" in key}
    if config.router.bias:
        shapes["gate.bias"] = (config.experts,)
    if config.router.correction:
        shapes["gate.e_score_correction_bias"] = (config.experts,)
    if config.shared:
        shapes |= {f"shared_experts.{part}_proj.weight": (config.shared, WIDTH) for part in ("gate", "up")}
        shapes["shared_experts.down_proj.weight"] = (WIDTH, config.shared)
    if config.shared_gate:
        shapes["shared_expert_gate.weight"] = (1, WIDTH)
    scales = {key: 0.5 if "bias" in key else shape[-1] ** -0.5 for key, shape in shapes.items()}
    return {
        f"m.mlp.{key}": (scales[key] * rng.standard_normal(shape)).astype(np.float32) for key, shape in shapes.items()
    }


def module(
    name: str,
    tp: int = 1,
    placement: Mapping[str, str] | None = None,
    quantization: str | None = None,
    **changed: np.ndarray,
) -> MoE:
    """Load the mixture for the devices."""
    mesh, config = make_mesh(tp), CONFIGS[name]
    made = nnx.eval_shape(lambda: Holder(build(mesh, placement, quantization), config))
    held = MemorySource(tensors(name) | {f"m.mlp.{key.replace('__', '.')}": value for key, value in changed.items()})
    rules.load(made, moe_rules(config, MoENames(), "m", "mlp"), held, mesh, progress=False)
    return made.mlp


@partial(jax.jit, static_argnums=(0, 1))
def _call(graph: nnx.GraphDef, tp: int, state: nnx.State, x: jax.Array, real: jax.Array) -> jax.Array:
    zeroes = jnp.zeros(TOKENS, jnp.int32)
    return nnx.merge(graph, state)(x, StepContext(zeroes, real, zeroes, (), make_mesh(tp)))


def run(made: MoE, x: np.ndarray, tp: int = 1, real: np.ndarray | None = None) -> np.ndarray:
    """Make a step whose last rows are padding, or with the given `real` mask."""
    graph, state = nnx.split(made)
    return np.asarray(_call(graph, tp, state, x, np.arange(TOKENS) < REAL if real is None else real))


def tokens() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((TOKENS, WIDTH)).astype(np.float32)


def expected(name: str, x: np.ndarray) -> np.ndarray:
    """Compute the output token by token and expert by expert, with the router's selection (`test_router.py`)."""
    config, w = CONFIGS[name], {key.removeprefix("m.mlp."): value for key, value in tensors(name).items()}
    logits = x @ w["gate.weight"].T + w.get("gate.bias", 0)
    correction = w.get("gate.e_score_correction_bias")
    found = route(
        jnp.asarray(logits), config.per_token, config.router, None if correction is None else jnp.asarray(correction)
    )
    y = np.zeros_like(x)

    def mlp(row: np.ndarray, up: np.ndarray, down: np.ndarray, bias: np.ndarray | float = 0.0) -> np.ndarray:
        gate, value = np.split(up @ row + bias, 2)
        if isinstance(config.activation, ClampedSwiGLU):
            alpha, limit = config.activation.alpha, config.activation.limit
            gate, value = np.minimum(gate, limit), np.clip(value, -limit, limit)
            return down @ ((value + 1) * gate / (1 + np.exp(-alpha * gate)))
        return down @ (np.asarray(ACTIVATIONS[config.activation](gate)) * value)

    for t, (row, *own) in enumerate(zip(x, *map(np.asarray, found), strict=True)):
        for expert, share in zip(*own, strict=True):
            up, down = (w[f"experts.{part}_proj"][expert] for part in ("gate_up", "down"))
            biases = [w[f"experts.{part}_proj_bias"][expert] if config.bias else 0.0 for part in ("gate_up", "down")]
            y[t] += share * (mlp(row, up, down, biases[0]) + biases[1])
        if config.shared:
            gate = 1 / (1 + np.exp(-(w["shared_expert_gate.weight"] @ row))) if config.shared_gate else 1.0
            up = np.concatenate([w[f"shared_experts.{part}_proj.weight"] for part in ("gate", "up")])
            y[t] += gate * mlp(row, up, w["shared_experts.down_proj.weight"])
    return y


@pytest.mark.parametrize("name", CONFIGS)
def test_the_output_is_the_weighted_sum_over_each_tokens_experts(name: str):
    x = tokens()
    np.testing.assert_allclose(run(module(name), x)[:REAL], expected(name, x)[:REAL], rtol=0, atol=2e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["plain", "gpt-oss", "deepseek", "qwen3-next"])
def test_several_devices_give_the_same_result_with_one_all_reduce(name: str, way: str):
    tp, placement = WAYS[way]
    made, x = module(name, tp, placement), tokens()
    np.testing.assert_allclose(run(made, x, tp)[:REAL], expected(name, x)[:REAL], rtol=0, atol=2e-5)
    graph, state = nnx.split(made)
    text = _call.lower(graph, tp, state, x, np.ones(TOKENS, bool)).compile().as_text()
    assert dict(collectives(text)) == ({} if "replicated" in way else {"all-reduce": 1})


@pytest.mark.parametrize("name", ["plain", "gpt-oss"])
def test_padding_goes_to_no_expert_and_changes_nothing(name: str):
    x, made = tokens(), module(name)
    whole = run(made, x)
    assert not whole[REAL:].any(), "experts must not process padding"
    x[REAL:] = np.nan
    np.testing.assert_array_equal(run(made, x), whole)
    assert not run(made, x, real=np.zeros(TOKENS, bool)).any(), "a step of only padding"


@pytest.mark.parametrize("expert", [0, 5])
def test_all_tokens_may_go_to_one_expert(expert: int):
    """No token is dropped, however many an expert gets, and results do not depend on other tokens."""
    made = module("crowded", gate__bias=np.where(np.arange(8) == expert, 100, 0).astype(np.float32))
    x = tokens()
    assert (np.asarray(made.router(jnp.asarray(x))[0]) == expert).all()
    found = run(made, x)
    assert np.abs(found[:REAL]).sum(axis=1).min() > 0.1
    for t in (0, REAL - 1):
        alone = run(made, x, real=np.arange(TOKENS) == t)
        np.testing.assert_allclose(alone[t], found[t], rtol=0, atol=1e-6)
        assert not np.delete(alone, t, 0).any()


@pytest.mark.parametrize("way", ["alone", "sharded over 2", "by experts over 2"])
def test_int8_is_close(way: str):
    x, name = tokens(), "deepseek"
    tp, placement = WAYS.get(way, (1, {}))
    exact, found = module(name), module(name, tp, placement, "int8")
    assert found.gate_up.weight.dtype == found.shared.down.weight.dtype == jnp.int8
    assert found.router.weight.dtype == jnp.float32, "routing must stay exact"
    one, other = run(exact, x)[:REAL], run(found, x, tp)[:REAL]
    assert 0 < np.abs(one - other).max() < 0.05 * np.abs(one).max()


@pytest.mark.parametrize(
    ("tp", "experts", "tactic", "message"),
    [
        (
            5,
            9,
            "shard",
            r"mlp: axis 'ffn' of size 24 \(of each expert\) does not divide over mesh axis 'model' of size 5; choose "
            r"a tensor_parallel_size that does \(1, 2, 3, 4, 6, 8, 12, 24\), or keep the module whole .*'mlp': "
            r"'replicate'}\n",
        ),
        (5, 10, "shard", r", or shard by experts with placement=\{'mlp': 'experts'\}"),
        (
            6,
            10,
            "experts",
            r"mlp: axis 'expert' of size 10 does not divide over mesh axis 'model' of size 6; choose a "
            r"tensor_parallel_size that does \(1, 2, 5, 10\), .*, or shard within experts with placement=\{'mlp': "
            r"'shard'\}",
        ),
    ],
)
def test_what_does_not_divide_is_named_with_remedies(tp: int, experts: int, tactic: str, message: str):
    mesh = AbstractMesh((tp,), (axes.MODEL,), axis_types=(AxisType.Auto,))
    with pytest.raises(ConfigError, match=message):
        nnx.eval_shape(lambda: Holder(build(mesh, {"mlp": tactic}), MoEConfig(experts, 2, 24)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(activation="swish2"), "activation is 'swish2'; supported: silu"),
        (dict(weigh_inputs=True, bias=True), "weigh_inputs is set, but biases have no weight"),
        (dict(shared_gate=True), "shared_gate is set without shared experts"),
        (dict(per_token=9), r"9 experts per token .*; with 8 experts "),
    ],
)
def test_inconsistent_sizes_are_named(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        replace(CONFIGS["plain"], **changes)
