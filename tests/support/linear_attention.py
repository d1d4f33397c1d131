"""Recurrent layers: transformers' modules with random weights, jaxinfer's with the same weights, and runners."""

from collections.abc import Mapping
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from jax.sharding import Mesh
from transformers import GraniteMoeHybridConfig, KimiLinearConfig, Qwen3NextConfig
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from jaxinfer.checkpoint import rules
from jaxinfer.kernels.state.slots import DecodeSlots, Segments
from jaxinfer.layers.delta import DeltaSpec
from jaxinfer.layers.delta_net import DeltaNetSpec, GatedDeltaNet
from jaxinfer.layers.kda import KimiDeltaAttention
from jaxinfer.layers.linear import use_fusion
from jaxinfer.layers.mamba import Mamba, MambaSpec
from jaxinfer.layers.params import Build
from jaxinfer.layers.recurrent import RecurrentState
from jaxinfer.models.recurrent_rules import delta_net_rules, kda_rules, mamba_rules
from jaxinfer.sharding import make_mesh
from jaxinfer.sharding import rules as sharding_rules
from jaxinfer.sharding.policy import Placement

M, SLOTS = 32, 6
KDA, NET, MAMBA = "kda", "delta net", "mamba"
SPECS = {
    KDA: DeltaSpec(M, 4, 8, 4, 8, 4, 1e-5),
    NET: DeltaNetSpec(M, 4, 8, 8, 12, 4, 1e-6),
    MAMBA: MambaSpec(M, 4, 16, 2, 12, 4),
}
MODULES = {KDA: KimiDeltaAttention, NET: GatedDeltaNet, MAMBA: Mamba}
RULES = {
    KDA: kda_rules("a", "layer"),
    NET: delta_net_rules(SPECS[NET], "a", "layer"),
    MAMBA: mamba_rules(SPECS[MAMBA], "a", "layer"),
}


@cache
def reference(kind: str) -> torch.nn.Module:
    """Return transformers' layer with activations of order one and decays from weak to strong."""
    spec = SPECS[kind]
    if kind == KDA:
        config = KimiLinearConfig(
            hidden_size=M,
            linear_num_heads=spec.value_heads,
            linear_head_dim=spec.value_dim,
            linear_conv_kernel_dim=spec.taps,
            rms_norm_eps=spec.norm_eps,
            num_hidden_layers=2,
        )
        made = KimiLinearDeltaAttention(config, 0)
    elif kind == MAMBA:
        config = GraniteMoeHybridConfig(
            hidden_size=M,
            mamba_n_heads=spec.heads,
            mamba_n_groups=spec.groups,
            mamba_d_state=spec.state_dim,
            mamba_d_conv=spec.taps,
            rms_norm_eps=spec.norm_eps,
            num_hidden_layers=2,
        )
        made = GraniteMoeHybridMambaLayer(config, 0)
    else:
        config = Qwen3NextConfig(
            hidden_size=M,
            linear_num_key_heads=spec.key_heads,
            linear_key_head_dim=spec.key_dim,
            linear_num_value_heads=spec.value_heads,
            linear_value_head_dim=spec.value_dim,
            linear_conv_kernel_dim=spec.taps,
            rms_norm_eps=spec.norm_eps,
            num_hidden_layers=2,
        )
        made = Qwen3NextGatedDeltaNet(config, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in made.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if "norm" in name:
                value.copy_(1 + 0.4 * noise)
            elif "A_log" in name:
                value.copy_(1.5 * noise)
            elif "dt_bias" in name:
                value.copy_(noise - 2)
            else:
                value.copy_(1.5 * (value.numel() / value.shape[0]) ** -0.5 * noise)
    return made.float().eval()


@torch.no_grad()
def expected(kind: str, x: np.ndarray) -> np.ndarray:
    """Return transformers' output for one sequence `[T, M]` in a single call."""
    return reference(kind)(torch.from_numpy(x)[None])[0].numpy()


def tensors(kind: str, hub: bool = False) -> dict[str, np.ndarray]:
    """Return the layer's tensors with the prefix "a", named as in transformers or, if `hub`, as in Kimi-Linear's Hub
    checkpoints."""
    found = {f"a.{name}": value.numpy() for name, value in reference(kind).state_dict().items()}
    if not hub:
        return found
    found = {name.replace("forget_gate.", ""): value for name, value in found.items()}
    packed = found.pop("a.conv1d.weight")
    return found | {f"a.{part}_conv1d.weight": own for part, own in zip("qkv", np.split(packed, 3), strict=True)}


class Arrays:
    """Checkpoint source of tensors in memory."""

    def __init__(self, content: Mapping[str, np.ndarray]):
        self.content = content

    def names(self) -> list[str]:
        return list(self.content)

    def info(self, name: str) -> np.ndarray:
        return self.content[name]

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> np.ndarray:
        return self.content[name][slices or ()]

    def release(self) -> None:
        pass


class Holder(nnx.Module):
    """Module that holds the layer at a path."""

    def __init__(self, build: Build, kind: str, spec: DeltaSpec | None = None):
        self.layer = MODULES[kind](build.at("layer"), spec or SPECS[kind])


def layer(
    kind: str,
    tp: int = 1,
    *,
    hub: bool = False,
    fused: bool = True,
    quantization: str | None = None,
    placement: Mapping[str, str] | None = None,
) -> nnx.Module:
    """Return jaxinfer's layer with the reference's weights, read by the real loader."""
    mesh = make_mesh(tp)
    build = partial(
        Build, dtype=jnp.dtype("float32"), mesh=mesh, quantization=quantization, placement=Placement.of(placement)
    )
    holder = nnx.eval_shape(lambda: Holder(build(nnx.Rngs(0)), kind))
    rules.load(holder, RULES[kind], Arrays(tensors(kind, hub)), mesh, progress=False)
    use_fusion(holder, fused)
    return holder.layer


def empty(made: nnx.Module, mesh: Mesh, slots: int = SLOTS, value: float = np.nan) -> RecurrentState:
    """Return the sharded state of all slots, filled with `value`, which the layer must not read."""
    arrays = []
    for own in made.cache_spec.arrays:
        shape = slots, *own.shape
        placed = sharding_rules.sharding(mesh, (None, *own.axes), shape, "state", replicated=made.replicated)
        arrays.append(jax.device_put(np.full(shape, value, own.dtype), placed))
    return RecurrentState(*arrays)


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def step(
    graph: nnx.GraphDef, params: nnx.State, x: jax.Array, state: RecurrentState, rows: DecodeSlots | Segments
) -> tuple[jax.Array, RecurrentState]:
    """Run one step of the layer."""
    return nnx.merge(graph, params)(x, state, rows)
