"""Logits of a model as a differentiable function of its weights, computed by the serving layers over whole sequences.

    module = weights.random(config, mesh, dtype="float32")
    training.prepare(module)
    graph, weights = nnx.split(module, nnx.Param)
    loss = lambda weights: cross_entropy(training.logits(nnx.merge(graph, weights), tokens), ...)

The serving kernels use loops with run-time bounds, which have no derivative. Here all sequences have one length, so
attention (`kernels.attention.uncached_attention`), recurrence (`kernels.state.delta`), convolutions and expert products
are plain operations. Everything else is the same code. On one device only.
"""

import jax
import jax.numpy as jnp

from jaxinfer.errors import ConfigError
from jaxinfer.kernels.attention import choose as attention
from jaxinfer.kernels.attention.paged import Cache
from jaxinfer.kernels.matmul import choose as matmul
from jaxinfer.kernels.state.slots import FullSequences
from jaxinfer.kv import cache as kv_cache
from jaxinfer.kv.groups import layout
from jaxinfer.layers.attention import GroupStep, StepContext
from jaxinfer.layers.linear import use_kernel
from jaxinfer.models.base import LanguageModel
from jaxinfer.sharding import make_mesh


def prepare(module: LanguageModel) -> None:
    """Set the module to differentiable matrix products; `functional.split` sets it back for serving.

    Raises:
        ConfigError: the model reads more than tokens.
    """
    if module.config.features is not None or module.config.cross is not None:
        raise ConfigError(
            f"{type(module).__name__} reads images, audio or encoder inputs; training supports text-only models"
        )
    use_kernel(module, matmul.RAGGED)


def logits(module: LanguageModel, tokens: jax.Array) -> jax.Array:
    """Return next-token logits, float32 `[B, L, V]`, for token ids `[B, L]`.

    Shorter sequences are padded at the end with any ids, which no earlier token sees.
    """
    batch, length = tokens.shape
    mesh, cache_layout = make_mesh(1), layout(tuple(module.cache_specs()))
    whole, positions = FullSequences(length), jnp.tile(jnp.arange(length, dtype=jnp.int32), batch)
    step = StepContext(
        positions=positions,
        real=jnp.ones(batch * length, bool),
        rope_lengths=jnp.full(batch * length, length, jnp.int32),
        groups=(GroupStep(None, whole),) * cache_layout.groups,
        mesh=mesh,
        kernel=attention.WHOLE,
        places=cache_layout.places,
        states=whole,
    )
    hidden, _ = module(tokens.reshape(-1), step, _nothing(module, cache_layout.array_specs, cache_layout.states))
    return module.logits(hidden).reshape(batch, length, -1)[..., : module.config.vocab_size]


def _nothing(module: LanguageModel, cache: tuple, states: tuple) -> Cache:
    """Allocate a cache of one position, which layers pass through unused."""
    dtype = module.embedding.dtype
    shapes = kv_cache.abstract((*cache, *states), 1, 1, dtype, make_mesh(1), 1)
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
