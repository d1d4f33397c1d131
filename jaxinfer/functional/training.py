"""Logits of a model as a differentiable function of its weights, computed by the serving layers over whole sequences.

    module = weights.random(config, mesh, dtype="float32")
    training.prepare(module)
    graph, weights = nnx.split(module, nnx.Param)
    loss = lambda weights: cross_entropy(training.logits(nnx.merge(graph, weights), tokens), ...)

The serving kernels use loops with run-time bounds, which have no derivative. Here all sequences have one length, so
attention (`kernels.attention.uncached_attention`), recurrence (`kernels.state.delta`), convolutions and expert products
are plain operations. Everything else is the same code. A module that was made on a mesh is computed there.

Their sums are taken in another order than serving's, so that log-probabilities differ from a rollout's in their last
bits. With `serving=llm.step_shape` of an `LLM(deterministic=True)` they do not: values are computed by the serving
kernels in steps of the engine's shape (`functional.deterministic`), and gradients by the plain operations, which
compute the activations again.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxinfer.errors import ConfigError
from jaxinfer.functional import deterministic
from jaxinfer.functional.deterministic import StepShape
from jaxinfer.kernels.attention import choose as attention
from jaxinfer.kernels.attention.paged import Cache
from jaxinfer.kernels.matmul import choose as matmul
from jaxinfer.kernels.state.slots import FullSequences
from jaxinfer.kv import cache as kv_cache
from jaxinfer.kv.groups import layout
from jaxinfer.layers.attention import GroupStep, StepContext
from jaxinfer.layers.linear import use_kernel
from jaxinfer.models.base import LanguageModel


def prepare(module: LanguageModel) -> None:
    """Set the module to differentiable matrix products; `functional.split` sets it back for serving.

    Raises:
        ConfigError: the model reads more than tokens, or weights are codes of 4 bits or FP8, which have no gradients.
    """
    packed = [path for path, param in nnx.to_flat_state(nnx.state(module, nnx.Param)) if _is_packed(param)]
    if packed:
        name = ".".join(map(str, packed[0]))
        raise ConfigError(
            f"{name} and {len(packed) - 1} other parameters are codes, which have no gradients; load the "
            "checkpoint with quantization='dequantize' to train it"
        )
    if module.config.features is not None or module.config.cross is not None:
        raise ConfigError(
            f"{type(module).__name__} reads images, audio or encoder inputs; training supports text-only models"
        )
    use_kernel(module, matmul.RAGGED)


def _is_packed(param: nnx.Variable) -> bool:
    return param.get_value().dtype in (jnp.uint8, jnp.float8_e4m3fn)


def logits(
    module: LanguageModel,
    tokens: jax.Array,
    *,
    serving: StepShape | None = None,
    remat: bool = False,
    routed_experts: jax.Array | None = None,
) -> jax.Array:
    """Return next-token logits, float32 `[B, L, V]`, for token ids `[B, L]`.

    Shorter sequences are padded at the end with any ids, which no earlier token sees.

    Args:
        module: the model, after `prepare`.
        tokens: `[B, L]`.
        serving: `LLM.step_shape`, for the bits that this engine serves; None for plain operations.
        remat: whether the gradient computes each layer's activations again instead of keeping them.
        routed_experts: experts of each token, `[B, L, N, k]` for N layers with experts, which take the place of the
            routers' own choice, or `[B, L - 1, N, k]` as in `CompletionOutput.routed_experts`, since the last token's
            do not matter. The router's weights of these experts are computed as usual, and have gradients.
    """
    experts = _padded(routed_experts, tokens)

    def plain(module: LanguageModel) -> jax.Array:
        return _plain_logits(module, tokens, remat=remat, experts=experts)

    if serving is None:
        return plain(module)
    return _value_of_serving(module, lambda own: deterministic.logits(own, tokens, serving, experts), plain)


def logprobs(
    module: LanguageModel,
    tokens: jax.Array,
    *,
    serving: StepShape | None = None,
    remat: bool = False,
    routed_experts: jax.Array | None = None,
) -> jax.Array:
    """Return the log-probability of each token after the first, float32 `[B, L - 1]`; arguments as for `logits`.

    With `serving` the values equal those of `SamplingParams(logprobs=0)` and `prompt_logprobs` bit for bit.
    """
    experts = _padded(routed_experts, tokens)

    def plain(module: LanguageModel) -> jax.Array:
        normal = deterministic.log_probabilities(_plain_logits(module, tokens, remat=remat, experts=experts)[:, :-1])
        return jnp.take_along_axis(normal, tokens[:, 1:, None], axis=-1)[..., 0]

    if serving is None:
        return plain(module)
    return _value_of_serving(module, lambda own: deterministic.logprobs(own, tokens, serving, experts), plain)


def _value_of_serving(
    module: LanguageModel,
    serve: Callable[[LanguageModel], jax.Array],
    plain: Callable[[LanguageModel], jax.Array],
) -> jax.Array:
    """Return `serve(module)`, whose derivative by the parameters is that of `plain`."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    @jax.custom_vjp
    def run(params: nnx.State) -> jax.Array:
        return serve(nnx.merge(graph, params, rest))

    def forward(params: nnx.State) -> tuple[jax.Array, nnx.State]:
        return run(params), params

    def backward(params: nnx.State, cotangent: jax.Array) -> tuple[nnx.State]:
        _, pull = jax.vjp(lambda params: plain(nnx.merge(graph, params, rest)), params)
        return pull(cotangent)

    run.defvjp(forward, backward)
    return run(params)


def _padded(experts: jax.Array | None, tokens: jax.Array) -> jax.Array | None:
    """Return experts `[B, L, N, k]` for tokens `[B, L]`.

    Raises:
        ConfigError: they are of another number of sequences or tokens.
    """
    if experts is None:
        return None
    batch, length = tokens.shape
    if experts.ndim != 4 or experts.shape[0] != batch or experts.shape[1] not in (length - 1, length):
        raise ConfigError(
            f"routed_experts has shape {list(experts.shape)} for tokens {list(tokens.shape)}; pass "
            f"[{batch}, {length} or {length - 1}, layers with experts, experts per token]"
        )
    return jnp.pad(experts.astype(jnp.int32), ((0, 0), (0, length - experts.shape[1]), (0, 0), (0, 0)))


def _plain_logits(
    module: LanguageModel, tokens: jax.Array, *, remat: bool, experts: jax.Array | None = None
) -> jax.Array:
    """Return `[B, L, V]`, computed by plain operations."""
    batch, length = tokens.shape
    mesh, cache_layout = deterministic.mesh_of(module), layout(tuple(module.cache_specs()))
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
        remat=remat,
        routed=deterministic.by_layer(module, None if experts is None else experts.reshape(-1, *experts.shape[2:])),
    )
    hidden, _ = module(tokens.reshape(-1), step, _nothing(module, mesh, cache_layout.array_specs, cache_layout.states))
    return module.logits(hidden).reshape(batch, length, -1)[..., : module.config.vocab_size]


def _nothing(module: LanguageModel, mesh: Mesh, cache: tuple, states: tuple) -> Cache:
    """Allocate a cache of one position, which layers pass through unused."""
    dtype = module.embedding.dtype
    shapes = kv_cache.abstract((*cache, *states), 1, 1, dtype, mesh, 1)
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
