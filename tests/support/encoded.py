"""Compute logits of models with cross-attention through `jaxinfer.functional`, several prompts per batch."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import functional
from jaxinfer.functional import DecodeBatch, PrefillBatch, Program
from jaxinfer.functional.encoder_batch import EncodeBatch, EncodeJob, encode_batch
from jaxinfer.kernels.attention.paged import KVCache, PrefillTiles
from jaxinfer.kv import groups as kv_groups
from jaxinfer.layers.encoder import EncodeStep
from jaxinfer.media import CrossInputs, EncoderInput
from support import loaded

BLOCK, WIDTH, PROMPTS, TOKENS = 4, 64, 4, 64
"""Positions per block, blocks per block table, prompts per batch, tokens per prefill."""


class PromptCase(NamedTuple):
    """A prompt, its encoder input, and the tokens decoded after it."""

    ids: Sequence[int]
    cross: CrossInputs | None
    following: Sequence[int] = ()


_encode = jax.jit(functional.encode_cross, static_argnums=0)
_decode = jax.jit(functional.decode, static_argnums=0)


@partial(jax.jit, static_argnums=0)
def _prefill(
    program: Program, params: list[jax.Array], cache: list[KVCache], batch: PrefillBatch
) -> tuple[jax.Array, list[KVCache]]:
    hidden, cache = functional.prefill_hidden(program, params, cache, batch)
    return program.module(params).logits(hidden), cache


def _seen(case: PromptCase, start: int, count: int) -> np.ndarray:
    return np.zeros((count, 2), np.int32) if case.cross is None else case.cross.seen(start, count)


@partial(jax.jit, static_argnums=0)
def _rows(program: Program, params: list[jax.Array], batch: EncodeBatch) -> jax.Array:
    tables = jnp.arange(batch.positions.shape[0], dtype=jnp.int32)[None]
    step = EncodeStep(
        batch.positions,
        PrefillTiles(tables, batch.tiles, batch.count, batch.spans),
        (),
        program.mesh,
        program.kernel,
        batch.tile,
    )
    return program.module(params).encoder(batch.inputs, step)


def encoder_rows(folder: Path, one: EncoderInput, **how: Any) -> np.ndarray:
    """Return the output of the module's `encoder` for all values of an input, `[S, M]`."""
    program, params = loaded.load(folder, **how)
    job = EncodeJob(one, np.zeros((1, one.length // BLOCK + 1), np.int32), 0)
    return np.asarray(_rows(program, params, encode_batch(program.cross, [job], BLOCK, 1)))


def logits(folder: Path, prompts: Sequence[PromptCase], **how: Any) -> list[np.ndarray]:
    """Return, per prompt, logits `[T, V]` at all its positions, then of its following tokens, decoded one by one."""
    program, params = loaded.load(folder, **how)
    kinds = program.layout.kinds
    groups = program.layout.groups
    # Interleave the prompts' blocks, and place no block at its own number, so that code ignoring block tables fails.
    tables = np.arange(groups * PROMPTS * WIDTH, dtype=np.int32)[::-1].reshape(WIDTH, groups, PROMPTS)
    tables = tables.transpose(1, 2, 0).copy()
    cache = functional.init_cache(program, tables.size, BLOCK)
    own = kv_groups.encoded(kinds).span
    for row, case in enumerate(prompts):
        first = 0
        for one in () if case.cross is None else case.cross.inputs:
            job = EncodeJob(one, tables[own, row], first)
            cache = _encode(program, params, cache, encode_batch(program.cross, [job], BLOCK, tables.size))
            first += one.length
    chunks = [(np.array(case.ids, np.int32), 0, len(case.ids)) for case in prompts]
    seen = np.concatenate([_seen(case, 0, len(case.ids)) for case in prompts])
    batch = functional.prefill_batch(
        chunks, tables[:, : len(prompts)], tokens=TOKENS, rows=2 * PROMPTS, seen=seen, tile=program.tile
    )
    flat, cache = _prefill(program, params, cache, batch)
    ends = np.cumsum([len(case.ids) for case in prompts])
    found = [[part] for part in np.split(np.asarray(flat[: ends[-1]]), ends[:-1])]
    for step in range(max(len(case.following) for case in prompts)):
        tokens, positions = np.zeros(PROMPTS, np.int32), np.full(PROMPTS, -1, np.int32)
        sees = np.zeros((PROMPTS, 2), np.int32)
        for row, case in enumerate(prompts):
            if step < len(case.following):
                tokens[row], positions[row] = case.following[step], len(case.ids) + step
                sees[row] = _seen(case, len(case.ids) + step, 1)[0]
        rows, cache = _decode(program, params, cache, DecodeBatch(tokens, positions, tables, seen=sees))
        for row, case in enumerate(prompts):
            if step < len(case.following):
                found[row].append(np.asarray(rows[row : row + 1]))
    return [np.concatenate(parts) for parts in found]
