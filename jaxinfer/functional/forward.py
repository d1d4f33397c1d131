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

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp

from jaxinfer.functional.batch import Array, DecodeBatch, PrefillBatch
from jaxinfer.functional.encoder_batch import EncodeBatch
from jaxinfer.functional.program import Program
from jaxinfer.functional.taps import Taps
from jaxinfer.kernels.attention.joint import JointRows
from jaxinfer.kernels.attention.paged import Cache, DecodeRows, PrefillTiles, Slots
from jaxinfer.kernels.attention.xla_attention import TILE
from jaxinfer.kv import groups as kv_groups
from jaxinfer.kv.groups import Place
from jaxinfer.layers import adapters
from jaxinfer.layers.attention import GroupStep, StepContext
from jaxinfer.layers.encoder import EncodeStep
from jaxinfer.models.base import FeatureRows, LanguageModel


def encode_joint(program: Program, params: Sequence[jax.Array], batch: EncodeBatch) -> jax.Array:
    """Run an encoder of inputs whose values attend to each other; return rows `[U, rows, width]`."""
    inputs = batch.inputs.astype(program.dtype)
    return program.module(params).encode_joint(inputs, batch.numbers, encode_step(program, batch))


def encode_cross(program: Program, params: Sequence[jax.Array], cache: Cache, batch: EncodeBatch) -> Cache:
    """Run the encoder of a model with cross-attention and return the cache with keys and values of its positions.

    The batch is made by `encoder_batch.encode_batch`; the `seen` field of later batches says which positions tokens
    see.
    """
    inputs = batch.inputs if jnp.issubdtype(batch.inputs.dtype, jnp.integer) else batch.inputs.astype(program.dtype)
    return program.module(params).encode_cross(inputs, batch.numbers, encode_step(program, batch), cache)


def encode_step(program: Program, batch: EncodeBatch) -> EncodeStep:
    """Return the attention context of an encoder batch."""
    cross = kv_groups.encoded(program.layout.kinds)
    first = 0 if cross is None else cross.first
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


def prefill(
    program: Program,
    params: Sequence[jax.Array],
    cache: Cache,
    batch: PrefillBatch,
    features: FeatureRows | None = None,
) -> tuple[jax.Array, Cache]:
    """Run prefill chunks of S sequences.

    Args:
        program, params: model, from `split`.
        cache: cache of `init_cache`, or the one that the previous call returned; donate it.
        batch: chunks, made by `prefill_batch`.
        features: encoder rows that replace the embeddings of some tokens; None without images.

    Returns:
        Float32 logits `[S, V']` of the tokens in `batch.last`, and the cache with the tokens' keys and values.

    Raises:
        ValueError: `batch.tables` are not those of the model's groups, or `batch.seen` or `batch.rope_positions` is
            missing.
    """
    hidden, cache = prefill_hidden(program, params, cache, batch, features)
    return program.module(params).logits(hidden[batch.last]), cache


def prefill_hidden(
    program: Program,
    params: Sequence[jax.Array],
    cache: Cache,
    batch: PrefillBatch,
    features: FeatureRows | None = None,
    *,
    taps: Taps | None = None,
    routed: tuple[jax.Array | None, ...] | None = None,
) -> tuple[jax.Array, Cache]:
    """Run `prefill`, but return the hidden states `[T, M]` of all tokens in place of logits.

    Args:
        program, params, cache, batch, features: as for `prefill`.
        taps: module outputs that are recorded or changed (`functional.taps`).
        routed: experts of each layer's tokens, in place of the routers' own choice (`StepContext.routed`).

    Raises:
        ValueError: as `prefill`.
    """
    if features is not None and program.features.rope_axes and batch.rope_positions is None:
        raise ValueError(
            "rope_positions is None, but this model's rope turns image tokens by row and column: pass "
            f"[{batch.tokens.shape[0]}, {program.features.rope_axes}], and rope_positions of later decodes as well"
        )
    tables, size = _flat(program, batch.tables)
    tiles = [batch.tiles.at[:, 0].add(group * size) if group else batch.tiles for group in range(program.layout.groups)]
    rows: list[PrefillTiles | JointRows] = [
        PrefillTiles(tables, tiles[group], batch.count, batch.seen[batch.tiles[:, 1]] if reads else None)
        for group, reads in enumerate(_reading(program, batch.seen))
    ]
    if batch.lengths is not None:
        rows = [_with_decodes(own, batch, (group + 1) * size) for group, own in enumerate(rows)]
    step = _context(program, cache, batch, batch.rows, batch.rope_lengths, rows, tile=batch.tile)
    step = replace(step, routed=routed)
    return _prepared(program, params, batch, taps)(batch.tokens, step, cache, features)


def _with_decodes(chunks: PrefillTiles, batch: PrefillBatch, end: int) -> JointRows:
    """Return the rows of a joint step in one group of layers, whose tables end before row `end`."""
    lengths, starts = batch.lengths, None
    places = lengths.shape[0]
    if chunks.spans is not None:
        starts, ends = jnp.where(lengths > 0, batch.seen[-places:].T, 0)
        lengths = ends
    return JointRows(*chunks, lengths, end - places, starts)


def decode(program: Program, params: Sequence[jax.Array], cache: Cache, batch: DecodeBatch) -> tuple[jax.Array, Cache]:
    """Run one decode step of B sequences.

    Args:
        program, params, cache: as for `prefill`.
        batch: one token, position and block table per sequence.

    Returns:
        Float32 logits `[B, V']`, and the cache with the tokens' keys and values.

    Raises:
        ValueError: as `prefill`.
    """
    hidden, cache = decode_hidden(program, params, cache, batch)
    return program.module(params).logits(hidden), cache


def decode_hidden(
    program: Program, params: Sequence[jax.Array], cache: Cache, batch: DecodeBatch, *, taps: Taps | None = None
) -> tuple[jax.Array, Cache]:
    """Run `decode`, but return the hidden states `[B, M]` in place of logits; `taps` as in `prefill_hidden`."""
    tables, size = _flat(program, batch.tables)
    rows = [
        DecodeRows(tables, batch.seen[:, 1], group * size, batch.seen[:, 0])
        if reads
        else DecodeRows(tables, batch.positions + 1, group * size)
        for group, reads in enumerate(_reading(program, batch.seen))
    ]
    owners = jnp.arange(size)
    step = _context(program, cache, batch, owners, batch.positions + 1, rows, items=batch.items)
    return _prepared(program, params, batch, taps)(batch.tokens, step, cache)


def _prepared(
    program: Program, params: Sequence[jax.Array], batch: DecodeBatch | PrefillBatch, taps: Taps | None
) -> LanguageModel:
    """Return the module of this trace, with the adapters of the batch's tokens and the taps."""
    module = program.module(params)
    if batch.adapters is not None:
        adapters.attach(module, batch.adapters)
    if taps is not None:
        taps.attach(module)
    return module


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
    rows: Sequence[DecodeRows | PrefillTiles | JointRows],
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
        rope_positions=batch.rope_positions,
        seen=batch.seen,
        states=batch.states,
        deterministic=program.deterministic,
    )
