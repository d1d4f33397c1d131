"""Which experts a token goes to, and what each of them counts."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxinfer.errors import ConfigError
from jaxinfer.layers.linear import Multiplying
from jaxinfer.layers.params import Build, constant, param, weight
from jaxinfer.sharding import axes

SOFTMAX, SIGMOID = "softmax", "sigmoid"
SCORES = (SOFTMAX, SIGMOID)
COUNTS, TAKEN = "num_experts, num_local_experts or n_routed_experts", "num_experts_per_tok or num_experts_per_token"
GROUPS = "n_group or num_expert_group"
"""What config.json calls the number of experts, of those a token takes, and of groups, by family."""


@dataclass(frozen=True)
class RouterConfig:
    """How scores become a choice and weights. The kinds in use are settings of these fields:

    - Mixtral (arXiv:2401.04088), Qwen3-MoE and Qwen3-Next with `norm_topk_prob`: the defaults;
    - Qwen3-MoE without it: `renormalise=False`;
    - gpt-oss, a softmax over the logits that were chosen: the defaults with `bias=True`. It is the same number as a
      softmax over all of them, renormalised;
    - DeepSeek-V3 (arXiv:2412.19437) and Kimi: `score="sigmoid", correction=True, scale=2.5, groups=8, chosen_groups=4`.
    """

    score: str = SOFTMAX
    """Of a logit: "softmax" over all experts, or "sigmoid" of each alone."""
    renormalise: bool = True
    """Whether the weights of a token's experts are divided by their sum."""
    scale: float = 1.0
    """The weights are multiplied by it, last."""
    bias: bool = False
    """Whether logits have a bias."""
    correction: bool = False
    """Whether a number an expert is added to its score for the choice alone, not for its weight (arXiv:2408.15664)."""
    groups: int = 1
    """Into which the experts are divided, one after another."""
    chosen_groups: int = 1
    """Groups that a token's experts are from: those whose best experts' scores have the largest sum."""
    group_best: int = 2
    """How many of a group's experts that sum is over."""

    def check(self, experts: int, per_token: int) -> None:
        """Whether it can choose `per_token` of `experts`.

        Raises:
            ConfigError: an unknown score, or numbers that do not fit each other.
        """
        if self.score not in SCORES:
            raise ConfigError(f"router: score is {self.score!r}; it may be {' or '.join(SCORES)}")
        if not 1 <= per_token <= experts:
            raise ConfigError(
                f"router: a token takes {per_token} experts ({TAKEN}), and there are {experts} ({COUNTS}); choose 1 to "
                f"{experts}"
            )
        if not 1 <= self.chosen_groups <= self.groups:
            raise ConfigError(
                f"router: {self.chosen_groups} groups (topk_group) of {self.groups} ({GROUPS}) cannot be chosen; "
                "topk_group must "
                f"be 1 to {max(1, self.groups)}"
            )
        if self.groups == 1:
            return
        if experts % self.groups:
            raise ConfigError(
                f"router: {experts} experts ({COUNTS}) do not divide into {self.groups} groups ({GROUPS}); choose a "
                "divisor"
            )
        size = experts // self.groups
        if not 1 <= self.group_best <= size:
            raise ConfigError(
                f"router: groups cannot be chosen by the best {self.group_best} of {size} experts each; choose at most "
                f"{experts // self.group_best} groups ({GROUPS})"
            )
        if per_token > self.chosen_groups * size:
            raise ConfigError(
                f"router: a token takes {per_token} experts ({TAKEN}), and {self.chosen_groups} groups (topk_group) "
                "have "
                f"{self.chosen_groups * size}; lower the one or raise the other"
            )


class Router(Multiplying):
    """`[T, M]` -> the experts of each token and their weights. Whole on every device: each comes to the same choice."""

    def __init__(self, build: Build, width: int, experts: int, per_token: int, config: RouterConfig):
        config.check(experts, per_token)
        self.config, self.per_token = config, per_token
        self.weight = weight(build, (experts, width), (None, axes.EMBED), width**-0.5)
        self.bias = constant(build, (experts,), (None,), 0.0) if config.bias else None
        self.correction = param(build, jnp.zeros(experts, jnp.float32), (None,)) if config.correction else None

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`[T, M]` -> experts `[T, k]` int32 and their weights `[T, k]` float32, the best first."""
        logits = self.product(x, self.weight, None, jnp.float32)
        if self.bias is not None:
            logits = logits + self.bias[...].astype(jnp.float32)
        correction = None if self.correction is None else self.correction[...]
        return route(logits, self.per_token, self.config, correction)


def route(
    logits: jax.Array, per_token: int, config: RouterConfig, correction: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The choice and the weights of float32 logits `[T, E]`; `correction` `[E]`. Of equal scores the first counts
    more."""
    sigmoid = config.score == SIGMOID
    ranks = jax.nn.sigmoid(logits) if sigmoid else logits  # a softmax keeps the order
    if not sigmoid and (correction is not None or config.groups > 1):
        ranks = jax.nn.softmax(logits, axis=-1)
    scores = ranks
    if correction is not None:
        ranks = ranks + correction
    if config.groups > 1:
        ranks = jnp.where(_in_chosen_groups(ranks, config), ranks, -jnp.inf)
    best, chosen = jax.lax.top_k(ranks, per_token)
    if scores is not ranks:
        best = jnp.take_along_axis(scores, chosen, axis=-1)
    if scores is logits:
        return chosen, config.scale * _softmax(best, logits, config.renormalise)
    if config.renormalise:
        # The summand is DeepSeek's own: sigmoids may all be zero.
        best = best / (jnp.sum(best, axis=-1, keepdims=True) + 1e-20)
    return chosen, config.scale * best


def _softmax(best: jax.Array, logits: jax.Array, renormalise: bool) -> jax.Array:
    """The weights of chosen logits: among themselves, or among all."""
    if renormalise:
        return jax.nn.softmax(best, axis=-1)
    return jnp.exp(best - jax.nn.logsumexp(logits, axis=-1, keepdims=True))


def _in_chosen_groups(ranks: jax.Array, config: RouterConfig) -> jax.Array:
    """`[T, E]` bool."""
    grouped = ranks.reshape(ranks.shape[0], config.groups, -1)
    sums = jnp.sum(jax.lax.top_k(grouped, config.group_best)[0], axis=-1)
    _, chosen = jax.lax.top_k(sums, config.chosen_groups)
    within = jnp.any(chosen[:, :, None] == jnp.arange(config.groups), axis=1)
    return jnp.repeat(within, grouped.shape[2], axis=1)
