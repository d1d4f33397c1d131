"""Choice of the attention implementation. Each has `decode` and `prefill`, which write the cache and attend."""

from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxinfer._utils.log import warn_once
from jaxinfer.errors import ConfigError
from jaxinfer.kernels.attention import (
    mosaic_attention,
    native_attention,
    triton_attention,
    uncached_attention,
    xla_attention,
)
from jaxinfer.kernels.attention.quantised_cache import FORMATS, FP8
from jaxinfer.kernels.native import build
from jaxinfer.kernels.triton import triton_launch, triton_tiles

AUTO, XLA, TRITON, NATIVE, MOSAIC = "auto", "xla", "triton", "native", "mosaic"
XLA_PREFILL = frozenset({XLA, MOSAIC})
"""Implementations whose prefill is XLA's."""
FP8_CAPABILITY = 89
"""Ada: the first architecture with instructions that convert FP8."""
WHOLE = "whole"
"""Differentiable attention for training (`jaxinfer.functional.training`); not a user setting."""


def choose(requested: str, mesh: Mesh) -> str:
    """Choose the implementation for a mesh: Triton on GPUs, native on CPUs, and XLA where those cannot run.

    Args:
        requested: the setting: "auto", "xla", "native", "triton" or "mosaic".
        mesh: the devices.

    Raises:
        ConfigError: an unknown implementation, or one that cannot run on these devices.
    """
    if requested not in (AUTO, XLA, TRITON, NATIVE, MOSAIC):
        raise ConfigError(f"attention_kernel must be {AUTO}, {XLA}, {NATIVE}, {TRITON} or {MOSAIC}, got {requested!r}")
    if requested == XLA:
        return XLA
    device = mesh.devices.flat[0]
    if requested == NATIVE or requested == AUTO and device.platform == "cpu":
        return build.choose("attention_kernel", requested, mesh)
    if requested == MOSAIC:
        mosaic_attention.check("attention_kernel", mesh)
        return MOSAIC
    supported, lacking = triton_launch.supports("attention_kernel", requested, mesh)
    if supported:
        return TRITON
    if triton_launch.target(mesh) is not None:
        warn_once("attention uses XLA, which copies the cache blocks it reads", lacking)
    return XLA


def check_cache_dtype(kv_cache_dtype: str, dtype: np.dtype) -> None:
    """Check that keys and values of activations in `dtype` can be stored as `kv_cache_dtype` says.

    Raises:
        ConfigError: the format is unknown, or not for this dtype.
    """
    if kv_cache_dtype not in (AUTO, *FORMATS):
        raise ConfigError(f"kv_cache_dtype must be {AUTO}, {', '.join(FORMATS)}, got {kv_cache_dtype!r}")
    if kv_cache_dtype != AUTO and dtype == np.float16:
        raise ConfigError(
            f"kv_cache_dtype is {kv_cache_dtype!r}, but dtype float16 has too few exponents for attention weights "
            "times scales; use dtype='bfloat16', or kv_cache_dtype='auto'"
        )


def check_cache(kernel: str, kv_cache_dtype: str, dtype: np.dtype, mesh: Mesh) -> None:
    """Check that an implementation from `choose` reads keys and values stored as `kv_cache_dtype` says.

    Raises:
        ConfigError: the format is unknown, or not for this dtype or these devices.
    """
    check_cache_dtype(kv_cache_dtype, dtype)
    if kv_cache_dtype == AUTO:
        return
    device = triton_launch.target(mesh)
    if kernel == TRITON and FORMATS[kv_cache_dtype] == FP8 and device.capability < FP8_CAPABILITY:
        raise ConfigError(
            f"kv_cache_dtype is {kv_cache_dtype!r}, which needs a GPU of compute capability {FP8_CAPABILITY / 10}; "
            f"this one has {device.capability / 10}; use 'int8'"
        )


def implementation(name: str, mesh: Mesh, *, deterministic: bool = False) -> Any:
    """Return the object with `decode` and `prefill` for a name from `choose`, or with `prefill` alone for `WHOLE`.

    With `deterministic`, a query's result from `prefill` does not depend on its tile. The XLA and native
    implementations always have this property.
    """
    if name == WHOLE:
        return uncached_attention
    if name in (XLA, NATIVE):
        return xla_attention if name == XLA else native_attention
    if name == MOSAIC:
        return mosaic_attention.MosaicAttention(triton_launch.target(mesh))
    return triton_attention.TritonAttention(triton_launch.target(mesh), deterministic)


def prefill_tile(name: str, group: int, value_dim: int, itemsize: int) -> int:
    """Return the queries per prefill tile that suit an implementation.

    Args:
        name: result of `choose`.
        group: query heads per kv head, G.
        value_dim: Dv.
        itemsize: bytes per element of the queries.
    """
    if name == TRITON:
        return triton_tiles.tile(group, value_dim, itemsize)
    return native_attention.TILE if name == NATIVE else xla_attention.TILE
