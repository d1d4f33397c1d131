"""Feed-forward blocks, gated and plain."""

from collections.abc import Callable, Mapping

import jax
from flax import nnx

from jaxinfer.kernels import rowwise
from jaxinfer.layers.linear import FusedLinear, Output, RowLinear
from jaxinfer.layers.params import Build
from jaxinfer.sharding import axes

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jax.numpy.square(jax.nn.relu(x)),
}
"""Activation functions by Hugging Face's `hidden_act` names."""


class GatedMLP(nnx.Module):
    """`down(act(gate(x)) * up(x))`, with gate and up as one GEMM (arXiv:2002.05202); `summed` as in `RowLinear`.

    Without `gated` it is `down(act(up(x)))` (Nemotron-H).
    """

    no_split = True
    """A placement shards or replicates all parts together (`loading.weights.placeable`)."""
    adaptable = True
    """Whether its projections may have LoRA adapters (`layers.adapters`)."""

    def __init__(
        self,
        build: Build,
        width: int,
        ffn: int,
        activation: str,
        *,
        bias: bool = False,
        summed: bool = True,
        gated: bool = True,
    ):
        outputs = tuple(Output(name, ffn) for name in (("gate", "up") if gated else ("up",)))
        self.gate_up = FusedLinear(build, width, outputs, bias=bias)
        self.down = RowLinear(build, axes.FFN, outputs[0], width, bias=bias, summed=summed)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[T, M]` to `[T, M]`."""
        return self.down(self.hidden(x))

    def hidden(self, x: jax.Array) -> jax.Array:
        """Map `[T, M]` to the input of `down`, `[T, tp, F / tp]`."""
        if len(self.gate_up.outputs) > 1 and self.gate_up.tp == 1 and rowwise.serves(self.gate_up.kernel, x):
            return self._native(x)[:, None]
        active, *up = self.gate_up(x)
        active = ACTIVATIONS[self.activation](active)
        return active * up[0] if up else active

    def _native(self, x: jax.Array) -> jax.Array:
        """Compute `hidden` on one device, `[T, F]`, without copies of gate and up where they are made as one array."""
        columns = self.gate_up.outputs[0].columns(1)
        if self.gate_up.is_whole:
            both = self.gate_up.whole(x)
            return rowwise.gated(both, both, self.activation, columns, (0, columns))
        gate, up = self.gate_up(x)
        return rowwise.gated(gate[:, 0], up[:, 0], self.activation, columns, (0, 0))


class MLP(nnx.Module):
    """`down(act(up(x)))` with biases."""

    no_split = True

    def __init__(self, build: Build, width: int, ffn: int, out: int, activation: str):
        hidden = Output("up", ffn)
        self.up = FusedLinear(build, width, (hidden,), bias=True)
        self.down = RowLinear(build, axes.FFN, hidden, out, bias=True)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[T, width]` to `[T, out]`."""
        (hidden,) = self.up(x)
        return self.down(ACTIVATIONS[self.activation](hidden))
