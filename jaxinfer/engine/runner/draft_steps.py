"""Steps of a draft model: fill its cache with tokens that are known, and draft the tokens that may follow.

The draft model reads and writes the blocks of the served model, in cache arrays of its own. Both steps take the block
tables from the host, so that they depend on no other step: those that run on the device may not have been sent them.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import functional
from jaxinfer.engine.runner.batch import unpack
from jaxinfer.engine.runner.device_state import abstract_draft_cache, replicated, shardings
from jaxinfer.engine.runner.shapes import Shapes
from jaxinfer.engine.runner.step_sampling import mask_padding
from jaxinfer.engine.sampling.sampler import sample
from jaxinfer.engine.sampling.sampling_rows import WIDTH, Level, unpack_rows
from jaxinfer.functional import DecodeBatch, PrefillBatch, Program
from jaxinfer.kernels.attention.paged import Cache
from jaxinfer.kernels.attention.xla_attention import TILE, decode_items


@dataclass(frozen=True)
class DraftFill:
    """Key of the program that computes keys and values of `tokens` known tokens in the draft model's cache."""

    takes, gives = ("draft_params", "draft_cache"), ("draft_cache",)
    tokens: int
    rows: int
    """Maximum number of sequences."""
    width: int
    """W: number of blocks in a block table."""
    tile: int = TILE
    """Number of queries in an attention tile."""

    def __str__(self) -> str:
        return f"draft model's prefill T={self.tokens}"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parts of the packed vector, in order."""
        return {
            **dict.fromkeys(("tokens", "positions", "rows", "rope_lengths"), (self.tokens,)),
            "tables": (self.rows, self.width),
            "tiles": (functional.tile_count(self.tokens, self.rows, self.tile), 4),
            "count": (),
            "last": (self.rows,),
        }


@dataclass(frozen=True)
class DraftSteps:
    """Key of the program that drafts up to `most` tokens of each row, one after another."""

    takes, gives = ("draft_params", "draft_cache"), ("draft_cache", "drafted")
    rows: int
    width: int
    """As in `DraftFill`."""
    most: int
    level: Level
    switched: bool = False
    """As in `batch.Bucket`."""
    items: int | None = None
    """Number of work items (pieces of cached keys) that attention has room for, if the kernel needs it."""

    def __str__(self) -> str:
        items = "" if self.items is None else f" items={self.items}"
        return f"draft model's decode rows={self.rows}{items}{'' if self.switched else f' {self.level.name.lower()}'}"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parts of the packed vector, in order."""
        columns = dict.fromkeys(("tokens", "positions", "counts"), (self.rows,))
        return {"sampling": (self.rows, WIDTH), **columns, "tables": (self.rows, self.width)}


def draft_fill(program: Program, key: DraftFill, params: list[jax.Array], cache: Cache, packed: jax.Array) -> Cache:
    """Return the draft model's cache with keys and values of known tokens."""
    batch = PrefillBatch(**unpack(key, packed), tile=key.tile)
    return functional.prefill_hidden(program.draft, params, cache, batch)[1]


def draft_steps(
    program: Program, key: DraftSteps, sampled_vocab: int, params: list[jax.Array], cache: Cache, packed: jax.Array
) -> tuple[Cache, jax.Array]:
    """Draft tokens by decode steps of the draft model, which samples with the noise of the model's own samples.

    So where both models find the same probabilities they sample the same token, at any temperature. A row stops after
    `counts` tokens: it has no blocks for more.

    Returns:
        The cache with keys and values of each row's last token and of its draft but for the last one, and the tokens
        `[most, B]`.
    """
    parts, draft = unpack(key, packed), program.draft
    rows, counts = unpack_rows(parts["sampling"]), parts["counts"]

    def step(number: jax.Array, carry: tuple[Cache, jax.Array, jax.Array]) -> tuple[Cache, jax.Array, jax.Array]:
        cache, last, made = carry
        positions = jnp.where(number < counts, parts["positions"] + number, -1)
        batch = DecodeBatch(last, positions, parts["tables"], key.items)
        hidden, cache = functional.decode_hidden(draft, params, cache, batch)
        logits = mask_padding(draft.module(params).logits(hidden), min(sampled_vocab, draft.vocab))
        own = rows._replace(position=positions + 1)
        tokens, _ = sample(logits, own, None, key.level, switched=key.switched)
        tokens = jnp.maximum(tokens, 0)  # logits may be no numbers: any token will do, as it is verified
        return cache, tokens, made.at[number].set(tokens)

    made = jnp.zeros((key.most, key.rows), jnp.int32)
    cache, _, made = jax.lax.fori_loop(0, counts.max(), step, (cache, parts["tokens"], made))
    return cache, made


def make_draft_step(
    program: Program, shapes: Shapes, key: DraftFill | DraftSteps, compiler_options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Return the jitted step of a draft model: (params, cache, packed) -> cache, or (cache, tokens)."""
    cache = shardings(abstract_draft_cache(program, shapes))
    if isinstance(key, DraftFill):
        body, made = partial(draft_fill, program, key), cache
    else:
        body, made = partial(draft_steps, program, key, shapes.sampled_vocab), (cache, replicated(program))
    options = None if compiler_options is None else dict(compiler_options)
    return jax.jit(body, donate_argnums=1, out_shardings=made, compiler_options=options)


def abstract_draft_arguments(program: Program, shapes: Shapes, key: DraftFill | DraftSteps) -> tuple[Any, ...]:
    """Return shapes and shardings of a draft step's arguments after the parameters."""
    size = sum(int(np.prod(shape)) for shape in key.shapes.values())
    return abstract_draft_cache(program, shapes), jax.ShapeDtypeStruct((size,), jnp.int32, sharding=replicated(program))


def fill_key(program: Program, shapes: Shapes, tokens: int) -> DraftFill:
    """Return the program that fills in this many tokens, at most `fill_sizes(shapes)[-1]`."""
    size = next(size for size in fill_sizes(shapes) if size >= tokens)
    return DraftFill(size, min(size, shapes.verify_buckets[-1]), shapes.width, program.draft.tile)


def fill_sizes(shapes: Shapes) -> tuple[int, ...]:
    """Return the numbers of tokens that are filled in at once."""
    return tuple(sorted({*shapes.verify_buckets, *shapes.prefill_buckets}))


def steps_key(program: Program, shapes: Shapes, rows: int, reads: int, level: Level) -> DraftSteps:
    """Return the program that drafts for this many rows; `reads` as in `buckets.decode_bucket`."""
    rows = next(size for size in shapes.decode_buckets if size >= rows)
    items = shapes.items_bucket(rows, reads) if program.draft.kernel == "xla" else None
    # Rows that need more than `TRUNCATED` get no draft.
    level = Level.TRUNCATED if shapes.switched else level
    return DraftSteps(rows, shapes.width, shapes.draft_tokens, level, shapes.switched, items)


def all_keys(program: Program, shapes: Shapes, sampling: Collection[str]) -> list[DraftFill | DraftSteps]:
    """Return every program that the drafts of requests with these sampling features can need."""
    found: list[DraftFill | DraftSteps] = [fill_key(program, shapes, size) for size in fill_sizes(shapes)]
    levels = [level for level in Level if level < Level.EDITED and level.name.lower() in (*sampling, "greedy")]
    for rows in _rows(shapes):
        most = decode_items(rows, shapes.width * shapes.block_size, shapes.block_size)
        reads = {min(rows << power, most) for power in range(most.bit_length())}
        found += [steps_key(program, shapes, rows, count, level) for count in sorted(reads) for level in levels]
    return list(dict.fromkeys(found))


def largest_keys(program: Program, shapes: Shapes) -> list[DraftFill | DraftSteps]:
    """Return the programs that take the most memory."""
    rows = _rows(shapes)[-1]
    reads = decode_items(rows, shapes.width * shapes.block_size, shapes.block_size)
    return [
        fill_key(program, shapes, fill_sizes(shapes)[-1]),
        steps_key(program, shapes, rows, reads, Level.TRUNCATED),
    ]


def _rows(shapes: Shapes) -> list[int]:
    """Return the numbers of rows that drafts are made for: each takes at least two tokens of a step that verifies."""
    most = min(max(1, shapes.verify_buckets[-1] // 2), shapes.rows)
    largest = next(size for size in shapes.decode_buckets if size >= most)
    return [size for size in shapes.decode_buckets if size <= largest]
