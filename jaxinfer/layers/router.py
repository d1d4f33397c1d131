"""MoE router: selects the experts of each token and their weights."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxinfer.errors import ConfigError
from jaxinfer.layers.linear import MatmulModule
from jaxinfer.layers.norms import normalise, scale_by
from jaxinfer.layers.params import Build, constant, param, weight
from jaxinfer.sharding import axes

SOFTMAX, SIGMOID, SPARSEMIXER = "softmax", "sigmoid", "sparsemixer"
SCORES = (SOFTMAX, SIGMOID, SPARSEMIXER)
COUNTS, TAKEN = "num_experts, num_local_experts or n_routed_experts", "num_experts_per_tok or num_experts_per_token"
GROUPS = "n_group or num_expert_group"
"""Names in config.json of the number of experts, experts per token and expert groups, by family."""


@dataclass(frozen=True)
class RouterConfig:
    """How scores determine the experts and their weights. Settings of known models:

    - Mixtral (arXiv:2401.04088), Qwen3-MoE and Qwen3-Next with `norm_topk_prob`: the defaults;
    - Qwen3-MoE without `norm_topk_prob`: `renormalise=False`;
    - gpt-oss, a softmax over the selected logits: the defaults with `bias=True`, which equals a renormalized softmax
      over all logits;
    - DeepSeek-V3 (arXiv:2412.19437) and Kimi: `score="sigmoid", correction=True, scale=2.5, groups=8, chosen_groups=4`;
    - Phi-MoE: `score="sparsemixer", jitter=0.01`;
    - Llama 4: `score="sigmoid", renormalise=False, by_logit=True`.
    """

    score: str = SOFTMAX
    """"softmax" over all experts, "sigmoid" of each logit, or "sparsemixer" (arXiv:2409.12136): the best two experts,
    each weighted by a softmax over those experts whose logits are close to its own."""
    renormalise: bool = True
    """Whether the weights of a token's experts are divided by their sum."""
    scale: float = 1.0
    """Final multiplier of the weights (routed_scaling_factor)."""
    bias: bool = False
    """Whether logits have a bias."""
    correction: bool = False
    """Whether a per-expert bias is added to scores for selection only, not for weights (arXiv:2408.15664)."""
    groups: int = 1
    """Number of expert groups, of consecutive experts (n_group)."""
    chosen_groups: int = 1
    """Groups a token's experts are selected from: those with the largest sums of best scores (topk_group)."""
    group_best: int = 2
    """Number of best expert scores summed to rank a group."""
    jitter: float = 0.01
    """SparseMixer: half the relative distance of logits that counts as close."""
    input_norm: float | None = None
    """Epsilon of a norm of the router's input, whose result is multiplied by a learned vector and M ** -0.5 (Gemma 4);
    None for no norm."""
    expert_scale: bool = False
    """Whether each expert's weight is multiplied by a learned factor of its own (Gemma 4)."""
    by_logit: bool = False
    """Whether sigmoids are ranked by their logits, which large ones, all rounded to 1, cannot be (Llama 4)."""
    epsilon: float = 1e-20
    """Added to the sum of sigmoids that weights are divided by, all of which may be zero (DeepSeek's own)."""

    def check(self, experts: int, per_token: int) -> None:
        """Check the settings for `per_token` of `experts` experts.

        Raises:
            ConfigError: an unknown score, or inconsistent sizes.
        """
        if self.score not in SCORES:
            raise ConfigError(f"router: score is {self.score!r}; it may be {' or '.join(SCORES)}")
        if not 1 <= per_token <= experts:
            raise ConfigError(
                f"router: {per_token} experts per token ({TAKEN}) are not possible; with {experts} experts ({COUNTS}) "
                f"choose 1 to {experts}"
            )
        if self.score == SPARSEMIXER and (per_token != 2 or self.groups > 1 or self.correction):
            raise ConfigError(
                f"router: sparsemixer chooses 2 experts a token, but {TAKEN} is {per_token}, with {self.groups} groups "
                f"({GROUPS}); set 2 and 1, without a bias of the choice"
            )
        if self.by_logit and (self.score != SIGMOID or self.groups > 1 or self.correction):
            raise ConfigError(
                f"router: by_logit ranks sigmoids by their logits, but score is {self.score!r}, with {self.groups} "
                "groups; unset it where scores, their sums or a correction rank the experts"
            )
        if not 1 <= self.chosen_groups <= self.groups:
            raise ConfigError(
                f"router: topk_group is {self.chosen_groups}; with {self.groups} groups ({GROUPS}) it must be 1 to "
                f"{max(1, self.groups)}"
            )
        if self.groups == 1:
            return
        if experts % self.groups:
            raise ConfigError(
                f"router: {experts} experts ({COUNTS}) do not divide into {self.groups} groups ({GROUPS}); choose "
                f"a divisor of {experts}"
            )
        size = experts // self.groups
        if not 1 <= self.group_best <= size:
            raise ConfigError(
                f"router: groups are ranked by their best {self.group_best} experts, but have {size} each; choose at "
                f"most {experts // self.group_best} groups ({GROUPS})"
            )
        if per_token > self.chosen_groups * size:
            raise ConfigError(
                f"router: {per_token} experts per token ({TAKEN}) exceed the {self.chosen_groups * size} experts of "
                f"{self.chosen_groups} groups (topk_group); lower the former or raise topk_group"
            )


class Router(MatmulModule):
    """Map `[T, M]` to each token's experts and weights. Replicated: every device computes the same selection."""

    def __init__(self, build: Build, width: int, experts: int, per_token: int, config: RouterConfig):
        config.check(experts, per_token)
        self.config, self.per_token = config, per_token
        self.weight = weight(build, (experts, width), (None, axes.EMBED), width**-0.5)
        self.bias = constant(build, (experts,), (None,), 0.0) if config.bias else None
        self.correction = param(build, jnp.zeros(experts, jnp.float32), (None,)) if config.correction else None
        self.scale = constant(build, (width,), (axes.EMBED,), 1.0) if config.input_norm else None
        self.expert_scale = constant(build, (experts,), (None,), 1.0) if config.expert_scale else None

    def __call__(self, x: jax.Array, given: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Return experts `[T, k]` int32 and weights `[T, k]` float32, best first; `given` as in `route`."""
        if self.scale is not None:
            x = normalise(x, self.config.input_norm).astype(x.dtype)
            x = scale_by(x * self.scale[...], x.shape[-1] ** -0.5)
        logits = self.product(x, self.weights, jnp.float32)
        if self.bias is not None:
            logits = logits + self.bias[...].astype(jnp.float32)
        correction = None if self.correction is None else self.correction[...]
        chosen, weights = route(logits, self.per_token, self.config, correction, given)
        if self.expert_scale is not None:
            weights = weights * self.expert_scale[...].astype(jnp.float32)[chosen]
        return chosen, weights


def route(
    logits: jax.Array,
    per_token: int,
    config: RouterConfig,
    correction: jax.Array | None = None,
    given: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Select experts from float32 logits `[T, E]`; ties go to the lower index.

    Args:
        logits: `[T, E]` float32.
        per_token: k.
        config: how scores determine the selection.
        correction: `[E]`, added to scores for selection only.
        given: experts `[T, k]` int32 to take instead of the best; their weights are those of these logits.

    Returns:
        Experts `[T, k]` int32 and weights `[T, k]` float32, best first.
    """
    if config.score == SPARSEMIXER:
        return _sparse_mixer(logits, config, jax.lax.top_k(logits, per_token)[1] if given is None else given)
    sigmoid = config.score == SIGMOID
    ranks = jax.nn.sigmoid(logits) if sigmoid else logits  # softmax preserves the order
    if not sigmoid and (correction is not None or config.groups > 1):
        ranks = jax.nn.softmax(logits, axis=-1)
    scores = ranks
    if correction is not None:
        ranks = ranks + correction
    if config.groups > 1:
        ranks = jnp.where(_in_chosen_groups(ranks, config), ranks, -jnp.inf)
    if given is None and config.by_logit:
        best, chosen = jax.lax.top_k(logits, per_token)
        best = jax.nn.sigmoid(best)
    elif given is None:
        best, chosen = jax.lax.top_k(ranks, per_token)
    else:
        best, chosen = jnp.take_along_axis(scores, given, axis=-1), given
    if given is None and scores is not ranks:
        best = jnp.take_along_axis(scores, chosen, axis=-1)
    if scores is logits:
        return chosen, config.scale * _softmax(best, logits, config.renormalise)
    if config.renormalise:
        best = best / (jnp.sum(best, axis=-1, keepdims=True) + config.epsilon)
    return chosen, config.scale * best


def _sparse_mixer(logits: jax.Array, config: RouterConfig, chosen: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the two experts `[T, 2]` and their weights; the second one's softmax is without the first."""
    weights, left = [], logits
    for place in (0, 1):
        best = jnp.take_along_axis(logits, chosen[:, place : place + 1], axis=-1)
        far = (best - logits) / jnp.maximum(jnp.abs(logits), best) > 2 * config.jitter
        close = jnp.where(far, -jnp.inf, left)
        weights.append(jnp.exp(best - jax.nn.logsumexp(close, axis=-1, keepdims=True)))
        left = jnp.where(jnp.arange(logits.shape[-1]) == chosen[:, place : place + 1], -jnp.inf, left)
    return chosen, config.scale * jnp.concatenate(weights, axis=-1)


def _softmax(best: jax.Array, logits: jax.Array, renormalise: bool) -> jax.Array:
    """Return the softmax weights of selected logits, normalized over the selected ones or over all."""
    if renormalise:
        return jax.nn.softmax(best, axis=-1)
    return jnp.exp(best - jax.nn.logsumexp(logits, axis=-1, keepdims=True))


def _in_chosen_groups(ranks: jax.Array, config: RouterConfig) -> jax.Array:
    """Return which experts are in a token's selected groups, `[T, E]` bool."""
    grouped = ranks.reshape(ranks.shape[0], config.groups, -1)
    sums = jnp.sum(jax.lax.top_k(grouped, config.group_best)[0], axis=-1)
    _, chosen = jax.lax.top_k(sums, config.chosen_groups)
    within = jnp.any(chosen[:, :, None] == jnp.arange(config.groups), axis=1)
    return jnp.repeat(within, grouped.shape[2], axis=1)
