"""Choice of the compiled step for a plan.

On a CPU one program per bucket contains the whole sampler and skips at run time what no row needs. On a GPU, whose host
would have to wait for each such condition, samplers are programs of their own (`runner.logits`), one for each of a few
variants; a step uses the first of `variants` that supports everything its rows need.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from jaxinfer.engine.runner.batch import VERIFY, Bucket
from jaxinfer.engine.runner.keys import Encode, EncodeJoint
from jaxinfer.engine.runner.mixed import Mixed
from jaxinfer.engine.runner.shapes import Shapes
from jaxinfer.engine.sampling.sampling_rows import Level
from jaxinfer.functional import Program
from jaxinfer.functional.deterministic import StepShape
from jaxinfer.functional.encoder_batch import EncodeJob, EncodeShape
from jaxinfer.kernels.attention import choose as attention
from jaxinfer.kernels.attention.xla_attention import decode_items, item_keys
from jaxinfer.kv import groups as kv_groups

SAMPLING = (*(level.name.lower() for level in Level), "logprobs", "prompt_logprobs")
"""Names of sampling features that a warm-up can be restricted to."""
STRUCTURED, BEAMS = "structured", "beams"
"""Names of further features for a warm-up, not among the default ones as each adds as many programs again."""
HEAD_ROWS, SAMPLED_ROWS = 32, 8
"""Deterministic steps on a CPU: number of tokens whose logits are computed at a time, and number of these that are
sampled at a time, as the time of the sampler grows with its rows. The first is a multiple of the second."""
COPY_WIDTH = 16
"""Block copies of a step are padded to this many (or to one of the larger sizes of `copy_widths`)."""
LEAST_CANDIDATES = 16
"""Minimum number of continuations per row in steps with beams: enough for 8 beams and one token that ends them."""
TABLE_WIDTHS = (256, 4096)
"""Block table updates are sent in pieces padded to one of these sizes."""


class Needs(NamedTuple):
    """Sampler features that the rows of a step need, or that a program supports."""

    level: Level = Level.GREEDY
    logprobs: int = -1
    """Maximum number of log-probabilities requested beside the token's own; -1 if no row requests any."""
    prompt_logprobs: bool = False
    candidates: int = 0
    """Number of continuations that beam searches consider: an integer of the bucket, not a choice of variant."""

    def covers(self, other: "Needs") -> bool:
        """Return whether a program with these features supports everything `other` needs."""
        return all(own >= needed for own, needed in zip(self[:3], other[:3], strict=True))


def logprob_counts(most: int) -> tuple[int, ...]:
    """Return the numbers of log-probabilities that programs are compiled for, up to `most` per position.

    Training needs only those of the chosen tokens, at the cost of a maximum; a request for more gets the maximum
    number. An intermediate count would add three samplers for each number of rows and save one kernel.
    """
    return tuple(sorted({min(1, most), most}))


def variants(most: int) -> list[Needs]:
    """Return the sampler variants of a bucket on a GPU, the cheapest first.

    Levels below EDITED have variants with log-probabilities, as the next level costs more than they do. EDITED always
    has them: they add 15 kernels to 90, and each of its variants takes as long to compile as a small model's layers.

    Args:
        most: maximum number of log-probabilities a request may ask for.
    """
    below = [level for level in Level if level < Level.EDITED]
    return [Needs(*each) for each in product(below, (-1, *logprob_counts(most)))] + [Needs(Level.EDITED, most)]


def prefill_bucket(
    program: Program, shapes: Shapes, tokens: int, needs: Needs, capture: Sequence[str] = (), **steering: Any
) -> Bucket:
    """Return the prefill bucket for this many tokens in total.

    `capture` beside what all steps return; `steering`: fields of `runner.steered`.
    """
    return _bucket(
        shapes,
        "prefill",
        least(shapes.prefill_buckets, tokens),
        shapes.prefill_rows,
        needs,
        tile=program.tile,
        features=program.features is not None,
        rope_axes=rope_axes(program),
        cross=program.cross is not None,
        states=bool(program.layout.states),
        adapters=program.adapters,
        capture=tuple(dict.fromkeys((*shapes.capture, *capture))),
        **steering,
    )


def rope_axes(program: Program) -> int:
    """Return the number of positions that rope rotates a token by; 0 if that is its position in the sequence."""
    return 0 if program.features is None else program.features.rope_axes


def verify_bucket(program: Program, shapes: Shapes, tokens: int, needs: Needs, **steering: Any) -> Bucket:
    """Return the bucket of the step that verifies drafts with this many tokens; `steering` as in `prefill_bucket`."""
    size = least(shapes.verify_buckets, tokens)
    own = {"tile": program.tile, "adapters": program.adapters, "capture": shapes.capture, **steering}
    return _bucket(shapes, VERIFY, size, size, needs, rope_axes=rope_axes(program), **own)


def read_size(shapes: Shapes, positions: np.ndarray, seen: np.ndarray) -> int:
    """Return how much of the cache a decode step of tokens at `positions` `[B]` reads.

    That is the number of work items, or for a contiguous cache the number of blocks of the longest row. `seen` `[B, 2]`
    is the first and the end of the encoder positions visible to each token.
    """
    block, (first, end) = shapes.block_size, seen.T
    if shapes.contiguous:
        return max(int(positions.max()) // block + 1, -(-int(end.max()) // block))
    size = item_keys(block)
    return max(int((positions // size + 1).sum()), int((-(-(end - first // block * block) // size)).sum()))


def decode_bucket(program: Program, shapes: Shapes, rows: int, reads: int, needs: Needs, **steering: Any) -> Bucket:
    """Return the decode bucket of this many rows; `steering` as in `prefill_bucket`.

    `reads` is their `read_size`; it matters only if the attention kernel is compiled for it.
    """
    rows, own, xla = least(shapes.decode_buckets, rows), steering, program.kernel == "xla"
    if xla and shapes.contiguous:
        own["width"] = least([*_widths(shapes)], reads)
    elif xla:
        own["items"] = shapes.items_bucket(rows, reads)
    return _bucket(
        shapes,
        "decode",
        rows,
        rows,
        needs,
        groups=_grown(program),
        cross=program.cross is not None,
        states=bool(program.layout.states),
        adapters=program.adapters,
        rope_axes=rope_axes(program),
        **own,
    )


def joint_bucket(
    program: Program, shapes: Shapes, tokens: int, decodes: int, samples: int, needs: Needs
) -> Bucket | None:
    """Return the bucket of the joint step of `tokens` tokens of chunks, `samples` after these, and `decodes`.

    None if there is none with room for them, or if the chunks alone need a smaller bucket: decodes take the places of
    padding, and cost no product more.
    """
    size = least(shapes.prefill_buckets, tokens)
    fitting = (most for total, most in shapes.joint_buckets if total == size and decodes + samples <= most)
    rows = next(fitting, 0)
    if not rows or tokens + decodes > size:
        return None
    bucket = prefill_bucket(program, shapes, tokens, needs)
    return replace(bucket, decodes=rows, groups=_grown(program), prompt_logprobs=-1)


def mixed_bucket(program: Program, shapes: Shapes) -> Mixed:
    """Return the one step of a deterministic engine."""
    return Mixed(
        tokens=shapes.prefill_buckets[-1],
        rows=shapes.rows,
        chunks=shapes.prefill_rows,
        width=shapes.width,
        logprobs=shapes.max_logprobs,
        head_rows=HEAD_ROWS if shapes.switched else shapes.rows,
        sampled_rows=SAMPLED_ROWS if shapes.switched else shapes.rows,
        tile=program.tile,
        groups=_grown(program),
        switched=shapes.switched,
        features=program.features is not None,
        rope_axes=rope_axes(program),
        cross=program.cross is not None,
        states=bool(program.layout.states),
        adapters=program.adapters,
        contiguous=shapes.contiguous,
        logprobs_mode=shapes.logprobs_mode,
        capture=shapes.capture,
    )


def step_shape(program: Program, shapes: Shapes, matmul_kernel: str) -> StepShape:
    """Return the step shape with which a trainer computes the bits of the engine (`functional.deterministic`)."""
    bucket = mixed_bucket(program, shapes)
    return StepShape(
        attention_kernel=program.kernel,
        matmul_kernel=matmul_kernel,
        tokens=bucket.tokens,
        rows=bucket.rows,
        runs=bucket.rows + bucket.chunks,
        segments=bucket.segments,
        head_rows=bucket.head_rows,
        sampled_rows=bucket.sampled_rows,
        width=bucket.width,
        block_size=shapes.block_size,
        kv_cache_dtype=program.kv_cache_dtype,
    )


def _bucket(shapes: Shapes, kind: str, tokens: int, rows: int, needs: Needs, **own: Any) -> Bucket:
    if shapes.switched:
        can = Needs(Level.EDITED, shapes.max_logprobs, kind == "prefill")
    else:
        sampled = needs._replace(prompt_logprobs=False)
        can = next(variant for variant in variants(shapes.max_logprobs) if variant.covers(sampled))
        can = can._replace(prompt_logprobs=needs.prompt_logprobs)
    prompt = shapes.max_logprobs if can.prompt_logprobs else -1
    own = {"width": shapes.width, "switched": shapes.switched, "contiguous": shapes.contiguous} | own
    own = {"logprobs_mode": shapes.logprobs_mode, "capture": shapes.capture} | own
    if needs.candidates:  # a power of two, so that searches of similar widths share a program
        own["candidates"] = min(max(LEAST_CANDIDATES, 1 << (needs.candidates - 1).bit_length()), shapes.sampled_vocab)
    return Bucket(kind, tokens, rows, **own, level=can.level, logprobs=can.logprobs, prompt_logprobs=prompt)


def _grown(program: Program) -> int:
    """Return the number of groups of layers with a block table that grows with the sequence."""
    return kv_groups.count(kv_groups.own(program.layout.kinds))


def covers(bucket: Bucket, other: Bucket) -> bool:
    """Return whether a decode step can do all that another one does, perhaps with more padding or an idle sampler."""
    if bucket.kind != "decode" or bucket.pending or (bucket.level >= Level.EDITED > other.level):
        return False  # the arrays that edit logits are made when the first request needs them
    sizes = ("tokens", "rows", "width", "level", "logprobs", "items")
    if any((getattr(bucket, name) or 0) < (getattr(other, name) or 0) for name in sizes):
        return False
    return replace(bucket, **{name: getattr(other, name) for name in sizes}) == other


def all_buckets(program: Program, shapes: Shapes, sampling: Collection[str] = SAMPLING) -> list[Bucket]:
    """Return every bucket that steps can need whose rows use no sampling feature outside `sampling`, largest first."""
    # A chunk that does not complete its prompt needs no sampling feature.
    levels = [level for level in Level if level is Level.GREEDY or level.name.lower() in sampling]
    counts = logprob_counts(shapes.max_logprobs) if "logprobs" in sampling else ()
    beside = (-1, *counts), (False, "prompt_logprobs" in sampling)
    mixtures = {Needs(*choice) for choice in product(levels, *beside)}
    searches = {Needs(level, candidates=LEAST_CANDIDATES) for level in levels if level in (Level.GREEDY, Level.EDITED)}
    alone = mixtures | searches if BEAMS in sampling else mixtures  # beams are in no joint step, and have no drafts
    found = {prefill_bucket(program, shapes, tokens, needs) for tokens in shapes.prefill_buckets for needs in alone} | {
        decode_bucket(program, shapes, rows, reads, needs._replace(prompt_logprobs=False))
        for rows in shapes.decode_buckets
        for reads in _read_sizes(shapes, rows)
        for needs in alone
    }
    found |= {
        verify_bucket(program, shapes, tokens, needs._replace(prompt_logprobs=False))
        for tokens in shapes.verify_buckets
        for needs in mixtures
    }
    found |= {
        joint_bucket(program, shapes, tokens, 0, rows, needs._replace(prompt_logprobs=False))
        for tokens, rows in shapes.joint_buckets
        for needs in mixtures
    }
    return sorted(found, key=lambda b: (b.tokens, b.items or 0, b.width, b.level, b.logprobs), reverse=True)


def largest_buckets(program: Program, shapes: Shapes) -> list[Bucket]:
    """Return the largest prefill, decode and joint step that do all that rows may ask for but beam searches."""
    needs, rows = Needs(max(Level), shapes.max_logprobs, True), shapes.decode_buckets[-1]
    *_, reads = _read_sizes(shapes, rows)
    tokens, sampling = shapes.prefill_buckets[-1], needs._replace(prompt_logprobs=False)
    joint = [joint_bucket(program, shapes, size, 0, most, sampling) for size, most in shapes.joint_buckets[-1:]]
    return [
        prefill_bucket(program, shapes, tokens, needs),
        decode_bucket(program, shapes, rows, reads, sampling),
        *(bucket for bucket in joint if bucket is not None),
    ]


def _widths(shapes: Shapes) -> Iterator[int]:
    """Return the read lengths, in blocks, that decode is compiled for with a contiguous cache."""
    return shapes.regions.widths(item_keys(shapes.block_size) // shapes.block_size)


def _read_sizes(shapes: Shapes, rows: int) -> Iterator[int]:
    """Return a value of `read_size` for each decode bucket of `rows` rows."""
    if shapes.contiguous:
        yield from _widths(shapes)
        return
    most, items = decode_items(rows, shapes.width * shapes.block_size, shapes.block_size), rows
    while items < most:
        yield items
        items *= 2
    yield most


def copy_widths(shapes: Shapes) -> tuple[int, ...]:
    """Return the sizes that a step's block copies are padded to.

    A row copies at most one block per group of layers; with a contiguous cache it may copy all of its blocks.
    """
    if shapes.contiguous:
        return COPY_WIDTH, COPY_WIDTH**2
    most = shapes.rows * shapes.groups
    return (*(width for width in (COPY_WIDTH, COPY_WIDTH**2) if width < most), most)


def encode_pieces(shapes: Shapes, count: int) -> Iterator[int]:
    """Yield the encoder buckets that `count` inputs are encoded in; only the last is padded."""
    while count > 0:
        size = max((size for size in shapes.encode_buckets if size <= count), default=shapes.encode_buckets[0])
        yield size
        count -= size


def encode_key(program: Program, shapes: Shapes, count: int) -> Encode | EncodeJoint:
    """Return the key of the smallest program that encodes `count` inputs, or their values, into the feature pool."""
    joint, count = program.features.joint, least(shapes.encode_buckets, count)
    if joint is None:
        return Encode(count)
    tile = attention.prefill_tile(program.kernel, 1, joint.head_dim, program.dtype.itemsize)
    return EncodeJoint(count, joint.positions, 0, min(count, shapes.prefill_rows), tile)


def encode_shape(program: Program, shapes: Shapes, units: int) -> EncodeShape:
    """Return the shape of the smallest step that encodes `units` values for cross-attention."""
    source, units = program.cross, least(shapes.cross_buckets, units)
    groups = kv_groups.encoded(program.layout.kinds).count
    inputs = min(units, shapes.prefill_rows) if source.joint else units
    return EncodeShape(units, source.rows, groups, inputs, program.tile)


def encode_steps(jobs: Sequence[EncodeJob], shape: EncodeShape) -> Iterator[list[EncodeJob]]:
    """Yield batches of jobs in order, each as many as the largest shape has room for."""
    step: list[EncodeJob] = []
    for job in jobs:
        units = sum(other.input.count for other in step) + job.input.count
        if step and (units > shape.units or len(step) == shape.inputs):
            yield step
            step = []
        step.append(job)
    if step:
        yield step


def least(sizes: Sequence[int], needed: int) -> int:
    """Return the first of ascending sizes that is at least `needed`."""
    return next(size for size in sizes if size >= needed)
