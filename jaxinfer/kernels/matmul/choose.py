"""Products of rows of activations with a weight `[out, in]`: XLA's, or on a CPU the native one (`native/matmul.cc`)."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxinfer._utils.log import warn_once
from jaxinfer.errors import ConfigError
from jaxinfer.kernels.native import build
from jaxinfer.kernels.triton import triton_launch

XLA, NATIVE, TRITON = "xla", "native", "triton"
"""Names of implementations. "triton" has grouped products (`kernels.matmul.grouped`) and those with weights in codes
(`packed_matmul`); XLA computes the others."""
RAGGED = "ragged"
"""XLA's products, with `jax.lax.ragged_dot` for groups, which is differentiable (`jaxinfer.functional.training`); not a
user setting."""
STABLE = "stable"
"""The native product in a form whose result for a row has the same bits for any number of rows; it skips rows of zeros
at the end. Deterministic engines use it in place of "native" (`stable`); not a user setting."""
NATIVES = (NATIVE, STABLE)

MATRIX_UNIT_ROWS = 16
"""Most rows for which the native bfloat16 product is used on a CPU with matrix units (AMX); XLA uses these units for
more rows. Up to this number, reading the weights takes the time, which XLA does at a little over half the speed."""


def choose(requested: str, mesh: Mesh) -> str:
    """Choose the implementation for the devices of a mesh.

    Raises:
        ConfigError: the implementation is unknown or cannot run here.
    """
    if requested not in ("auto", XLA, NATIVE, TRITON):
        raise ConfigError(f"matmul_kernel must be auto, {XLA}, {NATIVE} or {TRITON}, got {requested!r}")
    if requested == TRITON or requested == "auto" and mesh.devices.flat[0].platform != "cpu":
        supported, lacking = triton_launch.supports("matmul_kernel", requested, mesh)
        if not supported and triton_launch.target(mesh) is not None:
            warn_once("products of a mixture of experts run in XLA, one expert after another", lacking)
        return TRITON if supported else XLA
    # XLA cannot divide the native call over devices.
    return XLA if requested == "auto" and mesh.devices.size > 1 else build.choose("matmul_kernel", requested, mesh)


def stable(kernel: str) -> str:
    """Return the implementation with which a row's result does not depend on the number of rows beside it.

    XLA's and Triton's depend on the shape alone, which deterministic steps keep the same.
    """
    return STABLE if kernel == NATIVE else kernel


def matmul(
    x: jax.Array,
    weight: jax.Array,
    dtype: jax.typing.DTypeLike | None = None,
    *,
    kernel: str = XLA,
    part: tuple[int, int] | None = None,
) -> jax.Array:
    """Compute `[T, in] x [out, in]^T -> [T, out]` in `dtype`, by default that of `x`, with float32 sums.

    `part`: first and end of the weight's rows to multiply with, which are not copied; None for all.
    """
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    first, end = part or (0, weight.shape[0])
    if kernel in NATIVES and _native(x, weight, dtype):
        result = jax.ShapeDtypeStruct((x.shape[0], end - first), dtype)
        return jax.ffi.ffi_call("jaxinfer_matmul", result)(x, weight, first=np.int64(first), stable=kernel == STABLE)
    weight = weight[first:end]
    # TF32 would break parity on a GPU.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=dtype)


def _native(x: jax.Array, weight: jax.Array, dtype: jnp.dtype) -> bool:
    if x.dtype != weight.dtype or dtype not in (x.dtype, jnp.float32):
        return False
    if x.dtype == jnp.float32:
        return True
    if x.dtype != jnp.bfloat16:
        warn_once(
            "products run in XLA, which is slower", f"the CPU kernel computes float32 and bfloat16, not {x.dtype}"
        )
    return x.dtype == jnp.bfloat16 and x.shape[1] % 2 == 0 and not prefers_matrix_units(x)


def prefers_matrix_units(x: jax.Array) -> bool:
    """Return whether XLA's product of these rows is faster than the native one, on a CPU with matrix units."""
    return x.dtype == jnp.bfloat16 and x.shape[0] > MATRIX_UNIT_ROWS and cpu_has_matrix_units()


def cpu_has_matrix_units() -> bool:
    """Return whether this CPU multiplies matrices in bfloat16 (AMX)."""
    return "amx_bf16" in build.cpu_flags()
