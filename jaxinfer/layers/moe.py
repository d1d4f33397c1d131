"""Mixture of experts (MoE): router, grouped GEMMs over experts, shared experts, and a single all-reduce.

    MoEConfig(experts=128, per_token=8, ffn=768)                                           # Qwen3-MoE
    MoEConfig(8, 2, 14336)                                                                 # Mixtral
    MoEConfig(32, 4, 2880, RouterConfig(bias=True), ClampedSwiGLU(), bias=True)            # gpt-oss
    MoEConfig(256, 8, 2048, RouterConfig("sigmoid", scale=2.5, correction=True, groups=8, chosen_groups=4), shared=2048)
    MoEConfig(512, 10, 512, shared=512, shared_gate=True)                                  # Qwen3-Next
    MoEConfig(16, 1, 8192, RouterConfig("sigmoid", renormalise=False, by_logit=True), shared=8192, weigh_inputs=True)

Models create `MoE(build.at("mlp"), width, config)` in place of an MLP, call it with the step's context, and name its
tensors with `models.moe_rules`. No token is dropped, however unbalanced the experts are; padding rows are routed to no
expert.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxinfer.errors import ConfigError
from jaxinfer.kernels import rowwise
from jaxinfer.kernels.matmul import grouped, int8_matmul
from jaxinfer.kernels.matmul.grouped import Dispatch
from jaxinfer.kernels.matmul.packed_matmul import Packed
from jaxinfer.kernels.triton import triton_launch
from jaxinfer.kernels.triton.triton_launch import Target
from jaxinfer.layers.attention import StepContext
from jaxinfer.layers.linear import MatmulModule, Output, Weights
from jaxinfer.layers.mlp import ACTIVATIONS, GatedMLP
from jaxinfer.layers.params import Build, constant, matrix, weight
from jaxinfer.layers.router import Router, RouterConfig
from jaxinfer.layers.sharded import model_axis, on_shards
from jaxinfer.sharding import axes
from jaxinfer.sharding.collectives import ALL_REDUCE, Collective
from jaxinfer.sharding.policy import EXPERTS, SHARD, any_layer
from jaxinfer.sharding.rules import indivisible, spec

Arrays: TypeAlias = dict[str, jax.Array]
"""Parameters of a module by name."""


@dataclass(frozen=True)
class ClampedSwiGLU:
    """Activation of gpt-oss: `(clip(up, -limit, limit) + 1) * g * sigmoid(alpha * g)`, `g = min(gate, limit)`."""

    alpha: float = 1.702
    limit: float = 7.0

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """Apply the activation elementwise."""
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        return (up + 1) * gate * jax.nn.sigmoid(self.alpha * gate)


@dataclass(frozen=True)
class MoEConfig:
    """Configuration of a mixture-of-experts layer.

    Raises:
        ConfigError: inconsistent sizes or an unknown activation.
    """

    experts: int
    """E."""
    per_token: int
    """k: experts per token."""
    ffn: int
    """F of one expert."""
    router: RouterConfig = RouterConfig()
    activation: str | ClampedSwiGLU = "silu"
    """Name in `layers.mlp.ACTIVATIONS`, applied to the gate before multiplying with up, or a function of both."""
    bias: bool = False
    """Whether the experts' gate, up and down projections have biases."""
    gated: bool = True
    """Whether experts, shared ones too, have a gate; False: `down(act(up(x)))` (Nemotron-H)."""
    shared: int = 0
    """Total F of the shared experts, which every token goes to; 0 for none."""
    shared_gate: bool = False
    """Whether the shared experts' output is multiplied by a per-token sigmoid gate."""
    weigh_inputs: bool = False
    """Whether weights multiply the inputs of experts and not their outputs (Llama 4)."""

    def __post_init__(self) -> None:
        self.router.check(self.experts, self.per_token)
        if isinstance(self.activation, str) and self.activation not in ACTIVATIONS:
            raise ConfigError(f"experts: activation is {self.activation!r}; supported: {', '.join(ACTIVATIONS)}")
        if not self.gated and not isinstance(self.activation, str):
            raise ConfigError("experts: an activation of gate and up needs gated=True")
        if self.shared_gate and not self.shared:
            raise ConfigError("experts: shared_gate is set without shared experts; set shared to their width")
        if self.weigh_inputs and self.bias:
            raise ConfigError("experts: weigh_inputs is set, but biases have no weight then; unset one of them")

    @property
    def outputs(self) -> tuple[Output, ...]:
        """Outputs of an expert's first projection."""
        return tuple(Output(name, self.ffn) for name in (("gate", "up") if self.gated else ("up",)))

    def activate(self, hidden: jax.Array, kernel: str) -> jax.Array:
        """Apply the activation to gate and up, `[R, 2 F]` -> `[R, F]`, or to up alone, `[R, F]`.

        `kernel` is the implementation of products (`kernels.matmul.choose`).
        """
        if not self.gated:
            return ACTIVATIONS[str(self.activation)](hidden)
        if isinstance(self.activation, str) and rowwise.serves(kernel, hidden):
            columns = hidden.shape[-1] // 2
            return rowwise.gated(hidden, hidden, self.activation, columns, (0, columns))
        gate, up = jnp.split(hidden, 2, axis=-1)
        if isinstance(self.activation, str):
            return ACTIVATIONS[self.activation](gate) * up
        return self.activation(gate, up)


class ExpertLinear(MatmulModule):
    """Weights of one projection for all experts, stacked. Runs on local shapes only.

    Args:
        build: how parameters are made.
        shape: shape of the weight.
        names: logical axes.
        bias: number of leading axes a bias has; 0 for no bias.
        block: columns per block that int8 matmuls rotate (`int8_matmul.rotation`).
        divided: number of devices that the columns of the weight are divided over.
        **metadata: for the loader (`params.weight`).
    """

    def __init__(
        self,
        build: Build,
        shape: tuple[int, ...],
        names: tuple[str | None, ...],
        *,
        bias: int,
        block: int,
        divided: int = 1,
        **metadata: Any,
    ):
        self.block, self.divided = block, divided
        self.weight, self.weight_scale = matrix(
            build, shape, names, shape[-1] ** -0.5, block=block, stacked=True, **metadata
        )
        kept = {name: value for name, value in metadata.items() if name == "outputs"}
        self.bias = constant(build, shape[:bias], names[:bias], 0.0, stacked=True, **kept) if bias else None

    def rows(self, x: jax.Array, pairs: Dispatch, own: Arrays, target: Target | None) -> jax.Array:
        """Multiply tokens sorted by expert: `[R, in]` -> `[R, out]`, without the bias.

        Args:
            x: `[R, in]`.
            pairs: assignment of rows to experts.
            own: local parameters.
            target: the GPU that the kernel is compiled for, if any.
        """
        weight, scales, zeros = Weights.of(own)
        weight = weight.reshape(weight.shape[0], -1, weight.shape[-1])
        if weight.dtype == jnp.uint8:
            grids = (None if one is None else one.reshape(*weight.shape[:2], -1) for one in (scales, zeros))
            return grouped.packed(x, Packed(weight, *grids), pairs.offsets, kernel=self.kernel, target=target)
        scales = None if scales is None else scales.reshape(weight.shape[:2])
        return grouped.matmul(x, weight, pairs.offsets, scales, kernel=self.kernel, target=target, block=self.block)


class MoE(MatmulModule):
    """`sum_j w_j down_j(act(gate_j(x), up_j(x)))` over each token's experts j, plus shared experts.

    By default every expert's width F is sharded, like an MLP's; with the placement tactic "experts" each device has E /
    tp whole experts. Router and tokens are replicated in both cases, and a single all-reduce sums the devices' outputs.
    """

    no_split = True
    """A placement shards or replicates all parts together (`loading.weights.placeable`)."""
    has_experts = True
    """Whether a placement may use the tactic "experts"."""

    def __init__(self, build: Build, width: int, config: MoEConfig):
        self.config, self.tp = config, build.tp
        self.by_expert = build.by_expert and build.tp > 1
        _check_divides(build, config)
        self.router = Router(build.at("router"), width, config.experts, config.per_token, config.router)
        shards, stack, ffn = (1, axes.EXPERT, None) if self.by_expert else (build.tp, None, axes.FFN)
        outputs = config.outputs
        columns = sum(output.columns(shards) for output in outputs)
        self.gate_up = ExpertLinear(
            build.at("gate_up"),
            (config.experts, shards, columns, width),
            (stack, None if self.by_expert else axes.SHARD, axes.COLUMNS, axes.EMBED),
            bias=3 if config.bias else 0,
            block=int8_matmul.rotation(width),
            outputs=outputs,
        )
        self.down = ExpertLinear(
            build.at("down"),
            (config.experts, width, config.ffn),
            (stack, axes.EMBED, ffn),
            bias=2 if config.bias else 0,
            block=int8_matmul.rotation(config.ffn, build.tp),
            divided=1 if self.by_expert else build.tp,
        )
        self.shared = (
            GatedMLP(build.at("shared"), width, config.shared, str(config.activation), summed=False, gated=config.gated)
            if config.shared
            else None
        )
        self.shared_gate = weight(build, (1, width), (None, axes.EMBED), width**-0.5) if config.shared_gate else None

    def __call__(self, x: jax.Array, step: StepContext, ranked: jax.Array | None = None) -> jax.Array:
        """Map `[T, M]` to `[T, M]`; padding rows get only the shared experts' output.

        `ranked` is the router's input `[T, M]`, if it is not that of the experts.
        """
        chosen, weights = self.router(x if ranked is None else ranked, None if step.routed is None else step.routed[0])
        chosen = jnp.where(step.real[:, None], chosen, self.config.experts)
        hidden = None if self.shared is None else self._gated(x, self.shared.hidden(x))
        parts = {"gate_up": self.gate_up, "down": self.down}
        if self.shared is not None:
            parts["shared"] = self.shared.down
        operands = x, chosen, weights, hidden, {name: _arrays(part) for name, part in parts.items()}
        local = partial(self._local, triton_launch.target(step.mesh))
        whole, shards = PartitionSpec(), PartitionSpec(None, model_axis(self.tp))
        specs = whole, whole, whole, shards, {name: _specs(part) for name, part in parts.items()}
        return on_shards(local, step.mesh, specs, whole, *operands)

    def _gated(self, x: jax.Array, hidden: jax.Array) -> jax.Array:
        """Gate the shared experts' hidden states `[T, tp, F / tp]`, which commutes with `down` as it has no bias."""
        if self.shared_gate is None:
            return hidden
        gate = jax.nn.sigmoid(self.product(x, Weights(self.shared_gate[...]), jnp.float32))
        return (hidden * gate[..., None]).astype(hidden.dtype)

    def _local(
        self,
        target: Target | None,
        x: jax.Array,
        chosen: jax.Array,
        weights: jax.Array,
        hidden: jax.Array | None,
        own: dict[str, Arrays],
    ) -> jax.Array:
        """Compute this device's part of the output, all-reduced if sharded."""
        experts = own["down"]["weight"].shape[0]
        if self.by_expert:
            chosen = chosen - jax.lax.axis_index(axes.MODEL) * experts
        pairs = grouped.dispatch(chosen, experts)
        rows = x[pairs.tokens]
        if self.config.weigh_inputs:
            each = jnp.zeros(weights.size, weights.dtype).at[pairs.places.ravel()].set(weights.ravel())
            rows, weights = (rows * each[:, None]).astype(x.dtype), jnp.ones_like(weights)
        y = self.gate_up.rows(rows, pairs, own["gate_up"], target)
        if self.config.bias:
            y = y + own["gate_up"]["bias"].reshape(experts, -1)[pairs.experts]
        y = self.down.rows(self.config.activate(y, self.down.kernel), pairs, own["down"], target)
        if self.config.bias:
            y = y + self._once(own["down"]["bias"])[pairs.experts]
        y = grouped.combine(y, weights, pairs.places, pairs.offsets[-1])
        if self.shared is not None and hidden is not None:
            y = y + self.shared.down.product(hidden[:, 0], Weights.of(own["shared"]))
        return y if self.tp == 1 else jax.lax.psum(y, axes.MODEL)

    def _once(self, bias: jax.Array) -> jax.Array:
        """Zero the bias on all devices but one if every expert is sharded, so that the all-reduce adds it once."""
        if self.tp == 1 or self.by_expert:
            return bias
        return jnp.where(jax.lax.axis_index(axes.MODEL) == 0, bias, 0)

    def collectives(self) -> list[Collective]:
        """Return the all-reduce of the experts' partial sums, shared experts included."""
        return [] if self.tp == 1 else [Collective(ALL_REDUCE, "partial sums", self.down.weight.shape[1])]


def _check_divides(build: Build, config: MoEConfig) -> None:
    """Check that experts, or their widths, divide evenly over the shards.

    Raises:
        ConfigError: they do not.
    """
    by_expert = build.by_expert
    name, size = (axes.EXPERT, config.experts) if by_expert else (axes.FFN, config.ffn)
    if size % build.tp == 0:
        return
    other = SHARD if by_expert else EXPERTS
    divided = config.ffn if by_expert else config.experts
    more = f"shard {'within' if by_expert else 'by'} experts with placement={{{any_layer(build.path)!r}: {other!r}}}"
    raise indivisible(
        build.path or "experts",
        f"axis {name!r} of size {size}{'' if by_expert else ' (of each expert)'}",
        build.tp,
        lambda count: size % count == 0,
        module=build.path,
        more=more if divided % build.tp == 0 else "",
    )


def _arrays(part: nnx.Module) -> Arrays:
    """Return the parameters of a module by name."""
    return {name: value[...] for name, value in vars(part).items() if isinstance(value, nnx.Param)}


def _specs(part: nnx.Module) -> dict[str, PartitionSpec]:
    """Return the partition specs of a module's parameters by name."""
    params = {name: value.get_metadata() for name, value in vars(part).items() if isinstance(value, nnx.Param)}
    return {
        name: PartitionSpec() if metadata["replicated"] else spec(metadata["logical_axes"])
        for name, metadata in params.items()
    }
