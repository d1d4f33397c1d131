"""LoRA adapters (arXiv:2106.09685) of projections: `y += B A x`, with an adapter of its own for each token.

A projection holds the matrices of S adapters of rank R, zeros where a slot is free. A step multiplies its tokens with
all of `A`, sets what belongs to other slots than the token's own to zero, and multiplies with all of `B`: two GEMMs of
S * R columns, for any mixture of adapters, without sorting or gathering. Tokens without an adapter add zero.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from jaxinfer.errors import ConfigError
from jaxinfer.layers.linear import FusedLinear, MatmulModule, RowLinear, Weights
from jaxinfer.sharding import axes
from jaxinfer.sharding.collectives import ALL_REDUCE, Collective

NONE = -1
"""Slot of a token without an adapter."""


class AdapterWeight(nnx.Variable):
    """Matrices of all adapters of a projection; no parameter of the model (`nnx.Param`), so no checkpoint holds it."""


class Adapters(MatmulModule):
    """Adapters of one projection.

    Args:
        slots: S, the number of adapters.
        rank: R, the largest rank; adapters of a smaller one are padded with zeros.
    """

    tokens: jax.Array | None = None
    """Slot of each token of the step, `[T]` int32, `NONE` for none; None in steps without adapters. Set by `attach`."""

    def __init__(self, slots: int, rank: int):
        self.slots, self.rank = slots, rank

    def _own(self, hidden: jax.Array) -> jax.Array:
        """Set what belongs to other slots than the token's own to zero.

        Args:
            hidden: `[T, outputs * S * R]`.

        Returns:
            `[T, outputs, S * R]`.
        """
        shaped = hidden.reshape(len(hidden), -1, self.slots, self.rank)
        own = self.tokens[:, None] == jnp.arange(self.slots)
        # Selected, not multiplied: hidden states of padding may be NaN.
        return jnp.where(own[:, None, :, None], shaped, 0).reshape(*shaped.shape[:2], -1)


class FusedAdapters(Adapters):
    """Adapters of a fused projection: each output has its own."""

    def __init__(self, linear: FusedLinear, slots: int, rank: int, dtype: jnp.dtype):
        super().__init__(slots, rank)
        self.outputs, tp, width = linear.outputs, linear.tp, linear.in_features
        own = _metadata(linear)
        self.a = _weight((len(self.outputs) * slots * rank, width), dtype, own, (None, None))
        for output in self.outputs:
            shape, names = (tp, output.columns(tp), slots * rank), (axes.SHARD, axes.COLUMNS, None)
            setattr(self, f"b_{output.name}", _weight(shape, dtype, own, names, outputs=(output,)))

    def add(self, x: jax.Array, outputs: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Add the adapters of the tokens `[T, in]` to the projection's outputs `[T, tp, columns_i]`."""
        if self.tokens is None:
            return outputs
        hidden = self._own(self.product(x, Weights(self.a[...])))
        made = []
        for number, (output, y) in enumerate(zip(self.outputs, outputs, strict=True)):
            change = self.product(hidden[:, number], Weights(getattr(self, f"b_{output.name}")[...]), y.dtype)
            made.append(y + change.reshape(y.shape))
        return tuple(made)


class RowAdapters(Adapters):
    """Adapters of a row-parallel projection: `A` is divided like its input, `B` is whole on each device."""

    def __init__(self, linear: RowLinear, slots: int, rank: int, dtype: jnp.dtype):
        super().__init__(slots, rank)
        own, out, width = _metadata(linear), linear.weight.shape[0], linear.in_features
        inputs = linear.inputs
        shape, names = (slots * rank, width), (None, own["logical_axes"][1])
        self.a = _weight(shape, dtype, own, names, unpadded=(slots * rank, inputs.rows), inputs=inputs)
        self.b = _weight((out, slots * rank), dtype, own, (None, None))
        self.tp = linear.tp

    def add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Add the adapters of the tokens `[T, tp, in / tp]` to the projection's output `[T, out]`."""
        if self.tokens is None:
            return y
        hidden = self._own(self.product(x, Weights(self.a[...])))
        return y + self.product(hidden[:, 0], Weights(self.b[...]), y.dtype)

    def collectives(self) -> list[Collective]:
        """Return the all-reduce of `A x`, whose columns are divided over the shards."""
        return [Collective(ALL_REDUCE, "adapters", self.slots * self.rank)] if self.tp > 1 else []


def _metadata(linear: FusedLinear | RowLinear) -> dict:
    return linear.weight.get_metadata()


def _weight(
    shape: tuple[int, ...], dtype: jnp.dtype, linear: dict, names: tuple[str | None, ...], **metadata: object
) -> AdapterWeight:
    """Make matrices without values, placed like the projection of these metadata."""
    placed = {name: linear[name] for name in ("replicated", "module")}
    return AdapterWeight(jax.ShapeDtypeStruct(shape, dtype), logical_axes=names, **placed, **metadata)


def add(module: nnx.Module, mesh: Mesh | AbstractMesh, *, slots: int, rank: int, dtype: jnp.dtype) -> None:
    """Add adapters without values to the projections of a model that can have them.

    These are the projections of self-attention and of gated MLPs of a decoder (modules with `adaptable`), but not those
    of a mixture of experts.

    Raises:
        ConfigError: no projection of the model can have adapters, or its weights are divided over `fsdp`.
    """
    if mesh.shape.get(axes.FSDP, 1) > 1:
        raise ConfigError(
            f"max_adapters is {slots}, but the mesh axis {axes.FSDP!r} of size {mesh.shape[axes.FSDP]} divides weights "
            "that each layer gathers, which adapters do not support; leave it out of axes"
        )
    found = [linear for path, part in _adaptable(module) for linear in _linears(part)]
    if not found:
        raise ConfigError(
            f"max_adapters is {slots}, but no projection of this model can have adapters: they apply to self-attention "
            "and gated MLPs; merge the adapter into the model instead (PeftModel.merge_and_unload)"
        )
    for linear in found:
        made = FusedAdapters if isinstance(linear, FusedLinear) else RowAdapters
        linear.adapters = made(linear, slots, rank, dtype)


def _adaptable(module: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """Yield the modules whose projections can have adapters, outside of mixtures of experts, with their paths."""
    parts = {tuple(map(str, path)): part for path, part in nnx.iter_modules(module)}
    for path, part in parts.items():
        around = (parts.get(path[:end]) for end in range(len(path)))
        if getattr(part, "adaptable", False) and not any(getattr(one, "has_experts", False) for one in around):
            yield ".".join(path), part


def _linears(part: nnx.Module) -> Iterator[FusedLinear | RowLinear]:
    return (value for value in vars(part).values() if isinstance(value, FusedLinear | RowLinear))


def parts(module: nnx.Module) -> dict[str, FusedAdapters | RowAdapters]:
    """Return the adapters of a model by the path of their projection."""
    found = ((path, part) for path, part in nnx.iter_modules(module) if isinstance(part, FusedAdapters | RowAdapters))
    return {
        ".".join(map(str, path[:-1])): part for path, part in sorted(found, key=lambda pair: list(map(str, pair[0])))
    }


def attach(module: nnx.Module, tokens: jax.Array) -> None:
    """Give the slots of a step's tokens, `[T]`, to the adapters of a model that was merged for this trace alone."""
    for part in parts(module).values():
        object.__setattr__(part, "tokens", tokens)


def remove(module: nnx.Module) -> nnx.Module:
    """Remove the adapters of a model that nobody else uses, and return it."""
    for part in [part for _, part in nnx.iter_modules(module) if isinstance(part, FusedLinear | RowLinear)]:
        part.adapters = None
    return module


def nbytes(module: nnx.Module) -> int:
    """Return the bytes of all adapters of a model, each counted once."""
    weights = jax.tree.leaves(nnx.state(module, AdapterWeight))
    return sum(int(np.prod(one.shape)) * np.dtype(one.dtype).itemsize for one in weights)
