"""Steps of an encoder, which write features of images or keys and values of cross-attention."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer import functional
from jaxinfer.engine.runner import batch as batches
from jaxinfer.engine.runner.device_state import abstract_cache, abstract_features, replicated, shardings
from jaxinfer.engine.runner.shapes import Shapes
from jaxinfer.functional import Program
from jaxinfer.functional.encoder_batch import EncodeBatch, EncodeShape
from jaxinfer.kernels.attention.paged import Cache


def encode_step(
    program: Program, params: list[jax.Array], pool: jax.Array, inputs: jax.Array, slots: jax.Array
) -> jax.Array:
    """Encode inputs `[n, *shape]` and write the result to slots `[n]` of the feature pool `[F, M]`.

    Slots out of range belong to padding and are dropped.
    """
    made = functional.encode(program, params, inputs)
    return pool.reshape(-1, *made.shape[1:]).at[slots].set(made.astype(pool.dtype), mode="drop").reshape(pool.shape)


def encode_joint_step(
    program: Program,
    shape: EncodeShape,
    params: list[jax.Array],
    pool: jax.Array,
    inputs: jax.Array,
    numbers: jax.Array,
    slots: jax.Array,
    packed: jax.Array,
) -> jax.Array:
    """Encode whole inputs of values `[U, *shape]` with numbers `[U, A]` into slots `[U]` of the feature pool."""
    batch = EncodeBatch(inputs, numbers, **batches.unpack(shape, packed), tile=shape.tile)
    made = functional.encode_joint(program, params, batch)
    return pool.reshape(-1, *made.shape[1:]).at[slots].set(made.astype(pool.dtype), mode="drop").reshape(pool.shape)


def encode_cross_step(
    program: Program,
    shape: EncodeShape,
    params: list[jax.Array],
    cache: Cache,
    inputs: jax.Array,
    numbers: jax.Array,
    packed: jax.Array,
) -> Cache:
    """Encode inputs `[U, *shape]` with numbers `[U, A]` into the cache's cross-attention keys and values."""
    batch = EncodeBatch(inputs, numbers, **batches.unpack(shape, packed), tile=shape.tile)
    return functional.encode_cross(program, params, cache, batch)


def make_encode_step(
    program: Program, shapes: Shapes, shape: EncodeShape, compiler_options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Return the jitted step that encodes for cross-attention: (params, cache, inputs, numbers, packed) -> cache."""
    return jax.jit(
        partial(encode_cross_step, program, shape),
        donate_argnums=1,
        out_shardings=shardings(abstract_cache(program, shapes)),
        compiler_options=None if compiler_options is None else dict(compiler_options),
    )


def abstract_joint_arguments(program: Program, shapes: Shapes, shape: EncodeShape) -> tuple[Any, ...]:
    """Return shapes and shardings of the arguments of `encode_joint_step` after the parameters."""
    features, array = program.features, partial(jax.ShapeDtypeStruct, sharding=replicated(program))
    return (
        abstract_features(program, shapes),
        array((shape.units, *features.shape), jnp.float32),
        array((shape.units, features.joint.numbers), jnp.int32),
        array((shape.units,), jnp.int32),
        array((sum(map(math.prod, shape.shapes.values())),), jnp.int32),
    )


def abstract_encode_arguments(program: Program, shapes: Shapes, shape: EncodeShape) -> tuple[Any, ...]:
    """Return shapes and shardings of the arguments of `make_encode_step` after the parameters."""
    source, array = program.cross, partial(jax.ShapeDtypeStruct, sharding=replicated(program))
    inputs = array((shape.units, *source.shape), jnp.float32 if source.shape else jnp.int32)
    packed = array((sum(map(math.prod, shape.shapes.values())),), jnp.int32)
    return abstract_cache(program, shapes), inputs, array((shape.units, source.numbers), jnp.int32), packed
