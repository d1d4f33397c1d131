"""Random inputs for attention kernels: sequences in a paged cache whose unused slots are NaN."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.functional import prefill_batch
from jaxinfer.kernels.attention import paged
from jaxinfer.kernels.attention.paged import DecodeRows, KVCache, PrefillTiles, Scoring, Slots
from jaxinfer.kernels.attention.quantised_cache import format_of, quantise
from jaxinfer.kernels.attention.xla_attention import TILE

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 4e-3}
CAPACITY = 3
"""Number of cache blocks beyond those that the sequences hold."""


@dataclass(frozen=True)
class Shape:
    """Shape and score options of an attention layer."""

    heads: int = 6
    kv_heads: int = 2
    dim: int = 8
    block: int = 4
    dtype: str = "float32"
    window: int | None = None
    chunked: bool = False
    softcap: float | None = None
    sinks: bool = False
    value_dim: int | None = None
    """Head size of the values, Dv; None for that of the keys."""
    latent: bool = False
    """Whether the values are the first `value_dim` columns of the keys (MLA)."""
    codes: str | None = None
    """Format of a quantised cache: "int8" or "fp8"."""
    wide: int = 1
    """How many times as wide the heads are as those of the arrays, which other layers have, too."""

    @property
    def scoring(self) -> Scoring:
        scale = self.dim**-0.5
        chunked = self.chunked and self.window is not None
        return Scoring(scale, self.window, self.softcap, self.value_dim if self.latent else None, chunked)

    def first_key(self, position: int) -> int:
        """Return the first key position that a query sees."""
        if self.window is None:
            return 0
        return position // self.window * self.window if self.chunked else max(0, position - self.window + 1)


PLAIN = Shape()
SHAPES = {
    "plain": PLAIN,
    "one to one": replace(PLAIN, heads=4, kv_heads=4),
    "all on one": replace(PLAIN, heads=8, kv_heads=1),
    "bfloat16": replace(PLAIN, dtype="bfloat16"),
    "softcap": replace(PLAIN, softcap=1.5),
    "sinks": replace(PLAIN, sinks=True),
    "window": replace(PLAIN, window=5),
    "window of one block, sinks, softcap": replace(PLAIN, window=PLAIN.block, sinks=True, softcap=2.0),
    "window of one token": replace(PLAIN, window=1),
    "chunks": replace(PLAIN, window=6, chunked=True),
    "chunks of one block, int8 codes, sinks": replace(
        PLAIN, window=PLAIN.block, chunked=True, codes="int8", sinks=True
    ),
    "narrow values": replace(PLAIN, value_dim=5),
    "latent": replace(PLAIN, kv_heads=1, value_dim=6, latent=True),
    "int8 codes": replace(PLAIN, codes="int8"),
    "fp8 codes, bfloat16, narrow values": replace(PLAIN, codes="fp8", dtype="bfloat16", value_dim=5),
    "int8 codes, bfloat16, window, sinks, softcap": replace(
        PLAIN, codes="int8", dtype="bfloat16", window=5, sinks=True, softcap=2.0
    ),
    "wide heads": replace(PLAIN, wide=2),
    "wide heads of int8 codes, bfloat16": replace(PLAIN, dtype="bfloat16", codes="int8", wide=2),
    "latent of fp8 codes": replace(PLAIN, kv_heads=1, value_dim=6, latent=True, codes="fp8"),
}
"""Layer shapes that every implementation must support."""

CHUNKS = {
    "one whole prompt": [(0, 11)],
    "one token": [(0, 1)],
    "the rest of a prompt": [(5, 6)],
    "several": [(0, 4), (0, 5), (8, 1), (3, 9), (12, 8)],
    "more than a tile": [(3, TILE + 5), (0, 2)],
    "exactly a tile": [(0, TILE), (1, TILE - 1), (2, TILE + 1)],
}
"""Start positions and lengths of a step's chunks, around the ends of blocks of 4 and of tiles."""


class Case:
    """Sequences of given lengths; the last `fresh` tokens of each belong to the step and are not in the cache yet."""

    def __init__(self, shape: Shape, lengths: Sequence[int], fresh: Sequence[int], *, width: int | None = None, seed=0):
        self.shape, self.lengths, self.fresh = shape, list(lengths), list(fresh)
        self.rng = rng = np.random.default_rng(seed)
        width = width or max(1, -(-max(lengths) // shape.block))
        self.blocks = len(lengths) * width + CAPACITY
        self.tables = np.zeros((len(lengths), width), np.int32)
        ids = rng.permutation(self.blocks)
        dims = [shape.dim] if shape.latent else [shape.dim, shape.value_dim or shape.dim]
        cached = [np.full((self.blocks, shape.kv_heads, shape.block, d), np.nan, np.float32) for d in dims]
        self.dense = []
        for row, (length, new) in enumerate(zip(lengths, fresh, strict=True)):
            self.tables[row] = ids[row * width : (row + 1) * width]
            own = [rng.normal(size=(length, shape.kv_heads, d)).astype(np.float32) for d in dims]
            self.dense.append(own)
            for array, values in zip(cached, own, strict=True):
                # The cache keeps no positions before the window.
                for at in range(shape.first_key(length - new), length - new):
                    array[self.tables[row, at // shape.block], :, at % shape.block] = values[at]
        arrays = [jax.device_put(array.astype(jnp.dtype(shape.dtype))) for array in cached]
        self.kv_cache = KVCache(*arrays, *[None] * (2 - len(arrays)))
        if shape.codes is not None:  # codes are arbitrary and scales NaN where a slot is unused
            made = [quantise(array, format_of(shape.codes)) for array in arrays]
            codes, scales = ([*part, *[None] * (2 - len(made))] for part in zip(*made, strict=True))
            self.kv_cache = KVCache(*codes, *scales)
        self._seen, self.kv_cache = self.kv_cache, self.stored(self.kv_cache)
        sinks = rng.normal(size=shape.heads).astype(jnp.dtype(shape.dtype))
        self.sinks = jax.device_put(sinks) if shape.sinks else None

    def stored(self, kv_cache: KVCache) -> KVCache:
        """Return the arrays in the shape of narrower heads; each head has one scale, and room for several."""
        wide = self.shape.wide
        if wide == 1:
            return kv_cache
        pairs = (None if one is None else jnp.repeat(one, wide, axis=3) for one in kv_cache[2:])
        arrays = [*kv_cache[:2], *pairs]
        return KVCache(*(None if a is None else a.reshape(len(a), -1, a.shape[2], a.shape[3] // wide) for a in arrays))

    def step(self, padding: int = 0) -> tuple[jax.Array, jax.Array, jax.Array | None, np.ndarray, np.ndarray]:
        """Return q, k, v of the step's tokens plus `padding` padding tokens, and each token's row and position (-1 for
        padding)."""
        shape = self.shape
        rows = np.concatenate([np.full(new, row) for row, new in enumerate(self.fresh)] + [np.zeros(padding)])
        positions = np.concatenate(
            [np.arange(n - new, n) for n, new in zip(self.lengths, self.fresh, strict=True)] + [np.full(padding, -1)]
        )
        q = self.rng.normal(size=(len(rows), shape.heads, shape.dim)).astype(np.float32)
        new = [
            np.concatenate([own[i][n - f :] for own, n, f in zip(self.dense, self.lengths, self.fresh, strict=True)])
            for i in range(len(self.dense[0]))
        ]
        new = [np.pad(a, ((0, padding), (0, 0), (0, 0)), constant_values=7.0) for a in new]
        q, *kv = (jax.device_put(a.astype(jnp.dtype(shape.dtype))) for a in (q, *new))
        return q, kv[0], None if shape.latent else kv[1], rows.astype(np.int32), positions.astype(np.int32)

    def slots(self, rows: np.ndarray, positions: np.ndarray) -> Slots:
        at = np.maximum(positions, 0)
        blocks = np.where(positions >= 0, self.tables[rows, at // self.shape.block], self.blocks)
        return Slots(*jax.device_put((blocks, at % self.shape.block)))

    def decode_rows(self, padding: int = 0) -> DecodeRows:
        tables = np.concatenate([self.tables, np.resize(self.tables, (padding, self.tables.shape[1]))])
        lengths = np.array([*self.lengths, *[0] * padding], np.int32)
        return DecodeRows(*jax.device_put((tables, lengths)))

    def prefill_tiles(self, tile: int, padding: int = 0) -> PrefillTiles:
        chunks = [(np.zeros(new, np.int32), n - new, 0) for n, new in zip(self.lengths, self.fresh, strict=True)]
        batch = prefill_batch(chunks, self.tables, tokens=sum(self.fresh) + padding, rows=len(chunks) + 2, tile=tile)
        return PrefillTiles(*jax.device_put((batch.tables, batch.tiles, batch.count)))

    def expected(
        self, q: jax.Array, k: jax.Array, v: jax.Array | None, rows: np.ndarray, positions: np.ndarray
    ) -> tuple[np.ndarray, KVCache]:
        """Return the reference implementation's output and updated cache."""
        out, kv_cache = _oracle(
            q,
            k,
            v,
            self._seen,
            self.slots(rows, positions),
            self.tables,
            rows,
            positions,
            self.sinks,
            scoring=self.shape.scoring,
        )
        return np.asarray(out, np.float32), self.stored(kv_cache)

    def close(self, found: jax.Array, expected: np.ndarray) -> None:
        assert found.dtype == jnp.dtype(self.shape.dtype)
        np.testing.assert_allclose(
            np.asarray(found, np.float32), expected, atol=TOLERANCE[self.shape.dtype], rtol=TOLERANCE[self.shape.dtype]
        )


@partial(jax.jit, static_argnames="scoring")
def _oracle(q, k, v, kv_cache, slots, tables, rows, positions, sinks, *, scoring):
    kv_cache = paged.write(kv_cache, k, v, slots)
    return paged.reference(q, kv_cache, tables, rows, positions, scoring, sinks), kv_cache


def same_cache(found: KVCache, expected: KVCache, wide: int = 1) -> None:
    """Assert that two caches are bitwise equal, with NaN equal to NaN.

    `wide`: scales that a head has room for, of which the first is compared.
    """
    for name, one, other in zip(KVCache._fields, found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and "scales" in name:
            one, other = (array.ravel()[::wide] for array in (one, other))
        if one is not None:
            np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))
