"""A cache that grows in place, for people who write JAX: capacity is reserved once, tokens are appended, one or
several.

    from jaxinfer import demo, functional, sharding
    from jaxinfer.functional.growing import GrowingCache
    from jaxinfer.loading import weights

    mesh = sharding.make_mesh()
    program, params = functional.split(weights.load(demo.path(), mesh), mesh)
    cache = GrowingCache.reserve(program, rows=1, capacity=256, step=64)
    logits, cache = cache.append(params, [[1, 5, 9]])
    for _ in range(20):
        logits, cache = cache.append(params, logits.argmax(axis=-1)[:, None])

Each append takes the memory of the cache it is called on, writes the new keys and values into it, and gives it on to
the cache that it returns: nothing else is copied, and the old one is of no more use. What a row has reserved it never
leaves, so the step compiled for a length serves until the next length that steps are compiled for (`Regions.widths`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import functional
from jaxinfer.errors import CacheConsumedError, CapacityError, ConfigError
from jaxinfer.functional import DecodeBatch, PrefillBatch, Program
from jaxinfer.kernels.attention.paged import Cache, Lane
from jaxinfer.kernels.attention.xla_attention import item_keys
from jaxinfer.kv import contiguous
from jaxinfer.kv import groups as kv_groups
from jaxinfer.kv.contiguous import Regions

LEAST_TOKENS = 16
"""Of a step that appends several tokens; it is compiled for this many, doubled on and on."""


@dataclass(frozen=True)
class GrowingCache:
    """Keys and values of R rows, each with room for `capacity` positions; a value that `append` consumes."""

    program: Program
    lanes: Cache
    """`[N, K, P, D]`."""
    regions: Regions
    """Where each row lies in them."""
    lengths: tuple[int, ...]
    """Positions that each row has."""

    @classmethod
    def reserve(cls, program: Program, rows: int = 1, capacity: int = 4096, step: int = 128) -> "GrowingCache":
        """An empty cache.

        Args:
            program: of the model (`functional.split`).
            rows: sequences.
            capacity: positions each of them can have; `step` divides it, or it becomes the next multiple.
            step: positions by which the read length grows.

        Raises:
            ConfigError: sizes that cannot be, or a model whose layers keep something else than positions.
        """
        for name, value in (("rows", rows), ("capacity", capacity), ("step", step)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        layout = program.layout
        if layout.states or kv_groups.encoded(layout.kinds) is not None:
            other = "recurrent state" if layout.states else "what an encoder read"
            raise ConfigError(
                f"a GrowingCache keeps the positions of sequences alone, but layers of this model keep {other}; use "
                "LLM(model, cache='contiguous')"
            )
        regions = Regions(rows, -(-capacity // step), layout.groups)
        lanes = functional.init_cache(program, regions.blocks, step)
        return cls(program, lanes, regions, (0,) * rows)

    @classmethod
    def adopt(
        cls,
        program: Program,
        layers: Sequence[Sequence[Any]],
        capacity: int = 4096,
        step: int = 128,
        lengths: Sequence[int] | None = None,
    ) -> "GrowingCache":
        """A cache that goes on from keys and values computed elsewhere. They are copied into it, once.

        Args:
            program, capacity, step: as for `reserve`.
            layers: of each layer keys and values `[R, K, S, D]`, keys with rope in; K as the cache has it, which
                repeats heads where a mesh has more shards.
            lengths: positions of each row that count; by default S.

        Raises:
            ConfigError: other layers, heads or dims than the model's, or sizes that cannot be.
            CapacityError: S above the capacity.
        """
        if len(layers) != len(program.specs):
            raise ConfigError(f"layers has {len(layers)} entries, but the model has {len(program.specs)} layers")
        rows, _, length, _ = np.shape(layers[0][0])
        empty, places = cls.reserve(program, rows, capacity, step), program.layout.places
        for number, (layer, place) in enumerate(zip(layers, places, strict=True)):
            lane = empty.lanes[place.lane]
            for name, given, array in zip(("keys", "values"), layer, lane, strict=True):
                expected = None if array is None else (rows, array.shape[1], length, array.shape[3])
                found = None if given is None else np.shape(given)
                if found != expected:
                    raise ConfigError(f"the {name} of layer {number} are {found}, not [R, K, S, D] = {expected}")
        counts = (length,) * rows if lengths is None else tuple(map(int, lengths))
        if len(counts) != rows or not all(0 <= count <= length for count in counts):
            raise ConfigError(f"lengths must be {rows} numbers in [0, {length}], got {counts}")
        empty._check_room((length,) * rows)
        lanes = list(empty.lanes)
        tables = empty._tables()
        for place, layer in zip(places, layers, strict=True):
            lanes[place.lane] = _fill(lanes[place.lane], layer, tables[place.group])
        return replace(empty, lanes=lanes, lengths=counts)

    @property
    def capacity(self) -> int:
        """Positions that each row can have."""
        return self.regions.width * self._step

    @property
    def nbytes(self) -> int:
        """Over all devices, whatever is written of it."""
        return sum(array.nbytes for array in jax.tree.leaves(self.lanes))

    @property
    def _step(self) -> int:
        return self.lanes[0].keys.shape[2]

    def _tables(self) -> np.ndarray:
        return self.regions.tables(np.arange(self.regions.rows), self.regions.width)

    def layer(self, number: int, length: int | None = None) -> tuple[jax.Array, jax.Array | None]:
        """A copy of the first positions of a layer, by default of the longest row: keys and values `[R, K, S, D]`."""
        self._check_there()
        place, length = self.program.layout.places[number], max(self.lengths) if length is None else length
        table = self._tables()[place.group]
        keys, values = jax.tree.map(lambda array: contiguous.read(array, table, length), self.lanes[place.lane])
        return keys, values

    def copy(self) -> "GrowingCache":
        """The same once more, in memory of its own."""
        self._check_there()
        return replace(self, lanes=jax.tree.map(jnp.copy, self.lanes))

    def append(self, params: Sequence[jax.Array], tokens: Any) -> tuple[jax.Array, "GrowingCache"]:
        """Runs the model over new tokens -> float32 logits `[R, V']` after the last of each row, and the cache with
        them.

        Args:
            params: of the model.
            tokens: `[R, n]` token ids, or a list of them for each row, of one or more.

        Raises:
            CacheConsumedError: this cache was appended to before.
            CapacityError: a row has not so much room.
            ValueError: another number of rows, or a row without a token.
        """
        self._check_there()
        new = [np.asarray(row, np.int32).ravel() for row in tokens]
        if len(new) != self.regions.rows or not all(map(len, new)):
            counts = [len(row) for row in new]
            raise ValueError(f"tokens must be one or more for each of {self.regions.rows} rows, got {counts}")
        lengths = tuple(old + len(row) for old, row in zip(self.lengths, new, strict=True))
        self._check_room(lengths)
        if max(map(len, new)) == 1:
            positions = np.array(self.lengths, np.int32)
            width = self.read_width(max(lengths))
            logits, lanes = _one(self.program, self.regions, width, params, self.lanes, np.concatenate(new), positions)
        else:
            total = LEAST_TOKENS
            while total < sum(map(len, new)):
                total *= 2
            chunks = [(row, old, length) for row, old, length in zip(new, self.lengths, lengths, strict=True)]
            empty = np.zeros((len(new), 0), np.int32)
            batch = functional.prefill_batch(chunks, empty, tokens=total, tile=self.program.tile)
            logits, lanes = _several(self.program, self.regions, params, self.lanes, batch)
        return logits, replace(self, lanes=lanes, lengths=lengths)

    def read_width(self, length: int) -> int:
        """Blocks that the step is compiled for that makes a row `length` positions long. Where the kernel reads what is
        there and no more, one program serves all.
        """
        if self.program.kernel != "xla":
            return self.regions.width
        least = max(1, item_keys(self._step) // self._step)
        return next(width for width in self.regions.widths(least) if width * self._step >= length)

    def _check_there(self) -> None:
        if any(array.is_deleted() for array in jax.tree.leaves(self.lanes)):
            raise CacheConsumedError(
                f"this cache, of {max(self.lengths)} positions, was appended to, and its memory is now that of the "
                "cache "
                "that append returned; go on with that one, or append to a copy() to keep both"
            )

    def _check_room(self, lengths: Sequence[int]) -> None:
        if max(lengths) > self.capacity:
            row = int(np.argmax(lengths))
            raise CapacityError(
                f"row {row} would have {lengths[row]} positions, but {self.capacity} are reserved for it; reserve with "
                "a "
                f"capacity of {lengths[row]} or more"
            )


@partial(jax.jit, donate_argnums=0)
def _fill(lane: Lane, layer: Sequence[jax.Array | None], table: jax.Array) -> Lane:
    return jax.tree.map(lambda array, given: contiguous.fill(array, given, table), lane, Lane(*layer))


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _one(
    program: Program,
    regions: Regions,
    width: int,
    params: Sequence[jax.Array],
    lanes: Cache,
    tokens: jax.Array,
    positions: jax.Array,
) -> tuple[jax.Array, Cache]:
    tables = regions.tables(jnp.arange(regions.rows), width)
    return functional.decode(program, params, lanes, DecodeBatch(tokens, positions, tables))


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _several(
    program: Program, regions: Regions, params: Sequence[jax.Array], lanes: Cache, batch: PrefillBatch
) -> tuple[jax.Array, Cache]:
    tables = regions.tables(jnp.arange(regions.rows), regions.width)
    return functional.prefill(program, params, lanes, replace(batch, tables=tables))
