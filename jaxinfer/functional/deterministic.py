"""Compute the logits of a deterministic engine outside of it: whole sequences through steps of the engine's shape.

An engine with `deterministic=True` computes every token in one program of a fixed shape. A token's bits depend on
its own sequence and on that shape, a `StepShape`. `logits` and `logprobs` run the same functions over sequences of a
trainer, a step of as many tokens at a time, and thereby give the same bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxinfer.errors import ConfigError
from jaxinfer.functional import taps
from jaxinfer.functional.batch import PrefillBatch, tile_count
from jaxinfer.functional.forward import prefill_hidden
from jaxinfer.functional.program import Program, abstract_cache, split
from jaxinfer.kernels.attention.paged import Cache
from jaxinfer.kernels.attention.quantised_cache import AUTO
from jaxinfer.kernels.state.slots import StepSegments
from jaxinfer.models.base import LanguageModel
from jaxinfer.sharding import make_mesh

NO_SLOT = 2**30
"""State slot of a sequence's beginning: out of range, read as zeros."""

Steps: TypeAlias = dict[str, np.ndarray]
"""Fields of a `PrefillBatch` for each of several steps, with a leading axis."""


@dataclass(frozen=True)
class StepShape:
    """Shape and kernels of a deterministic engine's step (`LLM.step_shape`)."""

    attention_kernel: str
    matmul_kernel: str
    """Kernels, as in the engine's settings of these names."""
    tokens: int
    """T: tokens of a step."""
    rows: int
    """R: sequences of a step."""
    runs: int
    """Sequences and parts of chunks of a step, which have tiles of their own."""
    segments: int
    """Parts of sequences after which recurrent layers store a state."""
    head_rows: int
    """Tokens whose logits are computed at a time."""
    sampled_rows: int
    """Tokens whose log-probabilities are computed at a time; it divides `head_rows`."""
    width: int
    """W: blocks of a block table."""
    block_size: int
    """P."""
    kv_cache_dtype: str = AUTO
    """How keys and values are stored, as in the engine's setting of this name."""


def mesh_of(module: LanguageModel) -> Mesh:
    """Return the mesh that a module was made on; one device for a module that does not say it."""
    return getattr(module, "mesh", None) or make_mesh(1)


def log_probabilities(logits: jax.Array) -> jax.Array:
    """Return the log-probabilities of float32 logits `[..., V]`."""
    return logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def chosen(normal: jax.Array, tokens: jax.Array) -> jax.Array:
    """Select the log-probability of each of `tokens` `[B]` from `[B, V]`; -inf for ids of V or more."""
    ids = jnp.maximum(tokens, 0)[:, None]
    return jnp.take_along_axis(normal, ids, axis=-1, mode="fill", fill_value=-jnp.inf)[:, 0]


def logits(module: LanguageModel, tokens: jax.Array, shape: StepShape, experts: jax.Array | None = None) -> jax.Array:
    """Return the engine's next-token logits, float32 `[B, L, V]`, for token ids `[B, L]`.

    Args:
        module: the model, with the engine's weights.
        tokens: token ids `[B, L]`; shorter sequences are padded at the end.
        shape: the engine's step, `LLM.step_shape`.
        experts: experts `[B, L, N, k]` of each token in the N layers that have some; None for the routers' choice.

    Raises:
        ConfigError: the sequences are longer than the engine's, or `experts` has another shape.
    """
    program, params, hidden = _hidden(module, tokens, shape, experts)
    own = program.module(params)
    found = _by_rows(lambda rows: own.logits(rows), shape.head_rows, hidden.reshape(-1, hidden.shape[-1]))
    return found.reshape(*tokens.shape, -1)[..., : module.config.vocab_size]


def logprobs(module: LanguageModel, tokens: jax.Array, shape: StepShape, experts: jax.Array | None = None) -> jax.Array:
    """Return the engine's log-probability of each token after the first, float32 `[B, L - 1]`, for ids `[B, L]`.

    Arguments and errors are those of `logits`.
    """
    program, params, hidden = _hidden(module, tokens, shape, experts)
    own = program.module(params)

    def find(rows: jax.Array, targets: jax.Array) -> jax.Array:
        return _by_rows(
            lambda *each: chosen(log_probabilities(each[0]), each[1]), shape.sampled_rows, own.logits(rows), targets
        )

    before = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    found = _by_rows(find, shape.head_rows, before, tokens[:, 1:].reshape(-1))
    return found.reshape(tokens.shape[0], -1)


def _by_rows(function: Callable[..., jax.Array], size: int, *arrays: jax.Array) -> jax.Array:
    """Apply a function to `size` rows of arrays at a time."""
    count = arrays[0].shape[0]
    parts = (jnp.pad(a, ((0, -count % size), *[(0, 0)] * (a.ndim - 1))) for a in arrays)
    found = jax.lax.map(lambda own: function(*own), tuple(a.reshape(-1, size, *a.shape[1:]) for a in parts))
    return found.reshape(-1, *found.shape[2:])[:count]


def by_layer(module: LanguageModel, experts: jax.Array | None) -> tuple[jax.Array | None, ...] | None:
    """Divide experts `[..., N, k]` among a model's layers: `[..., k]` each, None for layers without experts.

    Raises:
        ConfigError: the model has another number of layers with experts, or of experts per token.
    """
    if experts is None:
        return None
    paths = taps.routers(module)
    numbers = [int(path.split(".")[1]) for path in paths]
    counts = {taps.module_at(module, path).per_token for path in paths}
    if experts.shape[-2:] != (len(paths), *counts):
        raise ConfigError(
            f"routed_experts has shape {list(experts.shape)}; this model has {len(paths)} layers with experts and "
            f"{', '.join(map(str, counts)) or 'no'} experts a token, so it must end with these two numbers"
        )
    places = {number: place for place, number in enumerate(numbers)}
    return tuple(
        experts[..., places[layer], :].astype(jnp.int32) if layer in places else None
        for layer in range(module.config.num_layers)
    )


def _hidden(
    module: LanguageModel, tokens: jax.Array, shape: StepShape, experts: jax.Array | None = None
) -> tuple[Program, list[jax.Array], jax.Array]:
    """Return the module's program and parameters, and its hidden states `[B, L, M]` for token ids `[B, L]`.

    Raises:
        ConfigError: the sequences are longer than the engine's.
    """
    count, length = tokens.shape
    longest = shape.width * shape.block_size
    if length > longest:
        raise ConfigError(
            f"tokens have length {length}, more than the {longest} of the engine's block tables (max_model_len); "
            "pass shorter sequences, or make the LLM with a larger max_model_len"
        )
    own = nnx.merge(*nnx.split(module))  # `split` sets the kernels of its module
    kernels = {"attention_kernel": shape.attention_kernel, "matmul_kernel": shape.matmul_kernel}
    program, params = split(own, mesh_of(module), deterministic=True, kv_cache_dtype=shape.kv_cache_dtype, **kernels)
    chunks = -(-length // shape.tokens)
    padded = jnp.pad(tokens.astype(jnp.int32), ((0, 0), (0, chunks * shape.tokens - length)))
    steps = _steps(count, length, chunks, program, shape)
    routed = None
    if experts is not None:
        filled = jnp.pad(experts, ((0, 0), (0, chunks * shape.tokens - length), (0, 0), (0, 0)))
        routed = by_layer(own, filled.reshape(count * chunks, shape.tokens, *experts.shape[2:]))
    tables = np.zeros((program.layout.groups, shape.rows, shape.width), np.int32)
    tables[:, 0] = np.arange(program.layout.groups * shape.width).reshape(program.layout.groups, -1)
    blocks = program.layout.groups * shape.width
    abstract = abstract_cache(program, blocks, shape.block_size, 1)
    cache = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract)

    def step(cache: Cache, inputs: tuple[jax.Array, dict[str, jax.Array], Any]) -> tuple[Cache, jax.Array]:
        ids, fields, routed = inputs
        states = StepSegments(*fields.pop("states")) if program.layout.states else None
        nowhere = jnp.zeros(shape.rows, jnp.int32)
        batch = PrefillBatch(
            ids,
            rows=jnp.zeros(shape.tokens, jnp.int32),
            tables=jnp.asarray(tables),
            last=nowhere,
            tile=program.tile,
            states=states,
            **{name: fields[name] for name in ("positions", "rope_lengths", "tiles", "count")},
        )
        hidden, cache = prefill_hidden(program, params, cache, batch, routed=routed)
        return cache, hidden

    _, hidden = jax.lax.scan(step, cache, (padded.reshape(count * chunks, -1), steps, routed))
    return program, params, hidden.reshape(count, chunks * shape.tokens, -1)[:, :length]


def _steps(count: int, length: int, chunks: int, program: Program, shape: StepShape) -> Steps:
    """Return positions, tiles and state slots of the steps of `count` sequences of `length` tokens."""
    size, tile = shape.tokens, program.tile
    positions = np.arange(chunks * size, dtype=np.int32)
    positions = np.where(positions < length, positions, -1).reshape(chunks, size)
    tiles = np.zeros((chunks, tile_count(size, shape.runs, tile), 4), np.int32)
    states = np.zeros((chunks, len(StepSegments._fields), shape.segments), np.int32)
    states[:, 2:4] = NO_SLOT
    used = np.zeros(chunks, np.int32)
    for chunk in range(chunks):
        start, live = chunk * size, min(size, length - chunk * size)
        states[chunk, :4, 0] = 0, live, NO_SLOT if chunk == 0 else 0, 0
        for first in range(0, live, tile):
            tiles[chunk, used[chunk]] = 0, first, start + first, min(tile, live - first)
            used[chunk] += 1
    made = {
        "positions": positions,
        "rope_lengths": np.where(positions < 0, 1, length).astype(np.int32),
        "tiles": tiles,
        "count": used,
        "states": states,
    }
    return {name: np.concatenate([value] * count) for name, value in made.items()}
