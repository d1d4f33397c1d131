"""All router types against a plain loop over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.errors import ConfigError
from jaxinfer.layers.router import RouterConfig, route

EXPERTS, TOKENS = 8, 40
KINDS = {
    "mixtral": RouterConfig(),
    "qwen3_moe": RouterConfig(renormalise=False),
    "deepseek_v3": RouterConfig("sigmoid", scale=2.5, correction=True, groups=4, chosen_groups=2),
    "kimi": RouterConfig("sigmoid", scale=2.446, correction=True),
    "sigmoid alone": RouterConfig("sigmoid", renormalise=False),
    "deepseek_v2": RouterConfig(renormalise=False, scale=16.0, groups=4, chosen_groups=1, group_best=1),
    "softmax, corrected": RouterConfig(correction=True),
    "phimoe": RouterConfig("sparsemixer", jitter=0.2),
}


def plain(
    logits: np.ndarray, count: int, config: RouterConfig, correction: np.ndarray
) -> tuple[list[int], list[float]]:
    """Route one token in float64."""
    exact = logits.astype(np.float64)
    if config.score == "sparsemixer":
        return sparse_mixer(exact, config.jitter)
    scores = 1 / (1 + np.exp(-exact)) if config.score == "sigmoid" else np.exp(exact) / np.exp(exact).sum()
    ranks = scores + correction if config.correction else scores
    if config.groups > 1:
        grouped = ranks.reshape(config.groups, -1)
        sums = np.sort(grouped, axis=1)[:, -config.group_best :].sum(axis=1)
        for group in np.argsort(-sums)[config.chosen_groups :]:
            grouped[group] = -np.inf
        ranks = grouped.reshape(-1)
    chosen = np.argsort(-ranks, kind="stable")[:count]
    weights = scores[chosen]
    if config.renormalise:
        weights = weights / weights.sum()
    return chosen.tolist(), (config.scale * weights).tolist()


def sparse_mixer(logits: np.ndarray, jitter: float) -> tuple[list[int], list[float]]:
    """Route one token by the definition: the best expert among those close to it, then the same without it."""
    chosen, weights, left = [], [], dict(enumerate(logits))
    for _ in range(2):
        best = max(left, key=left.get)
        close = [x for x in left.values() if (left[best] - x) / max(abs(x), left[best]) <= 2 * jitter]
        chosen.append(best)
        weights.append(np.exp(left.pop(best)) / np.exp(close).sum())
    return chosen, weights


@pytest.mark.parametrize(("kind", "count"), [(kind, 2) for kind in KINDS] + [(k, 1) for k in KINDS if k != "phimoe"])
def test_selected_experts_and_their_weights(kind: str, count: int):
    config, rng = KINDS[kind], np.random.default_rng(0)
    logits = (2 * rng.standard_normal((TOKENS, EXPERTS))).astype(np.float32)
    correction = rng.standard_normal(EXPERTS).astype(np.float32) * 0.3
    given = jnp.asarray(correction) if config.correction else None
    chosen, weights = jax.jit(route, static_argnums=(1, 2))(logits, count, config, given)
    assert (chosen.dtype, weights.dtype, chosen.shape) == (jnp.int32, jnp.float32, (TOKENS, count))
    for row in range(TOKENS):
        experts, expected = plain(logits[row], count, config, correction)
        assert np.asarray(chosen)[row].tolist() == experts
        np.testing.assert_allclose(np.asarray(weights)[row], expected, rtol=2e-5)


def test_a_softmax_over_the_chosen_logits_is_the_softmax_of_all_renormalised_and_does_not_overflow():
    logits = np.array([[300.0, -300.0, 299.0, 0.0], [-500.0, -500.0, -501.0, -900.0]], np.float32)  # gpt-oss
    chosen, weights = route(jnp.asarray(logits), 2, RouterConfig())
    assert np.asarray(chosen).tolist() == [[0, 2], [0, 1]]
    np.testing.assert_allclose(weights, [[0.7310586, 0.2689414], [0.5, 0.5]], rtol=1e-5)


def test_sigmoids_of_large_logits_are_ranked_by_these():
    logits = jnp.array([[30.0, 40.0, -1.0]])
    chosen, weights = route(logits, 2, RouterConfig("sigmoid", renormalise=False, by_logit=True))
    assert (chosen.tolist(), weights.tolist()) == ([[1, 0]], [[1.0, 1.0]])


def test_sigmoids_that_are_all_zero_give_no_nan():
    _, weights = route(jnp.full((1, 4), -200.0), 2, RouterConfig("sigmoid"))
    assert np.isfinite(weights).all()


@pytest.mark.parametrize(
    ("config", "experts", "count", "message"),
    [
        (RouterConfig("tanh"), 8, 2, "score is 'tanh'; it may be softmax or sigmoid or sparsemixer"),
        (
            RouterConfig(),
            8,
            9,
            r"9 experts per token \(num_experts_per_tok.*\) .*; with 8 experts \(num_experts.* choose 1 to 8",
        ),
        (RouterConfig(), 8, 0, "0 experts per token"),
        (RouterConfig(groups=3), 8, 2, r"8 experts .* do not divide into 3 groups \(n_group.*; choose a divisor of 8"),
        (RouterConfig(groups=4, chosen_groups=5), 8, 2, r"topk_group is 5; with 4 groups .* must be 1 to 4"),
        (RouterConfig(chosen_groups=2), 8, 2, r"topk_group is 2; with 1 groups .* must be 1 to 1"),
        (RouterConfig(by_logit=True), 8, 1, "by_logit ranks sigmoids.*score is 'softmax'"),
        (RouterConfig(groups=8, chosen_groups=8), 8, 2, "by their best 2 experts, but have 1 each"),
        (
            RouterConfig(groups=4, chosen_groups=1),
            8,
            3,
            r"3 experts per token .* exceed the 2 experts of 1 groups \(topk_group\)",
        ),
    ],
)
def test_invalid_settings_are_named(config: RouterConfig, experts: int, count: int, message: str):
    with pytest.raises(ConfigError, match=message):
        config.check(experts, count)
