"""Rotary position embeddings (RoPE), numerically equal to transformers 5 (`modeling_rope_utils.py`) in float32.

A `RopeConfig` (plain, hashable values) is used by three functions: `rope_frequencies` on the host, `cos_sin` in the
traced step, `apply_rope` on queries and keys. Axes: T tokens, R rotated dims of a head, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.layers.rope_config import RopeConfig


class RopeFrequencies(NamedTuple):
    """Host-side constants of one rotary embedding."""

    inv_freq: np.ndarray
    """Inverse frequencies [R/2] float32, radians per position; longrope's short set; for dynamic the unscaled ones."""
    long_inv_freq: np.ndarray | None
    """[R/2] float32, longrope's set for long sequences."""
    attention_scaling: float
    """Multiplier of cos and sin."""


def rope_frequencies(config: RopeConfig) -> RopeFrequencies:
    """Compute the frequencies and attention scaling of `config` in NumPy."""
    plain = np.float32(1) / _wavelengths(config)
    if config.kind == "linear":
        return RopeFrequencies(plain / np.float32(config.factor), None, 1.0)
    if config.kind == "proportional":
        turns = np.arange(len(plain)) < config.turning
        return RopeFrequencies(np.where(turns, plain / np.float32(config.factor or 1), np.float32(0)), None, 1.0)
    if config.kind == "llama3":
        return RopeFrequencies(_llama3(config, plain), None, 1.0)
    if config.kind == "yarn":
        return RopeFrequencies(_yarn(config), None, _yarn_scaling(config))
    if config.kind == "longrope":
        short, long = (
            np.float32(1) / (np.asarray(factors, np.float32) * _wavelengths(config))
            for factors in (config.short_factor, config.long_factor)
        )
        return RopeFrequencies(short, long, _longrope_scaling(config))
    return RopeFrequencies(plain, None, 1.0)


def cos_sin(config: RopeConfig, positions: jax.Array, rope_length: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute cosines and sines of each token's angles, scaled for attention; may be traced (`config` is static).

    Args:
        config: the rotary embedding.
        positions: [T] int32, the position of each token in its sequence; with M-RoPE also [T, 3], one for each of
            `config.sections`.
        rope_length: [T] int32, the sequence length that selects a token's frequencies: the prompt's length for prompt
            tokens, position + 1 for generated ones. Only dynamic and longrope use it.

    Returns:
        cos [T, R/2] and sin [T, R/2], float32. A barrier keeps XLA from fusing them into each layer, where they would
        be computed again for each head, from positions whose address on a GPU changes with every step.
    """
    frequencies = rope_frequencies(config)
    inv_freq = jnp.asarray(frequencies.inv_freq)
    if config.kind == "longrope":
        is_long = rope_length[:, None] > config.original_max_position
        inv_freq = jnp.where(is_long, jnp.asarray(frequencies.long_inv_freq), inv_freq)
    elif config.kind == "dynamic":
        is_long = rope_length[:, None] > config.max_position
        inv_freq = jnp.where(is_long, _dynamic(config, rope_length), inv_freq)
    if positions.ndim > 1:
        positions = positions[:, frequency_axes(len(frequencies.inv_freq), config.sections)]
    else:
        positions = positions[:, None]
    angles = positions.astype(jnp.float32) * inv_freq
    scaling = frequencies.attention_scaling
    if config.kind == "longrope" and (config.short_mscale, config.long_mscale) != (None, None):
        short, long = (scaling if own is None else own for own in (config.short_mscale, config.long_mscale))
        scaling = jnp.where(is_long, long, short)
    return jax.lax.optimization_barrier((jnp.cos(angles) * scaling, jnp.sin(angles) * scaling))


def frequency_axes(count: int, sections: Sequence[int]) -> np.ndarray:
    """Return the axis (time, row or column) whose position turns each of `count` frequencies with M-RoPE, [R/2] int32.

    Rows have every third frequency from the second on, columns from the third on, as many as their sections say
    (arXiv:2511.21631); all others belong to time.
    """
    axes = np.zeros(count, np.int32)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    return axes


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the first R dims of each head, the first half against the second half; other dims are unchanged.

    Args:
        x: [T, ..., D] with any axes between (shards, heads).
        cos: [T, R/2], cast to x's dtype before multiplying, as transformers does.
        sin: [T, R/2], likewise.

    Returns:
        [T, ..., D] in x's dtype.
    """
    tokens, half = cos.shape
    broadcast = (tokens,) + (1,) * (x.ndim - 2) + (half,)
    cos, sin = cos.astype(x.dtype).reshape(broadcast), sin.astype(x.dtype).reshape(broadcast)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def deinterleave(x: jax.Array, rotated: int | None = None) -> jax.Array:
    """Reorder the first R columns of `[..., D]` from interleaved rotary pairs (2i, 2i + 1) to two halves.

    GPT-J-style checkpoints rotate columns 2i and 2i + 1 against each other, `apply_rope` columns i and i + R/2. Scores
    are sums over columns, so reordering queries and keys in the same way does not change them.

    Args:
        x: queries or keys.
        rotated: R; None for all columns.
    """
    pairs, rest = (x, ()) if rotated in (None, x.shape[-1]) else (x[..., :rotated], (x[..., rotated:],))
    return jnp.concatenate([pairs[..., ::2], pairs[..., 1::2], *rest], axis=-1)


def _wavelengths(config: RopeConfig) -> np.ndarray:
    """Compute theta ** (2 i / rotary_dim), [R/2] float32, the inverse of the frequencies."""
    exponents = np.arange(0, config.rotary_dim, 2, dtype=np.float32) / np.float32(config.rotary_dim)
    # Computed in float64 and rounded once: one float32 ulp is 1e-3 radians at position 10,000.
    return (np.float64(np.float32(config.theta)) ** exponents.astype(np.float64)).astype(np.float32)


def _dynamic(config: RopeConfig, rope_length: jax.Array) -> jax.Array:
    """Compute frequencies [T, R/2] with the NTK-aware base scaled by the lengths [T] (u/bloc97, u/emozilla)."""
    length = jnp.maximum(rope_length, config.max_position).astype(jnp.float32)
    dim = config.rotary_dim
    stretch = config.factor * length / config.max_position - (config.factor - 1)
    base = config.theta * stretch ** (dim / (dim - 2))
    exponents = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    return 1.0 / base[:, None] ** exponents


def _llama3(config: RopeConfig, inv_freq: np.ndarray) -> np.ndarray:
    """Scale frequencies as Llama 3.1: divide long wavelengths by `factor`, keep short ones, blend between."""
    f32, original = np.float32, config.original_max_position
    low, high = config.low_freq_factor, config.high_freq_factor
    wavelength = f32(2 * math.pi) / inv_freq
    is_long, is_short = wavelength > f32(original / low), wavelength < f32(original / high)
    scaled = np.where(is_long, inv_freq / f32(config.factor), inv_freq)
    if low == high:  # nothing lies between (Llama 4)
        return scaled.astype(np.float32)
    smooth = (f32(original) / wavelength - f32(low)) / f32(high - low)
    blended = (f32(1) - smooth) * scaled / f32(config.factor) + smooth * scaled
    return np.where(is_long | is_short, scaled, blended).astype(np.float32)


def _yarn(config: RopeConfig) -> np.ndarray:
    """Scale frequencies as YaRN (arXiv 2309.00071): keep fast dims, interpolate slow ones, ramp between."""
    f32, dim = np.float32, config.rotary_dim

    def dim_of(rotations: float) -> float:
        turns = config.original_max_position / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(config.theta))

    low, high = dim_of(config.beta_fast or 32.0), dim_of(config.beta_slow or 1.0)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - f32(low)) / f32(high - low), f32(0), f32(1))
    kept = f32(1) - ramp
    wavelengths = _wavelengths(config)
    interpolated = f32(1) / (f32(_factor(config)) * wavelengths)
    return interpolated * (f32(1) - kept) + f32(1) / wavelengths * kept


def _factor(config: RopeConfig) -> float:
    """Return the stated factor, else the ratio of max_position to the original length."""
    return config.max_position / config.original_max_position if config.factor is None else config.factor


def _yarn_scaling(config: RopeConfig) -> float:
    """Return the stated attention factor, else the paper's 0.1 ln(factor) + 1, or DeepSeek's ratio of two of them."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(_factor(config)) + 1.0 if _factor(config) > 1 else 1.0

    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return scale(config.mscale) / scale(config.mscale_all_dim)
    return scale(1.0)


def _longrope_scaling(config: RopeConfig) -> float:
    """Return the stated attention factor, else sqrt(1 + ln(factor) / ln(original length)) (arXiv 2402.13753)."""
    if config.attention_factor is not None:
        return config.attention_factor
    if _factor(config) <= 1:
        return 1.0
    return math.sqrt(1 + math.log(_factor(config)) / math.log(config.original_max_position))
