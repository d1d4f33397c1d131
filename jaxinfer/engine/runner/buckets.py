"""Which compiled steps there are, and which of them serves a plan.

On a CPU one program a bucket has the whole sampler and skips at run time what no row asks for. On a GPU, whose host
would have to wait for each such condition, the sampler's variants are programs of their own; they are few, and each
step takes the first of `variants` that does all its rows ask for.
"""

from collections.abc import Collection, Iterator, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from jaxinfer.engine.runner.batch import Bucket
from jaxinfer.engine.runner.steps import Shapes
from jaxinfer.engine.sampling.sampling_rows import Level
from jaxinfer.functional import Program
from jaxinfer.functional.encoder_batch import EncodeJob, EncodeShape
from jaxinfer.kernels.attention.xla_attention import decode_items, item_keys
from jaxinfer.kv import groups as kv_groups

SAMPLING = (*(level.name.lower() for level in Level), "logprobs", "prompt_logprobs")
"""What a warm-up can be told that requests will ask for."""
COPY_WIDTH = 16
"""Block copies of a step are padded to this many, or to as many as there are rows."""
LEAST_CANDIDATES = 16
"""Continuations of a row that a step finds at least, where it finds any."""
TABLE_WIDTHS = (256, 4096)
"""Entries of block tables are sent in pieces padded to one of these."""


class Needs(NamedTuple):
    """What the rows of a step ask for, or a program can do."""

    level: Level = Level.GREEDY
    logprobs: int = -1
    """The most log-probabilities that a row asks for beside its token's; -1: no row asks for any."""
    prompt_logprobs: bool = False
    candidates: int = 0
    """Continuations that beam searches look at: not a matter of variants, but a number of the bucket."""

    def serve(self, other: "Needs") -> bool:
        """Whether a program of these does what the other asks."""
        return all(mine >= theirs for mine, theirs in zip(self[:3], other[:3], strict=True))


def logprob_counts(most: int) -> tuple[int, ...]:
    """Return how many log-probabilities a position programs are compiled for, where requests may ask for `most`.

    Training asks for those of the chosen tokens alone, at the cost of a maximum; whoever asks for more gets as many as
    there may be. A count between the two would be four more programs of each bucket, for a kernel less.
    """
    return tuple(sorted({min(1, most), most}))


def variants(most: int) -> list[Needs]:
    """Return what the programs of a bucket can do where they are not switched at run time, the cheapest first.

    `most`: log-probabilities that a request may ask for. Every level has programs with them, as a level above the one
        that is
    asked for costs more than they do; those of prompts, which are asked for rarely, are one program.
    """
    return [Needs(*each) for each in product(Level, (-1, *logprob_counts(most)))] + [Needs(Level.EDITED, most, True)]


def prefill_bucket(program: Program, shapes: Shapes, tokens: int, needs: Needs) -> Bucket:
    """For chunks of this many tokens together."""
    return _bucket(
        shapes,
        "prefill",
        least(shapes.prefill_buckets, tokens),
        shapes.prefill_rows,
        needs,
        tile=program.tile,
        features=program.features is not None,
        cross=program.cross is not None,
        states=bool(program.layout.states),
    )


def reach(shapes: Shapes, positions: np.ndarray, seen: np.ndarray) -> int:
    """What a decode step of tokens at `positions` `[B]` reads: pieces of keys, or of a contiguous cache blocks of the
    longest row. `seen` `[B, 2]`: the first and the end of the encoder positions that they see.
    """
    block, (first, end) = shapes.block_size, seen.T
    if shapes.contiguous:
        return max(int(positions.max()) // block + 1, -(-int(end.max()) // block))
    size = item_keys(block)
    return max(int((positions // size + 1).sum()), int((-(-(end - first // block * block) // size)).sum()))


def decode_bucket(program: Program, shapes: Shapes, rows: int, reach: int, needs: Needs) -> Bucket:
    """For this many rows; `reach`: what they read, where attention is compiled for as much."""
    rows, own, xla = least(shapes.decode_buckets, rows), {}, program.kernel == "xla"
    if xla and shapes.contiguous:
        own["width"] = least([*_widths(shapes)], reach)
    elif xla:
        own["items"] = shapes.items_bucket(rows, reach)
    groups = kv_groups.count(kv_groups.own(program.layout.kinds))
    return _bucket(
        shapes,
        "decode",
        rows,
        rows,
        needs,
        groups=groups,
        cross=program.cross is not None,
        states=bool(program.layout.states),
        **own,
    )


def _bucket(shapes: Shapes, kind: str, tokens: int, rows: int, needs: Needs, **own: int | bool | None) -> Bucket:
    if shapes.switched:
        can = Needs(Level.EDITED, shapes.max_logprobs, kind == "prefill")
    else:
        can = next(variant for variant in variants(shapes.max_logprobs) if variant.serve(needs))
    prompt = shapes.max_logprobs if can.prompt_logprobs else -1
    own = {"width": shapes.width, "switched": shapes.switched, "contiguous": shapes.contiguous} | own
    if needs.candidates:  # a power of two, so that searches of several widths share a program
        own["candidates"] = min(max(LEAST_CANDIDATES, 1 << (needs.candidates - 1).bit_length()), shapes.sampled_vocab)
    return Bucket(kind, tokens, rows, **own, level=can.level, logprobs=can.logprobs, prompt_logprobs=prompt)


def all_buckets(program: Program, shapes: Shapes, sampling: Collection[str] = SAMPLING) -> list[Bucket]:
    """Every bucket that steps can need whose rows ask for nothing but `sampling`, the largest first."""
    # A chunk that does not end its prompt asks for nothing.
    levels = [level for level in Level if level is Level.GREEDY or level.name.lower() in sampling]
    counts = logprob_counts(shapes.max_logprobs) if "logprobs" in sampling else ()
    beside = (-1, *counts), (False, "prompt_logprobs" in sampling)
    mixtures = {Needs(*choice) for choice in product(levels, *beside)}
    found = {
        prefill_bucket(program, shapes, tokens, needs) for tokens in shapes.prefill_buckets for needs in mixtures
    } | {
        decode_bucket(program, shapes, rows, reach, needs._replace(prompt_logprobs=False))
        for rows in shapes.decode_buckets
        for reach in _reaches(shapes, rows)
        for needs in mixtures
    }
    return sorted(found, key=lambda b: (b.tokens, b.items or 0, b.width, b.level, b.logprobs), reverse=True)


def _widths(shapes: Shapes) -> Iterator[int]:
    """Of a contiguous cache, the read lengths that decode is compiled for, in blocks."""
    return shapes.regions.widths(item_keys(shapes.block_size) // shapes.block_size)


def _reaches(shapes: Shapes, rows: int) -> Iterator[int]:
    """What reaches each of a row bucket's sizes."""
    if shapes.contiguous:
        yield from _widths(shapes)
        return
    most, items = decode_items(rows, shapes.width * shapes.block_size, shapes.block_size), rows
    while items < most:
        yield items
        items *= 2
    yield most


def copy_widths(shapes: Shapes) -> tuple[int, ...]:
    """What a step's block copies are padded to: a row copies one at most in each group, of a contiguous cache all it
    has."""
    if shapes.contiguous:
        return COPY_WIDTH, COPY_WIDTH**2
    most = shapes.rows * shapes.groups
    return (*(width for width in (COPY_WIDTH, COPY_WIDTH**2) if width < most), most)


def encode_pieces(shapes: Shapes, count: int) -> Iterator[int]:
    """The encoder steps, by their buckets, that so many inputs are encoded in: none is padded but the last."""
    while count > 0:
        size = max((size for size in shapes.encode_buckets if size <= count), default=shapes.encode_buckets[0])
        yield size
        count -= size


def encode_shape(program: Program, shapes: Shapes, units: int) -> EncodeShape:
    """Of a step that encodes so many values for cross-attention; a bucket, or the least that has room."""
    source, units = program.cross, least(shapes.cross_buckets, units)
    groups = kv_groups.encoded(program.layout.kinds).count
    inputs = min(units, shapes.prefill_rows) if source.joint else units
    return EncodeShape(units, source.rows, groups, inputs, program.tile)


def encode_steps(jobs: Sequence[EncodeJob], shape: EncodeShape) -> Iterator[list[EncodeJob]]:
    """Jobs in their order, as many a step as the largest shape has room for."""
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
    """The first of ascending sizes that has room."""
    return next(size for size in sizes if size >= needed)
