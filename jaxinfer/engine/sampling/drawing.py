"""Draw a random token for each row of logits.

A token is drawn as the winner of an exponential race, which is the same as the maximum of logits with Gumbel noise:
token v gets an exponential random number E_v, and the smallest E_v / p_v wins. Each E_v follows from the row's seed,
sample index and position and from v alone, so a small change of the logits changes the winner only where two tokens
nearly tie. Inverting a running sum over the vocabulary costs one random number a row, but there a change of any logit
moves all later sums.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.engine.sampling.sampling_rows import Level, SamplingRows

BLOCK = 128
"""Neighbouring tokens of the vocabulary whose largest value is found first on a CPU."""
BAD_TOKEN = -1
"""What a row samples whose logits are not numbers."""
FLOAT_BITS = 31
"""Bits of a float32 that is not negative."""
DIGIT = 4
"""Bits of a threshold that one pass over the logits finds on a GPU; on a CPU, where it costs more to find several,
one."""
_INFINITY = 0x7F800000
_LOG_SERIES = (0.9999998, 0.50003684, 0.33185363, 0.27235743, 0.037412364, 0.7871947, -1.0840893, 1.1863799)
"""-log(1 - t) / t for t in [0, 1/2] as a polynomial, constant term first; relative error 2e-7."""


def either(
    switched: bool, skip: jax.Array, least: Callable[[], jax.Array], whole: Callable[[], jax.Array]
) -> jax.Array:
    """Return `whole()`, or where the scalar `skip` says at run time that it gives the same, `least()`."""
    return jax.lax.cond(skip, least, whole) if switched else whole()


def choose(logits: jax.Array, rows: SamplingRows, level: Level, switched: bool) -> jax.Array:
    """Return the token of each row `[B]`: drawn where its temperature is above 0, else that of the largest logit."""
    random = (rows.temperature > 0)[:, None]
    # Rows of both kinds are decided by one search: a race is won by the smallest time.
    return largest(_apart(jnp.where(random, -_race(logits, rows, level, switched), logits), switched), switched)


def largest(logits: jax.Array, by_blocks: bool) -> jax.Array:
    """Return the token of each row's largest logit `[B]`, the first of several; `BAD_TOKEN` where there is none.

    XLA's argmax on a CPU looks at one number at a time: there it is taken of the blocks' maxima and within one
    block. Not on a GPU, where it is fused, and where blocks would not lie whole in a shard of the vocabulary.
    """
    if by_blocks:
        blocks = _blocks(logits, -jnp.inf)
        tops = blocks.max(axis=-1)
        best, top = jnp.argmax(tops, axis=-1), tops.max(axis=-1)
        block = jnp.take_along_axis(blocks, best[:, None, None], axis=1)[:, 0]
        token = best * BLOCK + jnp.argmax(block, axis=-1)
        # A maximum of maxima may lose a NaN there, a sum does not; -inf, where tokens are masked, does not make one.
        top = jnp.where(jnp.isnan(logits.sum(axis=-1)), jnp.nan, top)
    else:
        token, top = jnp.argmax(logits, axis=-1), logits.max(axis=-1)
    return jnp.where(jnp.isfinite(top), token.astype(jnp.int32), BAD_TOKEN)


def _race(logits: jax.Array, rows: SamplingRows, level: Level, switched: bool) -> jax.Array:
    """Return the time of each token `[B, V']` in the race of its row; infinity for tokens that min-p, top-k and top-p
    drop."""
    limit = -jnp.log(rows.min_p)  # infinite for 0
    if level >= Level.TRUNCATED:
        limit = _truncate(logits, limit, rows, switched)
    gap = _gaps(logits, rows)
    time = _apart(exponential(token_bits(rows, logits.shape[1])), switched) * jnp.exp(gap)
    return jnp.where(gap > limit[:, None], jnp.inf, time)  # a gap that is no number is kept, and makes the row bad


def _gaps(logits: jax.Array, rows: SamplingRows) -> jax.Array:
    """Return how much less likely than the likeliest each token is `[B, V']`, as a difference of log-probabilities."""
    temperature = jnp.where(rows.temperature > 0, rows.temperature, 1.0)
    return (logits.max(axis=-1, keepdims=True) - logits) / temperature[:, None]


def token_bits(rows: SamplingRows, vocab: int) -> jax.Array:
    """Return 32 random bits for each token `[B, vocab]` uint32, a function of the row's key, its position and the
    token's id.

    The row's key and position are hashed by Threefry to 64 bits. With these a permutation of 32-bit integers is keyed,
    two rounds of multiplication and shift (constants of https://github.com/skeeto/hash-prospector), which XLA
    vectorises on a CPU.
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
    # 2**33 * u, or of the upper half 2**33 * (1 - u), whose exponent and mantissa then give the logarithm.
    scaled = 2 * (signed ^ (signed >> 31)).astype(jnp.float32) + 1
    parts = jax.lax.bitcast_convert_type(scaled, jnp.int32)
    mantissa = jax.lax.bitcast_convert_type((parts & 0x7FFFFF) | 0x3F800000, jnp.float32)
    halvings = jnp.where(low, 0, 159 - (parts >> 23)).astype(jnp.float32)
    part = jnp.where(low, scaled * np.float32(2**-33), 1 - mantissa / 2)  # in (0, 1/2]
    series = jnp.full_like(part, _LOG_SERIES[-1])
    for coefficient in _LOG_SERIES[-2::-1]:
        series = series * part + np.float32(coefficient)
    return part * series + halvings * np.float32(np.log(2))


def _apart(values: jax.Array, switched: bool) -> jax.Array:
    """Return `values`, on a CPU computed by a loop of their own: fused with what reads them, XLA does not vectorise
    them."""
    return jax.lax.optimization_barrier(values) if switched else values


def _blocks(values: jax.Array, fill: float) -> jax.Array:
    """Return `[B, V']` as `[B, n, BLOCK]`, filled up at the end."""
    padding = -values.shape[1] % BLOCK
    if padding:
        values = jnp.pad(values, ((0, 0), (0, padding)), constant_values=fill)
    return values.reshape(values.shape[0], -1, BLOCK)


def _truncate(logits: jax.Array, limit: jax.Array, rows: SamplingRows, switched: bool) -> jax.Array:
    """Return the largest gap `[B]` that top-k and top-p keep of those up to `limit`; tokens that tie with it are kept
    as well.

    Nothing is sorted: a threshold is all that is needed, and a few passes over the logits find it.
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

    # Inside a branch gaps are computed from the logits again: an array of that size that enters it is written out
    # first.
    kept = either(switched, ~(random & (rows.top_k > 0)).any(), lambda: limit, top_k)
    return either(switched, ~(random & (rows.top_p < 1)).any(), lambda: kept, top_p)


def _threshold(values: jax.Array, weights: jax.Array | None, target: jax.Array, switched: bool) -> jax.Array:
    """Return the largest float `[B]` below which there is less weight than `target` `[B]`: one of the values, or
    infinity.

    Args:
        values: `[B, V']`, not negative.
        weights: `[B, V']` of each value, not negative; None: each weighs 1.
        target: above 0.
        switched: whether one bit of the answer is found at a time, in a loop.
    """
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)  # integers in the order of the floats

    def narrow(found: jax.Array, shift: jax.Array | int, digits: int) -> jax.Array:
        bounds = [found + (digit << shift) for digit in range(1, 1 << digits)]
        inside = [bits < bound[:, None] for bound in bounds]
        parts = [one.astype(jnp.int32) if weights is None else jnp.where(one, weights, 0) for one in inside]
        # One reduction of several arrays is one pass over the logits.
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
