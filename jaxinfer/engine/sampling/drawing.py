"""Random sampling of one token per row of logits, by the Gumbel-max method.

The method is written as an exponential race, which is equivalent to taking the maximum of logits with Gumbel noise:
token v gets an exponential random number E_v, and the smallest E_v / p_v wins. Each E_v depends on the row's seed,
sample index and position and on v alone, so a small change of the logits changes the result only if two tokens nearly
tie. Inverting the cumulative distribution needs one random number per row, but there a change of any logit moves all
later sums.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.engine.sampling.sampling_rows import Level, SamplingRows

BLOCK = 128
"""Number of neighbouring tokens whose maximum is found first on a CPU."""
BAD_TOKEN = -1
"""Token id of a row whose logits are not finite."""
FLOAT_BITS = 31
"""Number of bits of a non-negative float32."""
DIGIT = 4
"""Number of bits of a threshold found per pass over the logits on a GPU; one on a CPU, where several cost more."""
_INFINITY = 0x7F800000
_LOG_SERIES = (0.9999998, 0.50003684, 0.33185363, 0.27235743, 0.037412364, 0.7871947, -1.0840893, 1.1863799)
"""-log(1 - t) / t for t in [0, 1/2] as a polynomial, constant term first; relative error 2e-7."""


def skip_if(
    switched: bool, skip: jax.Array, cheap: Callable[[], jax.Array], full: Callable[[], jax.Array]
) -> jax.Array:
    """Return `full()`, or if `switched` and the scalar `skip` is true at run time, the equal `cheap()`."""
    return jax.lax.cond(skip, cheap, full) if switched else full()


def choose(logits: jax.Array, rows: SamplingRows, level: Level, switched: bool) -> jax.Array:
    """Return the token of each row, `[B]`: sampled if its temperature is above 0, else the argmax."""
    random = (rows.temperature > 0)[:, None]
    # One search decides both kinds of rows: the smallest time wins the race.
    return largest(
        _fusion_barrier(jnp.where(random, -_race(logits, rows, level, switched), logits), switched), switched
    )


def largest(logits: jax.Array, by_blocks: bool) -> jax.Array:
    """Return the first argmax of each row's logits, `[B]`, or `BAD_TOKEN` if the maximum is not finite.

    XLA's argmax on a CPU processes one number at a time, so with `by_blocks` it is taken over the maxima of blocks and
    then within one block. Not used on a GPU, where argmax is fused, and where a block could be split between shards of
    the vocabulary.
    """
    if by_blocks:
        blocks = _blocks(logits, -jnp.inf)
        tops = blocks.max(axis=-1)
        best, top = jnp.argmax(tops, axis=-1), tops.max(axis=-1)
        block = jnp.take_along_axis(blocks, best[:, None, None], axis=1)[:, 0]
        token = best * BLOCK + jnp.argmax(block, axis=-1)
        # A maximum of maxima may lose a NaN, a sum does not; -inf of masked tokens does not turn a sum into NaN.
        top = jnp.where(jnp.isnan(logits.sum(axis=-1)), jnp.nan, top)
    else:
        token, top = jnp.argmax(logits, axis=-1), logits.max(axis=-1)
    return jnp.where(jnp.isfinite(top), token.astype(jnp.int32), BAD_TOKEN)


def _race(logits: jax.Array, rows: SamplingRows, level: Level, switched: bool) -> jax.Array:
    """Return the race time of each token, `[B, V']`; infinity for tokens removed by min-p, top-k or top-p."""
    limit, gap = _limit(logits, rows, level, switched), _gaps(logits, rows)
    time = _fusion_barrier(exponential(token_bits(rows, logits.shape[1])), switched) * jnp.exp(gap)
    return jnp.where(gap > limit[:, None], jnp.inf, time)  # a NaN gap is kept and makes the row bad


def distribution(logits: jax.Array, rows: SamplingRows, level: Level, switched: bool) -> jax.Array:
    """Return the logits `[B, V']` that tokens are drawn by: divided by the temperature, -inf for removed tokens.

    Those of greedy rows are unchanged.
    """
    if level == Level.GREEDY:
        return logits
    limit, random = _limit(logits, rows, level, switched), (rows.temperature > 0)[:, None]
    scaled = logits / jnp.where(random, rows.temperature[:, None], 1.0)
    return jnp.where(random & (_gaps(logits, rows) > limit[:, None]), -jnp.inf, scaled)


def _limit(logits: jax.Array, rows: SamplingRows, level: Level, switched: bool) -> jax.Array:
    """Return the largest gap, `[B]`, that min-p, top-k and top-p keep."""
    limit = -jnp.log(rows.min_p)  # infinite for 0
    return _truncate(logits, limit, rows, switched) if level >= Level.TRUNCATED else limit


def _gaps(logits: jax.Array, rows: SamplingRows) -> jax.Array:
    """Return how far each token's log-probability is below the row's maximum, `[B, V']`."""
    temperature = jnp.where(rows.temperature > 0, rows.temperature, 1.0)
    return (logits.max(axis=-1, keepdims=True) - logits) / temperature[:, None]


def token_bits(rows: SamplingRows, vocab: int) -> jax.Array:
    """Return 32 random bits per token, `[B, vocab]` uint32, as a function of the row's key, position and the token id.

    Threefry hashes the row's key and position to 64 bits. These key a permutation of 32-bit integers, two rounds of
    multiply and xor-shift (constants of https://github.com/skeeto/hash-prospector), which XLA vectorises on a CPU.
    """

    def fold(key: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position))

    first, second = jax.vmap(fold)(rows.key, rows.position).T[..., None]
    bits = jnp.arange(vocab, dtype=jnp.uint32) + first
    bits = (bits ^ (bits >> 16)) * np.uint32(0x21F0AAAD)
    bits = ((bits ^ (bits >> 15)) + second) * np.uint32(0x735A2D97)
    return bits ^ (bits >> 15)


def exponential(bits: jax.Array) -> jax.Array:
    """Return exponentially distributed float32 numbers -log(1 - u), where u is (bits + 1/2) / 2**32.

    The relative error is below 1e-6 everywhere: small numbers decide races between many tokens, large ones between few.
    """
    signed = jax.lax.bitcast_convert_type(bits, jnp.int32)
    low = signed >= 0  # u < 1/2
    # 2**33 * u, or in the upper half 2**33 * (1 - u), whose exponent and mantissa then give the logarithm.
    scaled = 2 * (signed ^ (signed >> 31)).astype(jnp.float32) + 1
    parts = jax.lax.bitcast_convert_type(scaled, jnp.int32)
    mantissa = jax.lax.bitcast_convert_type((parts & 0x7FFFFF) | 0x3F800000, jnp.float32)
    halvings = jnp.where(low, 0, 159 - (parts >> 23)).astype(jnp.float32)
    part = jnp.where(low, scaled * np.float32(2**-33), 1 - mantissa / 2)  # in (0, 1/2]
    series = jnp.full_like(part, _LOG_SERIES[-1])
    for coefficient in _LOG_SERIES[-2::-1]:
        series = series * part + np.float32(coefficient)
    return part * series + halvings * np.float32(np.log(2))


def _fusion_barrier(values: jax.Array, switched: bool) -> jax.Array:
    """Keep a CPU from fusing `values` with its consumers, as XLA would not vectorise the fused loop."""
    return jax.lax.optimization_barrier(values) if switched else values


def _blocks(values: jax.Array, fill: float) -> jax.Array:
    """Reshape `[B, V']` to `[B, n, BLOCK]`, padding the end with `fill`."""
    padding = -values.shape[1] % BLOCK
    if padding:
        values = jnp.pad(values, ((0, 0), (0, padding)), constant_values=fill)
    return values.reshape(values.shape[0], -1, BLOCK)


def _truncate(logits: jax.Array, limit: jax.Array, rows: SamplingRows, switched: bool) -> jax.Array:
    """Return the largest gap, `[B]`, that top-k and top-p keep among gaps up to `limit`; ties are kept as well.

    Nothing is sorted: only a threshold is needed, and a few passes over the logits find it.
    """
    vocab, random = logits.shape[1], rows.temperature > 0

    def top_k() -> jax.Array:
        count = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, vocab), vocab)
        return jnp.minimum(limit, _threshold(_gaps(logits, rows), None, count, switched))

    def top_p() -> jax.Array:
        gap = _gaps(logits, rows)
        weights = jnp.where(gap > kept[:, None], 0, jnp.exp(-gap))
        nucleus = _threshold(gap, weights, rows.top_p * weights.sum(axis=-1), switched)
        return jnp.where(rows.top_p < 1, jnp.minimum(kept, nucleus), kept)

    # Branches recompute gaps from the logits: an array of that size that enters a branch is written to memory first.
    kept = skip_if(switched, ~(random & (rows.top_k > 0)).any(), lambda: limit, top_k)
    return skip_if(switched, ~(random & (rows.top_p < 1)).any(), lambda: kept, top_p)


def _threshold(values: jax.Array, weights: jax.Array | None, target: jax.Array, switched: bool) -> jax.Array:
    """Return the largest float, `[B]`, with less weight below it than `target` `[B]`: a value or infinity.

    Args:
        values: non-negative, `[B, V']`.
        weights: non-negative weight of each value, `[B, V']`; None if each weighs 1.
        target: positive.
        switched: whether to find one bit of the answer at a time, in a loop.
    """
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)  # integers in the order of the floats

    def narrow(found: jax.Array, shift: jax.Array | int, digits: int) -> jax.Array:
        bounds = [found + (digit << shift) for digit in range(1, 1 << digits)]
        inside = [bits < bound[:, None] for bound in bounds]
        parts = [one.astype(jnp.int32) if weights is None else jnp.where(one, weights, 0) for one in inside]
        # A single reduction of several arrays makes one pass over the logits.
        zeros = [jnp.zeros((), part.dtype) for part in parts]
        below = jax.lax.reduce(parts, zeros, lambda a, b: [x + y for x, y in zip(a, b, strict=True)], (1,))
        return found + (sum((one < target).astype(jnp.int32) for one in below) << shift)

    found = jnp.zeros(target.shape, jnp.int32)
    if switched:
        found = jax.lax.fori_loop(0, FLOAT_BITS, lambda i, so_far: narrow(so_far, FLOAT_BITS - 1 - i, 1), found)
    else:
        for shift in range(FLOAT_BITS // DIGIT * DIGIT, -1, -DIGIT):
            found = narrow(found, shift, min(DIGIT, FLOAT_BITS - shift))
    return jax.lax.bitcast_convert_type(jnp.minimum(found, _INFINITY), jnp.float32)
