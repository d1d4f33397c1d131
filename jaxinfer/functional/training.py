"""A model's logits as a differentiable function of its weights: the layers that serve it, over whole sequences.

    module = weights.random(config, mesh, dtype="float32")
    training.prepare(module)
    graph, weights = nnx.split(module, nnx.Param)
    loss = lambda weights: cross_entropy(training.logits(nnx.merge(graph, weights), tokens), ...)

What serves otherwise is written for steps whose extent is known when they run, in loops that have no derivative. Here
are sequences of one length, so that attention (`kernels.whole_attention`), recurrence (`kernels.delta.whole`),
convolution and the products of experts are plain ones. All else is the same code. On one device.
"""

import jax
import jax.numpy as jnp

from jaxinfer.errors import ConfigError
from jaxinfer.kernels.attention import choose as attention
from jaxinfer.kernels.attention.paged import Cache
from jaxinfer.kernels.matmul import choose as matmul
from jaxinfer.kernels.state.slots import Whole
from jaxinfer.kv import cache as kv_cache
from jaxinfer.kv.groups import layout
from jaxinfer.layers.attention import GroupStep, StepContext
from jaxinfer.layers.linear import use_kernel
from jaxinfer.models.base import LanguageModel
from jaxinfer.sharding import make_mesh


def prepare(module: LanguageModel) -> None:
    """Sets the module to products that have a derivative; what serves it sets others again (`functional.split`).

    Raises:
        ConfigError: a model that reads more than tokens.
    """
    if module.config.features is not None or module.config.cross is not None:
        raise ConfigError(
            f"{type(module).__name__} reads more than tokens; models of text alone can be differentiated here"
        )
    use_kernel(module, matmul.RAGGED)


def logits(module: LanguageModel, tokens: jax.Array) -> jax.Array:
    """Token ids `[B, L]` -> float32 `[B, L, V]`: of each token, of the one that follows it.

    Sequences that are shorter are filled up at their ends with any ids, which no token before them sees.
    """
    batch, length = tokens.shape
    mesh, kept = make_mesh(1), layout(tuple(module.cache_specs()))
    whole, positions = Whole(length), jnp.tile(jnp.arange(length, dtype=jnp.int32), batch)
    step = StepContext(
        positions=positions,
        real=jnp.ones(batch * length, bool),
        rope_lengths=jnp.full(batch * length, length, jnp.int32),
        groups=(GroupStep(None, whole),) * kept.groups,
        mesh=mesh,
        kernel=attention.WHOLE,
        places=kept.places,
        states=whole,
    )
    hidden, _ = module(tokens.reshape(-1), step, _nothing(module, kept.lanes, kept.states))
    return module.logits(hidden).reshape(batch, length, -1)[..., : module.config.vocab_size]


def _nothing(module: LanguageModel, lanes: tuple, states: tuple) -> Cache:
    """A cache with room for one position, which nobody uses: layers take it and give it back."""
    dtype = module.embedding.dtype
    shapes = kv_cache.abstract((*lanes, *states), 1, 1, dtype, make_mesh(1), 1)
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
