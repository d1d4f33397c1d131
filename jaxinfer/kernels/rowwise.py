"""Operations on the rows (tokens) of activations between products, by the native CPU kernels (`native/rowwise.cc`).

XLA divides them into a loop each for additions, sums, and scaling, and computes them for a step's padding as well. The
kernels read operands once, round results to their dtype once (a norm's that is scaled in the model's dtype, twice), and
skip zeros. Layers compute them in XLA wherever `serves` says that the kernels do not.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.kernels.matmul.choose import NATIVES

GATES = {
    "silu": 0,
    "swish": 0,
    "gelu_pytorch_tanh": 1,
    "gelu_new": 1,
    "gelu": 2,
    "relu": 3,
    "relu2": 4,
}
"""Activations by Hugging Face's names, and their numbers in the kernel."""


class RmsScaling(NamedTuple):
    """How an RMSNorm is computed: the epsilon, and the fields of `layers.norms.Scaling`."""

    eps: float
    offset: float
    wide: bool

    @property
    def attributes(self) -> dict[str, np.generic | bool]:
        """Attributes of the kernel's call."""
        return {"eps": np.float32(self.eps), "offset": np.float32(self.offset), "wide": self.wide}


def serves(kernel: str, *arrays: jax.Array) -> bool:
    """Return whether the native kernels compute with these arrays, under this implementation of products."""
    dtype = arrays[0].dtype
    return kernel in NATIVES and dtype in (jnp.bfloat16, jnp.float32) and all(a.dtype == dtype for a in arrays)


def gated(gate: jax.Array, up: jax.Array, activation: str, columns: int, firsts: tuple[int, int]) -> jax.Array:
    """Compute `act(gate) * up` of columns of two arrays, or of the same one, in float32: `[T, columns]`.

    Args:
        gate: `[T, A]`.
        up: `[T, B]`.
        activation: name in `GATES`.
        columns: number of columns.
        firsts: first column of each.
    """
    call = jax.ffi.ffi_call("jaxinfer_gated", jax.ShapeDtypeStruct((gate.shape[0], columns), gate.dtype))
    numbers = {"activation": np.int64(GATES[activation])}
    return call(gate, up, gate_first=np.int64(firsts[0]), up_first=np.int64(firsts[1]), **numbers)


def rms_norm(x: jax.Array, scale: jax.Array, how: RmsScaling) -> jax.Array:
    """Normalise `[..., size]` with a scale `[size]` of the same dtype."""
    made = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.ffi.ffi_call("jaxinfer_rms_norm", made)(x, scale, **how.attributes)


def add_rms_norm(x: jax.Array, y: jax.Array, scale: jax.Array, how: RmsScaling) -> tuple[jax.Array, jax.Array]:
    """Return `x + y`, rounded to their dtype, and that sum normalised."""
    made = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return tuple(jax.ffi.ffi_call("jaxinfer_add_rms_norm", (made, made))(x, y, scale, **how.attributes))


def turn(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    scales: tuple[jax.Array, jax.Array] | None,
    how: RmsScaling,
    heads: tuple[int, int],
    dim: int,
    *,
    interleaved: bool,
) -> tuple[jax.Array, ...]:
    """Divide `[T, (H + 2 K) D]` into queries `[T, H, D]`, keys and values `[T, K, D]`; rotate queries and keys.

    Args:
        qkv: result of the fused projection.
        cos: cosines `[T, R/2]` float32, rounded to the dtype of `qkv` as in `layers.rope.apply_rope`; likewise `sin`.
        sin: sines.
        scales: scales `[D]` of the RMSNorms of queries and of keys before the rotation; None for no norms.
        how: of these norms.
        heads: H and K.
        dim: D.
        interleaved: whether columns 2i and 2i + 1 are rotated against each other, and stored as i and i + R/2.
    """
    none = jnp.zeros((0,), qkv.dtype)
    made = [jax.ShapeDtypeStruct((qkv.shape[0], count, dim), qkv.dtype) for count in (*heads, heads[1])]
    call = jax.ffi.ffi_call("jaxinfer_turn", made)
    return tuple(call(qkv, cos, sin, *(scales or (none, none)), **how.attributes, interleaved=interleaved))
