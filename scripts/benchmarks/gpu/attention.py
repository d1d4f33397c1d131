"""Measure the attention of one layer alone, over the cache of many sequences."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from tuning.candidates import Call
from tuning.problems import Load

from benchmarks.gpu.context import Context, Figures, bandwidth_shares
from benchmarks.gpu.models import values
from benchmarks.gpu.timing import measure
from jaxinfer.errors import ConfigError
from jaxinfer.kernels.attention import choose as attention
from jaxinfer.kernels.attention.paged import DecodeRows, KVCache, Scoring, Slots
from jaxinfer.kernels.attention.xla_attention import item_keys
from jaxinfer.kernels.triton import triton_launch
from jaxinfer.sharding import make_mesh

HEADS, KV_HEADS, DIM, BLOCK = 32, 4, 128, 16
"""GQA with 8 query heads per key head: H = 32, K = 4, D = 128, in blocks of 16 positions."""
CASES = {
    "64x4096": (4096,) * 64,
    "1x131072": (131072,),
    "8x512": (512,) * 8,
    "100000_and_63_short": (100_000, *(16 + 8 * i for i in range(63))),
    "ragged_to_8192": tuple(range(128, 8192 + 128, 128)),
}
"""Cached positions of each sequence, by case."""
TOY_CASES = {"64x4096": (24, 24), "ragged_to_8192": (7, 33, 0)}
MAIN = "64x4096"
SHAPE = dict(heads=HEADS, kv_heads=KV_HEADS, dim=DIM, value_dim=DIM, latent=0, itemsize=2, tile=1, decode=1, codes=0)
"""The layer of `attention-tiles`, as tables of tiles name it."""


@dataclass(frozen=True)
class Problem:
    """Arguments of a decode call: random queries, keys and values, blocks in random order."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    kv_cache: KVCache
    slots: Slots
    rows: DecodeRows

    @property
    def live_bytes(self) -> int:
        """Bytes of the keys and values that must be read."""
        positions = int(np.asarray(self.rows.lengths).sum())
        return (
            2
            * positions
            * self.kv_cache.keys.shape[1]
            * self.kv_cache.keys.shape[3]
            * self.kv_cache.keys.dtype.itemsize
        )


def problem(lengths: Sequence[int], dtype: jnp.dtype = jnp.bfloat16, dim: int = DIM) -> Problem:
    """Make a problem with one new token per sequence, the last of its `lengths` positions."""
    needed = [-(-length // BLOCK) for length in lengths]
    total, batch = sum(needed), len(lengths)
    ids = np.random.default_rng(0).permutation(total).astype(np.int32)
    tables = np.zeros((batch, max(needed)), np.int32)
    start = 0
    for row, count in enumerate(needed):
        tables[row, :count] = ids[start : start + count]
        start += count
    last = np.maximum(np.array(lengths, np.int32) - 1, 0)
    own = tables[np.arange(batch), last // BLOCK]
    slots = Slots(np.where(np.array(lengths) > 0, own, total).astype(np.int32), last % BLOCK)
    make = jax.jit(values, static_argnums=(1, 2))
    arrays = [
        make(jnp.uint32(seed), shape, dtype)
        for seed, shape in enumerate(
            (
                (batch, HEADS, dim),
                (batch, KV_HEADS, dim),
                (batch, KV_HEADS, dim),
                (total, KV_HEADS, BLOCK, dim),
                (total, KV_HEADS, BLOCK, dim),
            )
        )
    ]
    rows = DecodeRows(tables, np.array(lengths, np.int32))
    return Problem(*arrays[:3], KVCache(*arrays[3:]), *jax.device_put((slots, rows)))


def seconds(kernel: str, given: Problem) -> float:
    """Measure the seconds of one call of an implementation, including the write of the new keys and values."""
    made = attention.implementation(kernel, make_mesh())
    # The XLA implementation allocates one item per piece, as in the engine's buckets.
    items = int((-(-np.asarray(given.rows.lengths) // item_keys(BLOCK))).sum())
    scoring = Scoring(given.q.shape[-1] ** -0.5)
    call = jax.jit(partial(made.decode, scoring=scoring, items=items), donate_argnums=3)
    # Donated at each call, so use a copy and keep the problem reusable.
    kv_cache = [jax.tree.map(jnp.copy, given.kv_cache)]

    def once() -> jax.Array:
        out, kv_cache[0] = call(given.q, given.k, given.v, kv_cache[0], given.slots, given.rows)
        return out

    return measure(once).median


def run(context: Context) -> Figures:
    """Measure bytes of live keys and values per second, for each implementation available here."""
    figures: Figures = dict(context.kept) | {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "block_size": BLOCK}
    kernels = _kernels()
    for name, lengths in context.size(CASES, TOY_CASES).items():
        for kernel in kernels:
            key = f"{kernel}_{name}"
            if f"{key}_us" in figures:
                continue
            given = problem(lengths, *context.size((), (jnp.float32, 16)))
            taken = seconds(kernel, given)
            figures |= {f"{key}_us": 1e6 * taken, **bandwidth_shares(context, key, given.live_bytes / taken)}
            context.save(figures)
    main = f"{kernels[-1]}_{MAIN}_"
    shares = {key.removeprefix(main): value for key, value in figures.items() if key.startswith(f"{main}share")}
    return figures | {"kernel": kernels[-1]} | shares


def _kernels() -> list[str]:
    """Return the available implementations; the engine's choice is last."""
    try:
        return [attention.XLA, attention.choose(attention.TRITON, make_mesh())]
    except ConfigError:
        return [attention.XLA]


def tiles(context: Context) -> Figures:
    """Compare candidate tilings of the case `64x4096` with the tiling chosen from the shapes (`scripts/tune.py`)."""
    if attention.TRITON not in _kernels():
        if context.dry:
            return {}
        attention.choose(attention.TRITON, make_mesh())  # raises with the reason
    call = Call("attend", SHAPE, triton_launch.target(make_mesh()), Load())
    figures = dict(context.kept)
    for entry in call.candidates():
        key = "us " + " ".join(f"{name}={value}" for name, value in entry.items())
        if key in figures:
            continue
        try:
            figures[key] = 1e6 * call.seconds(entry)
        except Exception as error:  # for example too little shared memory; the other candidates still count
            figures[key] = f"{type(error).__name__}: {error}"[:160]
        context.save(figures)
    best = min((key for key in figures if isinstance(figures[key], float)), key=lambda key: figures[key])
    chosen = 1e6 * call.seconds(call.estimated)
    return figures | {
        "chosen_us": chosen,
        "best": best,
        "best_us": figures[best],
        "chosen_over_best": chosen / figures[best],
    }
