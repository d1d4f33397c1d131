"""Load a checkpoint folder with the real loader and compute logits, greedy tokens and steps of it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxinfer import functional
from jaxinfer.checkpoint import naming
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.functional import DecodeBatch, PrefillBatch, Program
from jaxinfer.kernels.attention.paged import Cache
from jaxinfer.kernels.state.slots import DecodeSlots, Segments
from jaxinfer.loading import weights
from jaxinfer.loading.update import WeightTable
from jaxinfer.media.rope_positions import RopePositions
from jaxinfer.models.base import FeatureRows
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.sharding import make_mesh
from support.tiny import BLOCK, LENGTH, VOCAB, make_engine, make_request, run, shapes_of

PROMPT_TOKENS = 64
"""Tokens, T, of the program that computes logits at every position of up to `PROMPTS` prompts."""
PROMPTS = 4


@cache
def load(
    folder: Path, dtype: str = "float32", tp: int = 1, quantization: str | None = None
) -> tuple[Program, list[jax.Array]]:
    """Load a checkpoint with the real loader, split for `jaxinfer.functional`."""
    mesh = make_mesh(tp)
    return functional.split(weights.load(folder, mesh, dtype=dtype, quantization=quantization, progress=False), mesh)


def assert_same_by_name(folder: Path, tensors: Mapping[str, Any]) -> None:
    """Check that tensors by name become the parameters that the loader makes of their checkpoint, and come back."""
    program, params = load(folder)
    table = WeightTable(program, params)
    found: list[Any] = [None] * len(params)
    table.apply(table.prepare(tensors), found)
    for new, param in zip(found, params, strict=True):
        assert (new.dtype, new.sharding) == (param.dtype, param.sharding)
        np.testing.assert_array_equal(new, param)
    given = {naming.WRAPPERS.sub("", name): np.asarray(tensor) for name, tensor in tensors.items()}
    back, [_, named] = dict(table.tensors(params)), table._family()
    also = {rule.source: (rule.source, *rule.also) for rule in named}
    for name, tensor in back.items():
        [own] = given.keys() & set(also[name])
        np.testing.assert_array_equal(tensor, given[own], name)
    assert {id(tensor) for tensor in back.values()} & {id(param) for param in params}, "no copies of whole parameters"


@cache
def checkpoint_runner(folder: Path) -> Runner:
    """Return the runner of a checkpoint, in the shapes of all tiny models."""
    program, params = load(folder)
    return Runner(program, params, shapes_of(program))


def greedy(folder: Path, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Return greedy tokens of all prompts, run in one engine with mixed prefill chunks and decode steps."""
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    runner = checkpoint_runner(folder)
    config = runner.program.module(runner.params).config
    rope = {"length_key": config.length_key, "recompute_after": config.recompute_after}
    requests = [make_request(str(i), prompt, params, **rope) for i, prompt in enumerate(prompts)]
    return [samples[0] for samples in run(make_engine(runner), requests)]


@partial(jax.jit, static_argnums=0)
def _prompt_logits(
    program: Program, params: list[jax.Array], cache: Cache, batch: PrefillBatch, features: FeatureRows | None
) -> tuple[jax.Array, Cache]:
    hidden, cache = functional.prefill_hidden(program, params, cache, batch, features)
    return program.module(params).logits(hidden), cache


def _beginnings(lengths: Sequence[int]) -> Segments:
    """Return segments of packed prompts whose states take the slots in order."""
    counts = np.array([*lengths, *[0] * (PROMPTS - len(lengths))])
    nowhere, none = np.full(PROMPTS, PROMPTS), np.zeros(PROMPTS, bool)
    return Segments(np.cumsum(counts) - counts, counts, nowhere, np.arange(PROMPTS), none)


def prefill_inputs(program: Program, prompts: Sequence[Sequence[int]]) -> tuple[Cache, PrefillBatch]:
    """Return an empty cache and the prefill of whole prompts packed in one batch, in the shapes of all tiny models."""
    width, groups = LENGTH // BLOCK, program.layout.groups
    # Interleave the prompts' blocks, and place no block at its own number, so that code ignoring block tables fails.
    tables = np.arange(groups * PROMPTS * width, dtype=np.int32)[::-1].reshape(width, groups, PROMPTS)
    tables = tables.transpose(1, 2, 0).copy()
    cache = functional.init_cache(program, tables.size, BLOCK, slots=PROMPTS)
    chunks = [(np.array(prompt, np.int32), 0, len(prompt)) for prompt in prompts]
    batch = functional.prefill_batch(chunks, tables[:, : len(prompts)], tokens=PROMPT_TOKENS, rows=PROMPTS)
    if program.layout.states:
        batch = replace(batch, states=_beginnings([len(prompt) for prompt in prompts]))
    return cache, batch


_decode = jax.jit(functional.decode, static_argnums=0)


def logits(
    folder: Path,
    prompts: Sequence[Sequence[int]],
    following: Sequence[Sequence[int]],
    dtype: str = "float32",
    features: FeatureRows | None = None,
    ropes: Sequence[RopePositions] | None = None,
    **how: Any,
) -> list[np.ndarray]:
    """Return, per prompt, logits `[T, V]` at all its positions, then of its following tokens, decoded one by one.

    All prompts share one prefill and the same decode steps. `features` are those of the `PROMPT_TOKENS` tokens of the
    prefill, `ropes` each prompt's positions with M-RoPE.
    """
    program, params = load(folder, dtype, **how)
    cache, batch = prefill_inputs(program, prompts)
    if ropes is not None:
        known = np.concatenate([rope.at(0, len(prompt)) for rope, prompt in zip(ropes, prompts, strict=True)])
        batch = replace(batch, rope_positions=np.pad(known, ((0, PROMPT_TOKENS - len(known)), (0, 0))))
    tables = batch.tables
    recurrent = bool(program.layout.states)
    flat, cache = _prompt_logits(program, params, cache, batch, features)
    ends = np.cumsum([len(prompt) for prompt in prompts])
    found = [[part] for part in np.split(np.asarray(flat[: ends[-1]]), ends[:-1])]
    for step in range(max(map(len, following))):
        tokens, positions = np.zeros(PROMPTS, np.int32), np.full(PROMPTS, -1, np.int32)
        for row, (prompt, after) in enumerate(zip(prompts, following, strict=True)):
            if step < len(after):
                tokens[row], positions[row] = after[step], len(prompt) + step
        slots = np.where(positions >= 0, np.arange(PROMPTS), PROMPTS)
        states = DecodeSlots(slots, slots) if recurrent else None
        decoded = DecodeBatch(tokens, positions, tables, states=states)
        if ropes is not None:
            decoded = replace(decoded, rope_positions=positions + np.array([rope.shift for rope in ropes], np.int32))
        rows, cache = _decode(program, params, cache, decoded)
        for row, after in enumerate(following):
            if step < len(after):
                found[row].append(np.asarray(rows[row : row + 1]))
    return [np.concatenate(parts)[:, :VOCAB] for parts in found]
