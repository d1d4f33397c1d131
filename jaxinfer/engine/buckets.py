"""Which compiled steps there are, and which of them serves a plan.

On a CPU one program a bucket has the whole sampler and skips at run time what no row asks for. On a GPU, whose host
would have to wait for each such condition, the sampler's variants are programs of their own; they are few, and each
step takes the first in `VARIANTS` that does all its rows ask for.
"""

from collections.abc import Collection, Iterator, Sequence
from itertools import product
from typing import NamedTuple

from jaxinfer.engine.batch import Bucket
from jaxinfer.engine.sampler import Level
from jaxinfer.engine.steps import Shapes
from jaxinfer.functional import Program
from jaxinfer.kernels.xla_attention import decode_items

SAMPLING = (*(level.name.lower() for level in Level), "logprobs", "prompt_logprobs")
"""What a warm-up can be told that requests will ask for."""
COPY_WIDTH = 16
"""Block copies of a step are padded to this many, or to as many as there are rows."""
TABLE_WIDTHS = (256, 4096)
"""Entries of block tables are sent in pieces padded to one of these."""


class Needs(NamedTuple):
    """What the rows of a step ask for, or a program can do."""

    level: Level = Level.GREEDY
    logprobs: bool = False
    prompt_logprobs: bool = False

    def serve(self, other: "Needs") -> bool:
        """Whether a program of these does what the other asks."""
        return all(mine >= theirs for mine, theirs in zip(self, other, strict=True))


VARIANTS = (
    *(Needs(level) for level in Level), Needs(Level.GREEDY, True), Needs(Level.EDITED, True),
    Needs(Level.EDITED, True, True),
)  # fmt: skip
"""The programs of a bucket where they are not switched at run time, the cheapest first."""


def prefill_bucket(program: Program, shapes: Shapes, tokens: int, needs: Needs) -> Bucket:
    """For chunks of this many tokens together."""
    return _bucket(
        shapes, "prefill", least(shapes.prefill_buckets, tokens), shapes.prefill_rows, needs, tile=program.tile,
        features=program.features is not None,
    )  # fmt: skip


def decode_bucket(program: Program, shapes: Shapes, rows: int, items: int, needs: Needs) -> Bucket:
    """For this many rows; `items`: pieces of keys they have, where attention is compiled for their number."""
    rows = least(shapes.decode_buckets, rows)
    room = shapes.items_bucket(rows, items) if program.kernel == "xla" else None
    return _bucket(shapes, "decode", rows, rows, needs, items=room, groups=program.layout.groups)


def _bucket(shapes: Shapes, kind: str, tokens: int, rows: int, needs: Needs, **own: int | bool | None) -> Bucket:
    if shapes.switched:
        can = Needs(Level.EDITED, True, kind == "prefill")
    else:
        can = next(variant for variant in VARIANTS if variant.serve(needs))
    counts = [shapes.max_logprobs if asked else -1 for asked in (can.logprobs, can.prompt_logprobs)]
    return Bucket(kind, tokens, rows, shapes.width, can.level, *counts, switched=shapes.switched, **own)


def all_buckets(program: Program, shapes: Shapes, sampling: Collection[str] = SAMPLING) -> list[Bucket]:
    """Every bucket that steps can need whose rows ask for nothing but `sampling`, the largest first."""
    # A chunk that does not end its prompt asks for nothing.
    levels = [level for level in Level if level is Level.GREEDY or level.name.lower() in sampling]
    beside = [(False, name in sampling) for name in ("logprobs", "prompt_logprobs")]
    mixtures = {Needs(*choice) for choice in product(levels, *beside)}
    found = {
        prefill_bucket(program, shapes, tokens, needs) for tokens in shapes.prefill_buckets for needs in mixtures
    } | {
        decode_bucket(program, shapes, rows, items, needs._replace(prompt_logprobs=False))
        for rows in shapes.decode_buckets for items in _items(shapes, rows) for needs in mixtures
    }  # fmt: skip
    return sorted(found, key=lambda b: (b.tokens, b.items or 0, b.level, b.logprobs), reverse=True)


def _items(shapes: Shapes, rows: int) -> Iterator[int]:
    """Numbers of pieces that reach each of a row bucket's sizes."""
    most, items = decode_items(rows, shapes.width * shapes.block_size, shapes.block_size), rows
    while items < most:
        yield items
        items *= 2
    yield most


def copy_widths(shapes: Shapes) -> tuple[int, ...]:
    """What a step's block copies are padded to: a row copies one at most in each group."""
    most = shapes.rows * shapes.groups
    return (*(width for width in (COPY_WIDTH, COPY_WIDTH**2) if width < most), most)


def encode_pieces(shapes: Shapes, count: int) -> Iterator[int]:
    """The encoder steps, by their buckets, that so many inputs are encoded in: none is padded but the last."""
    while count > 0:
        size = max((size for size in shapes.encode_buckets if size <= count), default=shapes.encode_buckets[0])
        yield size
        count -= size


def least(sizes: Sequence[int], needed: int) -> int:
    """The first of ascending sizes that has room."""
    return next(size for size in sizes if size >= needed)
