"""Measure projections alone, fused and separate, at the shapes of their models."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu.context import Context, Figures, peak_bandwidth
from benchmarks.gpu.models import values
from benchmarks.gpu.timing import Timed, measure
from jaxinfer.kernels.matmul.choose import matmul

SERIAL = {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"}
"""XLA options that run independent calls one after another, as in a model."""
SEPARATE = SERIAL | {"xla_gpu_dot_merger_threshold_mb": 0}
"""XLA options that also keep XLA from merging products of one input, which it does by concatenating their weights in
every call."""
COPIES = 256 << 20
"""Bytes of weights that a program cycles through before it reuses the first: several times an L2 cache."""
KDA_DEPTH, KDA_COLUMNS = 2304, (1024, 1024, 1024, 8, 128, 128)
"""Kimi Delta Attention over four shards: q, k, v, b and the two low-rank inputs (sgl-project/sglang#17801)."""
SHAPES = {
    "kda_tp4": (KDA_DEPTH, KDA_COLUMNS),
    "llama8b_qkv": (4096, (4096, 1024, 1024)),
    "llama8b_gate_up": (4096, (14336, 14336)),
}
ROWS = (1, 16, 64, 256, 1024, 4096, 8192, 16384)
DECODE_ROWS = (1, 8, 32, 64)


@dataclass(frozen=True)
class Way:
    """Implementation of a projection: a function of an input and the weights of one call, with compiler options."""

    call: Callable[[jax.Array, Sequence[jax.Array]], object]
    options: dict[str, object]


def _fused(x: jax.Array, weights: Sequence[jax.Array]) -> jax.Array:
    return matmul(x, weights[0])


def _separate(x: jax.Array, weights: Sequence[jax.Array]) -> list[jax.Array]:
    return [matmul(x, weight) for weight in weights]


def timed(
    way: Way, rows: int, shapes: Sequence[tuple[int, ...]], dtype: jnp.dtype, *, copies: int, own: bool = True
) -> Timed:
    """Measure the seconds of one call, among `copies` calls in one program, each with its own input and weights
    `[columns, depth]`.

    Args:
        way: implementation to call.
        rows: rows of the input.
        shapes: weight shapes of one call; the last axis of the first one is the input's width.
        dtype: dtype of inputs and weights.
        copies: number of calls in the program.
        own: whether to apply the implementation's compiler options, which are for GPUs.
    """
    make = jax.jit(values, static_argnums=(1, 2))
    inputs = [make(jnp.uint32(call), (rows, shapes[0][-1]), dtype) for call in range(copies)]
    weights = [
        [make(jnp.uint32(copies + call * len(shapes) + i), shape, dtype) for i, shape in enumerate(shapes)]
        for call in range(copies)
    ]
    lowered = chained(way).lower(inputs, weights)
    compiled = lowered.compile(compiler_options=way.options if own else None)
    found = measure(lambda: compiled(inputs, weights))
    return Timed(found.median / copies, found.least / copies, found.most / copies)


def chained(way: Way) -> Any:
    """Return the program of several calls: (inputs, weights) -> results."""

    def program(inputs: Sequence[jax.Array], weights: Sequence[Sequence[jax.Array]]) -> list[Any]:
        results: list[Any] = []
        for x, mine in zip(inputs, weights, strict=True):
            if results:
                # Without the barrier XLA merges small products of several calls into one kernel.
                x, results[-1] = jax.lax.optimization_barrier((x, results[-1]))
            results.append(way.call(x, mine))
        return results

    return jax.jit(program)


def copies_for(context: Context, shapes: Sequence[tuple[int, ...]], rows: int) -> int:
    """Return the number of copies for bfloat16 weights of these shapes; two in a dry run."""
    return context.size(copies_of(2 * sum(map(math.prod, shapes)), rows), 2)


def copies_of(size: int, rows: int) -> int:
    """Return how many calls a program makes, each with its own weights of `size` bytes.

    Enough that weights leave the cache before reuse; fewer if the memory is filled by rows rather than weights.
    """
    return max(2, min(32, -(-COPIES // size), -(-65536 // rows)))


def fused_m(context: Context) -> Figures:
    """Measure fused and separate products for each number of rows: microseconds, and their ratio."""
    figures = dict(context.kept)
    toy = {"kda_tp4": (32, (16, 16, 8))}
    dtype = context.size(jnp.bfloat16, jnp.float32)
    for name, (depth, columns) in context.size(SHAPES, toy).items():
        whole, parts = [(sum(columns), depth)], [(part, depth) for part in columns]
        for rows in context.size(ROWS, (1, 4)):
            key = f"{name} m={rows}"
            if f"{key} ratio" in figures:
                continue
            copies = copies_for(context, parts, rows)
            one = timed(Way(_fused, SERIAL), rows, whole, dtype, copies=copies, own=not context.dry)
            many = timed(Way(_separate, SEPARATE), rows, parts, dtype, copies=copies, own=not context.dry)
            figures |= {
                f"{key} fused_us": 1e6 * one.median,
                f"{key} separate_us": 1e6 * many.median,
                f"{key} ratio": many.median / one.median,
                f"{key} spread": max(one.spread, many.spread),
            }
            context.save(figures)
    ratios = {key: value for key, value in figures.items() if key.endswith(" ratio")}
    return figures | {"least_ratio": min(ratios.values()), "least_ratio_at": min(ratios, key=ratios.__getitem__)}


def kda_decode(context: Context) -> Figures:
    """Compare one product for all six inputs and a batched one for the two low-rank paths with eight separate
    products.
    """
    depth, columns = context.size((KDA_DEPTH, KDA_COLUMNS), (32, (16, 16, 16, 4, 8, 8)))
    rank, width = columns[-1], columns[0]
    dtype, figures = context.size(jnp.bfloat16, jnp.float32), {}

    def fused(x: jax.Array, weights: Sequence[jax.Array]) -> list[jax.Array]:
        y = matmul(x, weights[0])
        low = y[:, -2 * rank :].reshape(-1, 2, rank)
        return [y, jnp.einsum("mgr,grn->gmn", low, weights[1])]

    def separate(x: jax.Array, weights: Sequence[jax.Array]) -> list[jax.Array]:
        *first, f_b, g_b = weights
        made = [matmul(x, weight) for weight in first]
        return [*made, matmul(made[-2], f_b), matmul(made[-1], g_b)]

    whole = [(sum(columns), depth), (2, rank, width)]
    parts = [*[(part, depth) for part in columns], (width, rank), (width, rank)]
    bytes_ = jnp.dtype(dtype).itemsize * sum(map(math.prod, whole))
    for rows in context.size(DECODE_ROWS, (1,)):
        copies = copies_for(context, whole, rows)
        one = timed(Way(fused, SERIAL), rows, whole, dtype, copies=copies, own=not context.dry)
        many = timed(Way(separate, SEPARATE), rows, parts, dtype, copies=copies, own=not context.dry)
        figures |= {f"fused_us m={rows}": 1e6 * one.median, f"separate_us m={rows}": 1e6 * many.median}
        context.save(figures)
    # The source does not state its number of rows; one row is a decode step of one sequence.
    figures |= {"weight_bytes": bytes_, "fused_us": figures["fused_us m=1"]}
    peak = peak_bandwidth()
    return figures | ({} if peak is None else {"floor_us_at_peak": 1e6 * bytes_ / peak})


def cross(context: Context) -> Figures:
    """Measure a cross-attention layer of an Mllama-11B shape: queries from the text, keys and values from the images.

    The baseline is one QKV projection of each input whose unneeded outputs are discarded, as vLLM did before
    `QKVCrossParallelLinear` (vllm-project/vllm#7448, #12325).
    """
    model, heads, kv_heads, dim = context.size((4096, 32, 8, 128), (32, 4, 2, 8))
    batch, text, image = context.size((16, 32, 6404), (2, 4, 8))
    dtype = context.size(jnp.bfloat16, jnp.float32)
    queries, keys = heads * dim, kv_heads * dim
    make = jax.jit(values, static_argnums=(1, 2))
    x = make(jnp.uint32(1), (batch * text, model), dtype)
    encoded = make(jnp.uint32(2), (batch * image, model), dtype)
    weight = make(jnp.uint32(3), (queries + 2 * keys, model), dtype)
    parts = jax.jit(lambda w: (w[:queries], w[queries:]))(weight)

    @jax.jit
    def ours(x: jax.Array, encoded: jax.Array, weights: tuple[jax.Array, jax.Array]) -> list[jax.Array]:
        return [matmul(x, weights[0]), *jnp.split(matmul(encoded, weights[1]), 2, axis=1)]

    @jax.jit
    def padded(x: jax.Array, encoded: jax.Array, weight: jax.Array) -> list[jax.Array]:
        # The barrier keeps XLA from shrinking the products to the used outputs, which would defeat the comparison.
        one, other = jax.lax.optimization_barrier((matmul(x, weight), matmul(encoded, weight)))
        return [one[:, :queries], *jnp.split(other[:, queries:], 2, axis=1)]

    fast, slow = measure(lambda: ours(x, encoded, parts)), measure(lambda: padded(x, encoded, weight))
    return {
        "batch": batch,
        "text_tokens": text,
        "image_tokens": image,
        "ms": 1e3 * fast.median,
        "padded_ms": 1e3 * slow.median,
        "ratio": slow.median / fast.median,
        "spread": max(fast.spread, slow.spread),
    }
