"""Key/value cache that grows in place, for JAX users: reserve capacity once, then append one or more tokens at a time.

    from jaxinfer import demo, functional, sharding
    from jaxinfer.functional.growing import GrowingCache
    from jaxinfer.loading import weights

    mesh = sharding.make_mesh()
    program, params = functional.split(weights.load(demo.path(), mesh), mesh)
    cache = GrowingCache.reserve(program, rows=1, capacity=256, step=64)
    logits, cache = cache.append(params, [[1, 5, 9]])
    for _ in range(20):
        logits, cache = cache.append(params, logits.argmax(axis=-1)[:, None])

Each append donates the memory of the cache it is called on, writes the new keys and values into it, and passes it on to
the returned cache: nothing else is copied, and the old cache can no longer be used. A row never leaves its reserved
blocks, so a compiled step serves until the next read length that steps are compiled for (`Regions.widths`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxinfer import functional
from jaxinfer.errors import CacheConsumedError, CapacityError, ConfigError
from jaxinfer.functional import DecodeBatch, PrefillBatch, Program
from jaxinfer.kernels.attention import paged
from jaxinfer.kernels.attention.paged import Cache, KVCache
from jaxinfer.kernels.attention.quantised_cache import dequantise
from jaxinfer.kernels.attention.xla_attention import item_keys
from jaxinfer.kv import contiguous
from jaxinfer.kv import groups as kv_groups
from jaxinfer.kv.contiguous import Regions
from jaxinfer.kv.spec import Full, Lent
from jaxinfer.layers.sharded import model_axis, on_shards
from jaxinfer.sharding import mesh as meshes

LEAST_TOKENS = 16
"""Minimum number of tokens that steps with several tokens are compiled for; longer ones use doublings of it."""


@dataclass(frozen=True)
class GrowingCache:
    """Keys and values of R rows with room for `capacity` positions each; an immutable value that `append` consumes."""

    program: Program
    arrays: Cache
    """Keys and values, `[N, K, P, D]`, as `Program.kv_cache_dtype` says."""
    regions: Regions
    """Layout of the rows' blocks."""
    lengths: tuple[int, ...]
    """Number of positions in each row."""

    @classmethod
    def reserve(cls, program: Program, rows: int = 1, capacity: int = 4096, step: int = 128) -> "GrowingCache":
        """Allocate an empty cache.

        Args:
            program: the model's program (`functional.split`).
            rows: number of sequences.
            capacity: maximum number of positions per row; rounded up to a multiple of `step`.
            step: number of positions by which the read length grows.

        Raises:
            ConfigError: a size is invalid, or the model has layers that cache something other than positions.
        """
        for name, value in (("rows", rows), ("capacity", capacity), ("step", step)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        layout = program.layout
        if layout.states or kv_groups.encoded(layout.kinds) is not None:
            other = "recurrent state" if layout.states else "encoder keys and values"
            raise ConfigError(
                f"GrowingCache stores positions of sequences only, but layers of this model store {other}; use "
                "LLM(model, cache='contiguous')"
            )
        regions = Regions(rows, -(-capacity // step), layout.groups)
        arrays = functional.init_cache(program, regions.blocks, step)
        return cls(program, arrays, regions, (0,) * rows)

    @classmethod
    def adopt(
        cls,
        program: Program,
        layers: Sequence[Sequence[Any]],
        capacity: int = 4096,
        step: int = 128,
        lengths: Sequence[int] | None = None,
    ) -> "GrowingCache":
        """Create a cache from keys and values computed elsewhere. They are copied once.

        Args:
            program, capacity, step: as for `reserve`.
            layers: keys (with rope applied) and values of each layer, `[R, K, S, D]`; K as in the cache, which repeats
                heads if a mesh has more shards than heads.
            lengths: number of valid positions in each row; by default S.

        Raises:
            ConfigError: layers, heads or head dims differ from the model's, or a size is invalid.
            CapacityError: S exceeds the capacity.
        """
        if len(layers) != len(program.specs):
            raise ConfigError(f"layers has {len(layers)} entries, but the model has {len(program.specs)} layers")
        rows, _, length, _ = np.shape(layers[0][0])
        empty, places = cls.reserve(program, rows, capacity, step), program.layout.places
        for number, (layer, place) in enumerate(zip(layers, places, strict=True)):
            pair = jax.eval_shape(partial(_seen, program, number), empty.arrays[place.array])
            for name, given, array in zip(("keys", "values"), layer, pair[:2], strict=True):
                expected = None if array is None else (rows, array.shape[1], length, array.shape[3])
                found = None if given is None else np.shape(given)
                if found != expected:
                    raise ConfigError(
                        f"{name} of layer {number} have shape {found}; expected [R, K, S, D] = {expected}"
                    )
        counts = (length,) * rows if lengths is None else tuple(map(int, lengths))
        if len(counts) != rows or not all(0 <= count <= length for count in counts):
            raise ConfigError(f"lengths must be {rows} integers in [0, {length}], got {counts}")
        empty._check_room((length,) * rows)
        arrays = list(empty.arrays)
        tables = empty._tables()
        for number, (place, layer) in enumerate(zip(places, layers, strict=True)):
            arrays[place.array] = _fill(program, number, arrays[place.array], layer, place.ids(tables[place.group]))
        return replace(empty, arrays=arrays, lengths=counts)

    @property
    def capacity(self) -> int:
        """Maximum number of positions per row."""
        return self.regions.width * self._step

    @property
    def nbytes(self) -> int:
        """Allocated bytes over all devices, used or not."""
        return sum(array.nbytes for array in jax.tree.leaves(self.arrays))

    @property
    def _step(self) -> int:
        return self.arrays[0].keys.shape[2]

    def _tables(self) -> np.ndarray:
        return self.regions.tables(np.arange(self.regions.rows), self.regions.width)

    def layer(self, number: int, length: int | None = None) -> tuple[jax.Array, jax.Array | None]:
        """Copy keys and values `[R, K, S, D]` of a layer's first `length` positions (default: the longest row's).

        They are of the model's dtype, also from a quantised cache.
        """
        self._check_current()
        place, length = self.program.layout.places[number], max(self.lengths) if length is None else length
        table, pair = place.ids(self._tables()[place.group]), _seen(self.program, number, self.arrays[place.array])
        found = jax.tree.map(lambda array: contiguous.read(array, table, length), pair)
        keys, values, *scales = found
        if not found.quantised:
            return keys, values
        wide = (
            None if codes is None else dequantise(codes, own[..., :1]) for codes, own in zip((keys, values), scales)
        )
        return tuple(None if array is None else array.astype(self.program.dtype) for array in wide)

    def copy(self) -> "GrowingCache":
        """Copy the cache to new memory."""
        self._check_current()
        return replace(self, arrays=jax.tree.map(jnp.copy, self.arrays))

    def append(self, params: Sequence[jax.Array], tokens: Any) -> tuple[jax.Array, "GrowingCache"]:
        """Run the model over new tokens.

        Args:
            params: parameters of the model.
            tokens: token ids `[R, n]`, or a list of one or more token ids per row.

        Returns:
            Float32 logits `[R, V']` after the last token of each row, and the new cache.

        Raises:
            CacheConsumedError: this cache has been appended to before.
            CapacityError: a row has too little room.
            ValueError: the number of rows differs, or a row has no token.
        """
        self._check_current()
        new = [np.asarray(row, np.int32).ravel() for row in tokens]
        if len(new) != self.regions.rows or not all(map(len, new)):
            counts = [len(row) for row in new]
            raise ValueError(f"tokens must have one or more ids for each of {self.regions.rows} rows, got {counts}")
        lengths = tuple(old + len(row) for old, row in zip(self.lengths, new, strict=True))
        self._check_room(lengths)
        if max(map(len, new)) == 1:
            positions = np.array(self.lengths, np.int32)
            width = self.read_width(max(lengths))
            logits, arrays = _one(
                self.program, self.regions, width, params, self.arrays, np.concatenate(new), positions
            )
        else:
            total = LEAST_TOKENS
            while total < sum(map(len, new)):
                total *= 2
            chunks = [(row, old, length) for row, old, length in zip(new, self.lengths, lengths, strict=True)]
            empty = np.zeros((len(new), 0), np.int32)
            batch = functional.prefill_batch(chunks, empty, tokens=total, tile=self.program.tile)
            logits, arrays = _several(self.program, self.regions, params, self.arrays, batch)
        return logits, replace(self, arrays=arrays, lengths=lengths)

    def read_width(self, length: int) -> int:
        """Return the number of blocks read by the step that makes a row `length` positions long.

        Kernels that only read existing positions need a single program for all lengths.
        """
        if self.program.kernel != "xla":
            return self.regions.width
        least = max(1, item_keys(self._step) // self._step)
        return next(width for width in self.regions.widths(least) if width * self._step >= length)

    def _check_current(self) -> None:
        if any(array.is_deleted() for array in jax.tree.leaves(self.arrays)):
            raise CacheConsumedError(
                f"this cache of {max(self.lengths)} positions was consumed by append; use the cache that append "
                "returned, or append to a copy() to keep both"
            )

    def _check_room(self, lengths: Sequence[int]) -> None:
        if max(lengths) > self.capacity:
            row = int(np.argmax(lengths))
            raise CapacityError(
                f"row {row} would have {lengths[row]} positions, but its capacity is {self.capacity}; reserve with "
                f"capacity={lengths[row]} or more"
            )


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _fill(program: Program, number: int, pair: KVCache, layer: Sequence[jax.Array | None], table: jax.Array) -> KVCache:
    seen = _seen(program, number, pair)
    given = paged.as_stored(seen, *layer)
    # Of the scales that a head has room for the first is used.
    given = jax.tree.map(lambda array, own: jnp.broadcast_to(own, (*own.shape[:-1], array.shape[-1])), seen, given)
    filled = jax.tree.map(lambda array, own: contiguous.fill(array, own, table), seen, given)
    return _shaped(program, number, filled, *pair.keys.shape[1::2])


def _seen(program: Program, number: int, pair: KVCache) -> KVCache:
    """See the arrays that hold a layer's keys and values in the layer's own shape."""
    spec = _stored(program, number)
    return _shaped(program, number, pair, spec.heads_on(meshes.size(program.mesh)), spec.head_dim)


def _stored(program: Program, number: int) -> Full:
    """Return the spec of the layer that stores a layer's keys and values."""
    spec = program.specs[number]
    return program.specs[spec.lender] if isinstance(spec, Lent) else spec


def _shaped(program: Program, number: int, pair: KVCache, kv_heads: int, head_dim: int) -> KVCache:
    """See the arrays of a layer with heads of another number and size, on each device by itself."""
    if pair.keys.shape[1::2] == (kv_heads, head_dim):
        return pair
    shards = 1 if _stored(program, number).replicated else meshes.size(program.mesh)
    local = partial(paged.viewed, kv_heads=kv_heads // shards, head_dim=head_dim)
    divided = PartitionSpec(None, model_axis(shards))
    return on_shards(local, program.mesh, (divided,), divided, pair)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _one(
    program: Program,
    regions: Regions,
    width: int,
    params: Sequence[jax.Array],
    arrays: Cache,
    tokens: jax.Array,
    positions: jax.Array,
) -> tuple[jax.Array, Cache]:
    tables = regions.tables(jnp.arange(regions.rows), width)
    return functional.decode(program, params, arrays, DecodeBatch(tokens, positions, tables))


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _several(
    program: Program, regions: Regions, params: Sequence[jax.Array], arrays: Cache, batch: PrefillBatch
) -> tuple[jax.Array, Cache]:
    tables = regions.tables(jnp.arange(regions.rows), regions.width)
    return functional.prefill(program, params, arrays, replace(batch, tables=tables))
