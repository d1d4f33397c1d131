"""Calls of tunable kernels, made from the shapes by which a table is keyed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.kernels.attention.paged import DecodeRows, KVCache, PrefillTiles, Scoring, Slots
from jaxinfer.kernels.attention.quantised_cache import SCALE
from jaxinfer.kernels.attention.triton_attention import TritonAttention
from jaxinfer.kernels.matmul import triton_grouped, triton_packed
from jaxinfer.kernels.triton.triton_launch import Target

Shape = Mapping[str, int]
FLOATS = {2: jnp.dtype(jnp.bfloat16), 4: jnp.dtype(jnp.float32)}
SLOTS = 16
"""Positions in a block of the cache."""


@dataclass(frozen=True)
class Load:
    """How much a call of attention has to do."""

    sequences: int = 64
    """Sequences of a decode step."""
    positions: int = 4096
    """Cached positions of each of them."""
    tokens: int = 2048
    """Tokens of a prefill step."""


@dataclass(frozen=True)
class Problem:
    """A call of a kernel: given arrays and a state, which is donated, it returns its output and the new state."""

    call: Callable[..., tuple[Any, Any]]
    given: Any
    """Arrays of the call; those that are shapes are filled with random values, integers are given."""
    state: Any = ()


def attend(shape: Shape, load: Load, target: Target) -> Problem:
    """Return a decode step of `load.sequences`, or the prefill of one sequence, over a cache of random blocks."""
    own, dtype = shape, FLOATS[shape["itemsize"]]
    rows, length = (load.sequences, load.positions) if own["decode"] else (1, load.tokens)
    tokens, width = rows if own["decode"] else length, -(-length // SLOTS)
    array, widths = jax.ShapeDtypeStruct, (own["dim"], None if own["latent"] else own["value_dim"])
    kinds = ((jnp.int8 if own["codes"] else dtype, widths), (SCALE, [d and 1 for d in widths] if own["codes"] else ()))
    parts = [
        None if d is None else array((rows * width, own["kv_heads"], SLOTS, d), kind) for kind, ds in kinds for d in ds
    ]
    cache = KVCache(*parts)
    q, k = array((tokens, own["heads"], own["dim"]), dtype), array((tokens, own["kv_heads"], own["dim"]), dtype)
    v = None if own["latent"] else array((tokens, own["kv_heads"], own["value_dim"]), dtype)
    tables = np.random.default_rng(0).permutation(rows * width).astype(np.int32).reshape(rows, width)
    at = np.full(rows, length - 1) if own["decode"] else np.arange(length)
    blocks = tables[np.arange(rows) if own["decode"] else 0, at // SLOTS]
    slots = Slots(blocks.astype(np.int32), (at % SLOTS).astype(np.int32))
    scoring, kernels = Scoring(own["dim"] ** -0.5, value_dim=own["value_dim"]), TritonAttention(target)
    if own["decode"]:
        step, run = DecodeRows(tables, np.full(rows, length, np.int32)), partial(kernels.decode, scoring=scoring)
    else:
        first = np.arange(0, length, own["tile"])
        columns = [np.zeros_like(first), first, first, np.minimum(own["tile"], length - first)]
        step = PrefillTiles(tables, np.stack(columns, axis=1).astype(np.int32), np.int32(len(first)))
        run = partial(kernels.prefill, scoring=scoring, tile=own["tile"])
    return Problem(lambda given, cache: run(*given[:3], cache, *given[3:]), (q, k, v, slots, step), cache)


def grouped(shape: Shape, _: Load, target: Target) -> Problem:
    """Return a product of experts to which the rows are routed evenly."""
    rows, coded = shape["mean"] * shape["groups"], shape["itemsize"] == 1
    array, dtype = jax.ShapeDtypeStruct, FLOATS[2] if coded else FLOATS[shape["itemsize"]]
    matrix = shape["groups"], shape["columns"], shape["inner"]
    given = (
        array((rows, shape["inner"]), dtype),
        array(matrix, jnp.int8 if coded else dtype),
        np.arange(0, rows + 1, shape["mean"], dtype=np.int32),
        array(matrix[:2], jnp.float32) if coded else None,
    )
    return Problem(lambda given, state: (triton_grouped.matmul(*given, target), state), given)


def packed(shape: Shape, _: Load, target: Target) -> Problem:
    """Return a product with a weight of 4 bits, or with those of experts to which the rows are routed evenly."""
    experts, array, dtype = shape.get("experts"), jax.ShapeDtypeStruct, FLOATS[shape["itemsize"]]
    stack = (experts,) if experts else ()
    groups = *stack, shape["columns"], shape["inner"] // shape["group"]
    rows = shape["rows"] * (experts or 1)
    given = (
        array((rows, shape["inner"]), dtype),
        array((*stack, shape["columns"], shape["inner"] // 2), jnp.uint8),
        array(groups, jnp.uint8 if shape.get("floats") else jnp.float16),
        array(groups, jnp.uint8) if shape["asymmetric"] else None,
        np.arange(0, rows + 1, shape["rows"], dtype=np.int32) if experts else None,
    )
    return Problem(
        lambda given, state: (triton_packed.matmul(*given[:4], dtype, target, given[4]), state),
        given,
    )


KERNELS: dict[str, Callable[[Shape, Load, Target], Problem]] = {"attend": attend, "grouped": grouped, "packed": packed}
"""Makers of problems by the name of the kernel in a table."""


def _attention(heads: int, kv_heads: int, dim: int, *, codes: int = 0, **other: int) -> list[tuple[str, Shape]]:
    """Return the shapes of decode and prefill of an attention layer."""
    from jaxinfer.kernels.triton.triton_tiles import tile

    own = dict(heads=heads, kv_heads=kv_heads, dim=dim, value_dim=dim, latent=0, itemsize=2) | other
    queries = tile(heads // kv_heads, own["value_dim"], own["itemsize"])
    return [("attend", own | dict(tile=size, decode=decode, codes=codes)) for size, decode in ((1, 1), (queries, 0))]


def _experts(groups: int, columns: int, inner: int, *means: int) -> list[tuple[str, Shape]]:
    return [("grouped", dict(mean=mean, groups=groups, columns=columns, inner=inner, itemsize=2)) for mean in means]


def _experts_in_4_bits(experts: int, columns: int, inner: int, *rows: int) -> list[tuple[str, Shape]]:
    """Return the shapes of products with experts in MXFP4, by the rows of one."""
    own = dict(columns=columns, inner=inner, group=32, itemsize=2, asymmetric=0, experts=experts, floats=1)
    return [("packed", {"rows": count} | own) for count in rows]


COMMON: dict[str, list[tuple[str, Shape]]] = {
    "llama-8b": _attention(32, 8, 128),
    "llama-1b": _attention(32, 8, 64),
    "gemma-256": _attention(16, 8, 256),
    "gpt-oss": _attention(64, 8, 64),
    "mla": _attention(128, 1, 576, value_dim=512, latent=1),
    "qwen3-30b-experts": _experts(128, 1536, 2048, 1, 4, 128) + _experts(128, 2048, 768, 1, 4, 128),
    "gpt-oss-20b-experts": _experts_in_4_bits(32, 5760, 2880, 1, 8, 256)
    + _experts_in_4_bits(32, 2880, 2880, 1, 8, 256),
    "gpt-oss-120b-experts": _experts_in_4_bits(128, 5760, 2880, 1, 2, 64)
    + _experts_in_4_bits(128, 2880, 2880, 1, 2, 64),
    "mixtral-experts": _experts(8, 28672, 4096, 2, 16, 512) + _experts(8, 4096, 14336, 2, 16, 512),
}
"""Kernels and shapes of common layers, by name."""
