"""State that stays on the device between steps, as shapes and shardings: cache, rows, edits and feature pool."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfer import functional
from jaxinfer.engine.runner.shapes import Shapes
from jaxinfer.engine.sampling.sampler import Edits
from jaxinfer.functional import Program
from jaxinfer.kernels.attention.paged import Cache


class RowState(NamedTuple):
    """Per-row state that stays on the device from step to step."""

    tokens: jax.Array
    """Last token of each row, `[R]` int32."""
    tables: jax.Array | None
    """Block tables of the rows for each group of layers, `[G, R, W]` int32; entries without a block are undefined.
    None if blocks follow from the row (`kv.contiguous`).
    """


def replicated(program: Program) -> NamedSharding:
    """Return the sharding of all inputs and outputs of a step other than parameters and cache: replicated."""
    return NamedSharding(program.mesh, PartitionSpec())


def abstract_cache(program: Program, shapes: Shapes) -> Cache:
    """Return shapes and shardings of the cache without allocating it."""
    return functional.abstract_cache(program, shapes.num_blocks, shapes.block_size, shapes.state_slots)


def abstract_draft_cache(program: Program, shapes: Shapes) -> Cache:
    """Return shapes and shardings of the draft model's cache, which has the blocks of the model's; empty without."""
    return [] if program.draft is None else abstract_cache(program.draft, shapes)


def by_device(program: Program) -> NamedSharding:
    return NamedSharding(program.mesh, PartitionSpec(program.mesh.axis_names))


def shardings(cache: Cache) -> Cache:
    return jax.tree.map(lambda array: array.sharding, cache)


def abstract_rows(program: Program, shapes: Shapes) -> RowState:
    """Return shapes and shardings of the row state."""
    array = partial(jax.ShapeDtypeStruct, sharding=replicated(program))
    tables = None if shapes.contiguous else array((shapes.groups, shapes.rows, shapes.width), jnp.int32)
    return RowState(array((shapes.rows,), jnp.int32), tables)


def abstract_edits(program: Program, shapes: Shapes) -> Edits:
    """Return shapes and shardings of history `[R, L]` and bias `[R, V']`."""
    array, length = partial(jax.ShapeDtypeStruct, sharding=replicated(program)), shapes.width * shapes.block_size
    return Edits(array((shapes.rows, length), jnp.int32), array((shapes.rows, program.vocab), jnp.float32))


def abstract_features(program: Program, shapes: Shapes) -> jax.ShapeDtypeStruct:
    """Return shape and sharding of the feature pool `[F, M]`; each slot has `rows` rows."""
    rows = 0 if program.features is None else program.features.rows
    shape = (shapes.feature_slots * rows, program.feature_width)
    return jax.ShapeDtypeStruct(shape, program.dtype, sharding=replicated(program))


def install_tables(rows: RowState, entries: jax.Array) -> RowState:
    """Write `entries` `[4, n]` (group, row, column, block id) to the block tables; drop rows out of range."""
    group, row, column, block = entries
    return rows._replace(tables=rows.tables.at[group, row, column].set(block, mode="drop"))
