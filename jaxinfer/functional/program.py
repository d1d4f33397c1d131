"""Pure functions that the engine runs, usable directly from JAX: params, cache and batch in, logits and cache out.

    from jaxinfer import demo, functional, sharding
    from jaxinfer.loading import weights

    mesh = sharding.make_mesh()
    program, params = functional.split(weights.load(demo.path(), mesh), mesh)
    cache = functional.init_cache(program, num_blocks=64, block_size=16)
    prefill = jax.jit(functional.prefill, static_argnums=0, donate_argnums=2)
    decode = jax.jit(functional.decode, static_argnums=0, donate_argnums=2)

    tokens = [1, 5, 9]
    tables = np.arange(4)[None]  # one sequence, whose positions 0 to 63 are in blocks 0 to 3
                                 # (with several groups of layers: one table per group, no block in two groups)
    logits, cache = prefill(program, params, cache, functional.prefill_batch([(tokens, 0, len(tokens))], tables))
    for position in range(len(tokens), 20):
        last = logits.argmax(axis=-1)
        logits, cache = decode(program, params, cache, functional.DecodeBatch(last, np.array([position]), tables))

Token ids, positions and block ids are not checked: under jit they cannot be.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxinfer.errors import ConfigError
from jaxinfer.functional.batch import Array, DecodeBatch, PrefillBatch
from jaxinfer.functional.encoder_batch import EncodeBatch
from jaxinfer.kernels.attention import choose as attention
from jaxinfer.kernels.attention.paged import Cache, DecodeRows, PrefillTiles, Slots
from jaxinfer.kernels.attention.xla_attention import TILE
from jaxinfer.kernels.matmul import choose as matmul
from jaxinfer.kv import cache as kv_cache
from jaxinfer.kv import groups as kv_groups
from jaxinfer.kv.groups import Layout, Place, layout
from jaxinfer.kv.spec import Full, State
from jaxinfer.layers.attention import GroupStep, StepContext
from jaxinfer.layers.embedding import Embedding
from jaxinfer.layers.encoder import EncodeStep
from jaxinfer.layers.linear import use_fusion, use_kernel
from jaxinfer.media.inputs import Features
from jaxinfer.models.base import CrossSource, FeatureRows, LanguageModel
from jaxinfer.sharding import make_mesh
from jaxinfer.sharding import mesh as meshes

SMALL_TILE = 8
"""Queries per tile of XLA's attention in deterministic steps, where a decoding sequence has a tile of its own."""


@dataclass(frozen=True)
class Program:
    """The static part of a module under jit: everything but its parameters."""

    graph: nnx.GraphDef
    tree: jax.tree_util.PyTreeDef
    specs: tuple[Full | State, ...]
    vocab: int
    """V': number of columns of the logits."""
    dtype: jnp.dtype
    mesh: Mesh
    kernel: str = "xla"
    """Attention implementation (`kernels.attention.choose`)."""
    tile: int = TILE
    """Number of queries in a prefill tile, as suits the kernel best."""
    features: Features | None = None
    """Inputs of the model beside tokens, such as images; None if there are none."""
    feature_width: int = 0
    """M of the rows computed by the model's encoder; 0 without one."""
    cross: CrossSource | None = None
    """Encoder inputs for cross-attention; None without it."""
    deterministic: bool = False
    """Whether a token's result may depend on nothing but its own sequence: kernels divide their work alike for every
    token, and recurrent layers advance one token at a time (`engine.runner.mixed`)."""

    @property
    def layout(self) -> Layout:
        """Assignment of layers to cache arrays and block tables."""
        return layout(self.specs)

    def module(self, params: Sequence[Array]) -> LanguageModel:
        """Return the module with these parameters; under a trace this costs nothing at run time."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, params))


def split(
    module: LanguageModel,
    mesh: Mesh | None = None,
    *,
    attention_kernel: str = attention.AUTO,
    matmul_kernel: str = attention.AUTO,
    fuse_projections: bool = True,
    deterministic: bool = False,
) -> tuple[Program, list[Array]]:
    """Split a module into a static program and the flat list of its parameters (shapes if the module is abstract).

    The list is flat because dispatch takes 0.08 ms with it and 11.6 ms through `nnx.jit`.

    Raises:
        ConfigError: a kernel is unknown or does not support these devices.
    """
    mesh = make_mesh() if mesh is None else meshes.normalise(mesh)
    product = matmul.choose(matmul_kernel, mesh)
    use_kernel(module, matmul.stable(product) if deterministic else product)
    use_fusion(module, fuse_projections)
    graph, state = nnx.split(module)
    params, tree = jax.tree.flatten(state)
    dtype = _activation_dtype(module, params)
    vocab = -(-module.config.vocab_size // meshes.size(mesh)) * meshes.size(mesh)
    specs, kernel = tuple(module.cache_specs()), attention.choose(attention_kernel, mesh)
    widest = max(spec.head_dim for spec in specs if isinstance(spec, Full))
    tile = attention.prefill_tile(kernel, module.config.query_group, widest, dtype.itemsize)
    if deterministic and kernel == attention.XLA:
        tile = SMALL_TILE
    program = Program(graph, tree, specs, vocab, dtype, mesh, kernel, tile, module.config.features)
    width, cross = _feature_width(program, params), module.config.cross
    return replace(program, feature_width=width, cross=cross, deterministic=deterministic), params


def _activation_dtype(module: nnx.Module, params: Sequence[Array]) -> jnp.dtype:
    """Return the dtype of the hidden states and the cache: that of the token embedding.

    For a module without a `layers.embedding.Embedding` it is the dtype of most parameter values. Single parameters may
    differ: scales of quantised weights are float32, and a user may keep some parameters in more or fewer bits.
    """
    for _, part in nnx.iter_modules(module):
        if isinstance(part, Embedding) and part.lookup:
            own = jnp.dtype(part.weight.dtype)
            return own if jnp.issubdtype(own, jnp.floating) else jnp.dtype(part.dtype)
    sizes: Counter[jnp.dtype] = Counter()
    for param in params:
        if jnp.issubdtype(param.dtype, jnp.floating):
            sizes[jnp.dtype(param.dtype)] += math.prod(param.shape)
    return sizes.most_common(1)[0][0]


def _feature_width(program: Program, params: Sequence[Array]) -> int:
    """Return the width M of the encoder's output, found by tracing it."""
    features = program.features
    if features is None:
        return 0
    inputs = jax.ShapeDtypeStruct((1, *features.shape), program.dtype)
    made = jax.eval_shape(partial(encode, program), params, inputs).shape
    if made[:-1] != (1, features.rows):
        raise ConfigError(
            f"the module's encode returns shape {made} for inputs {inputs.shape}, but its config.features declares "
            f"{features.rows} rows per input"
        )
    return made[-1]


def encode(program: Program, params: Sequence[jax.Array], inputs: jax.Array) -> jax.Array:
    """Run the encoder on inputs `[n, *features.shape]` and return the rows of each, `[n, rows, M]`."""
    return program.module(params).encode(inputs.astype(program.dtype))


def encode_cross(program: Program, params: Sequence[jax.Array], cache: Cache, batch: EncodeBatch) -> Cache:
    """Run the encoder of a model with cross-attention and return the cache with keys and values of its positions.

    The batch is made by `encoder_batch.encode_batch`; the `seen` field of later batches says which positions tokens
    see.
    """
    inputs = batch.inputs if jnp.issubdtype(batch.inputs.dtype, jnp.integer) else batch.inputs.astype(program.dtype)
    return program.module(params).encode_cross(inputs, batch.numbers, encode_step(program, batch), cache)


def encode_step(program: Program, batch: EncodeBatch) -> EncodeStep:
    """Return the attention context of an encoder batch."""
    first = kv_groups.encoded(program.layout.kinds).first
    tables = jnp.arange(batch.positions.shape[0], dtype=jnp.int32)[None]
    return EncodeStep(
        positions=batch.positions,
        rows=PrefillTiles(tables, batch.tiles, batch.count, batch.spans),
        slots=tuple(Slots(blocks, batch.offsets) for blocks in batch.blocks),
        mesh=program.mesh,
        kernel=program.kernel,
        tile=batch.tile,
        places=tuple(Place(place.group - first, place.array) for place in program.layout.places),
    )


def init_cache(program: Program, num_blocks: int, block_size: int = 16, slots: int = 1) -> Cache:
    """Allocate a cache of zeros on the program's mesh: keys and values `[N, K, P, D]` for each array index.

    A layer has arrays of its own, or shares them with layers of other groups (`Program.layout`). A recurrent layer has
    its own arrays, `[slots, ...]`.
    """
    return kv_cache.allocate(abstract_cache(program, num_blocks, block_size, slots))


def abstract_cache(program: Program, num_blocks: int, block_size: int, slots: int = 1) -> Cache:
    """Return shapes and shardings of `init_cache` without allocating it."""
    cache_layout = program.layout
    return kv_cache.abstract(
        (*cache_layout.array_specs, *cache_layout.states), num_blocks, block_size, program.dtype, program.mesh, slots
    )


def prefill(
    program: Program,
    params: Sequence[jax.Array],
    cache: Cache,
    batch: PrefillBatch,
    features: FeatureRows | None = None,
) -> tuple[jax.Array, Cache]:
    """Run prefill chunks and return float32 logits `[S, V']` of the tokens in `batch.last`, and the new cache.

    `features` are encoder rows that replace the embeddings of some tokens.
    """
    hidden, cache = prefill_hidden(program, params, cache, batch, features)
    return program.module(params).logits(hidden[batch.last]), cache


def prefill_hidden(
    program: Program,
    params: Sequence[jax.Array],
    cache: Cache,
    batch: PrefillBatch,
    features: FeatureRows | None = None,
) -> tuple[jax.Array, Cache]:
    """Run `prefill`, but return the hidden states `[T, M]` of all tokens in place of logits."""
    tables, size = _flat(program, batch.tables)
    tiles = [batch.tiles.at[:, 0].add(group * size) if group else batch.tiles for group in range(program.layout.groups)]
    rows = [
        PrefillTiles(tables, tiles[group], batch.count, batch.seen[batch.tiles[:, 1]] if reads else None)
        for group, reads in enumerate(_reading(program, batch.seen))
    ]
    step = _context(program, cache, batch, batch.rows, batch.rope_lengths, rows, tile=batch.tile)
    return program.module(params)(batch.tokens, step, cache, features)


def decode(program: Program, params: Sequence[jax.Array], cache: Cache, batch: DecodeBatch) -> tuple[jax.Array, Cache]:
    """Run one decode step and return float32 logits `[B, V']` and the new cache."""
    hidden, cache = decode_hidden(program, params, cache, batch)
    return program.module(params).logits(hidden), cache


def decode_hidden(
    program: Program, params: Sequence[jax.Array], cache: Cache, batch: DecodeBatch
) -> tuple[jax.Array, Cache]:
    """Run `decode`, but return the hidden states `[B, M]` in place of logits."""
    tables, size = _flat(program, batch.tables)
    rows = [
        DecodeRows(tables, batch.seen[:, 1], group * size, batch.seen[:, 0])
        if reads
        else DecodeRows(tables, batch.positions + 1, group * size)
        for group, reads in enumerate(_reading(program, batch.seen))
    ]
    owners = jnp.arange(size)
    step = _context(program, cache, batch, owners, batch.positions + 1, rows, items=batch.items)
    return program.module(params)(batch.tokens, step, cache)


def _flat(program: Program, tables: jax.Array) -> tuple[jax.Array, int]:
    """Return the block tables of all groups as `[G * B, W]`, and B.

    Raises:
        ValueError: the number of groups differs from the model's.
    """
    *groups, rows, width = tables.shape
    if groups != [program.layout.groups] and (groups or program.layout.groups > 1):
        kinds = ", ".join(f"{kind.count} of {kind.kind.name}" for kind in program.layout.kinds)
        raise ValueError(
            f"tables have shape {list(tables.shape)}, but this model has {program.layout.groups} groups of layers "
            f"({kinds}): pass [{program.layout.groups}, {rows}, {width}], with no block in two groups"
        )
    return tables.reshape(-1, width), rows


def _reading(program: Program, seen: Array | None) -> list[bool]:
    """Return for each group whether it is a cross-attention group.

    Raises:
        ValueError: there are such groups, but the batch has no `seen`.
    """
    kinds = program.layout.kinds
    if seen is None and kv_groups.encoded(kinds) is not None:
        raise ValueError("this model has cross-attention: pass `seen`, the visible encoder positions [tokens, 2]")
    return [kind.kind.encoded for kind in kinds for _ in range(kind.count)]


def _context(
    program: Program,
    cache: Cache,
    batch: PrefillBatch | DecodeBatch,
    owners: jax.Array,
    rope_lengths: jax.Array,
    rows: Sequence[DecodeRows | PrefillTiles],
    *,
    items: int | None = None,
    tile: int = TILE,
) -> StepContext:
    """Build the step context of the layers.

    Args:
        owners: row of the first group's tables that each token belongs to, `[T]`.
        rows: attention rows or tiles of each group.
    """
    positions = batch.positions
    blocks, _, block_size, _ = cache[0].keys.shape
    at = jnp.maximum(positions, 0)
    tables, number, offsets = rows[0].tables, at // block_size, at % block_size
    size = tables.shape[0] // len(rows)

    def slots(group: int) -> Slots:
        own = tables[owners + group * size, number]
        return Slots(jnp.where(positions >= 0, own, blocks), offsets)

    return StepContext(
        positions=at,
        real=positions >= 0,
        rope_lengths=rope_lengths,
        mesh=program.mesh,
        kernel=program.kernel,
        tile=tile,
        items=items,
        groups=tuple(
            GroupStep(None if reads else slots(group), own)
            for group, (own, reads) in enumerate(zip(rows, _reading(program, batch.seen), strict=True))
        ),
        places=program.layout.places,
        seen=batch.seen,
        states=batch.states,
        deterministic=program.deterministic,
    )
