"""The device's side of the engine: parameters, cache and sampler state, and the compiled steps over them."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.engine import batch as batches
from jaxinfer.engine.batch import Bucket
from jaxinfer.engine.request import Sequence as Sample
from jaxinfer.engine.request import bias_row
from jaxinfer.engine.sampler import Edits, Level
from jaxinfer.engine.scheduler import Plan
from jaxinfer.engine.steps import Sampled, Shapes, abstract_cache, edit_shapes, make_step, replicated, shardings
from jaxinfer.errors import EngineError
from jaxinfer.functional import Program
from jaxinfer.kernels.xla_attention import item_keys
from jaxinfer.kv import cache as kv_cache
from jaxinfer.kv.tables import Tables

log = logging.getLogger(__name__)

COPY_BUCKET = 16
"""Block copies are padded to powers of this."""


@dataclass(frozen=True)
class Flight:
    """A dispatched step: who was in it, and what it will say."""

    plan: Plan
    results: list[tuple[Sequence[Sample], Sampled]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for array in jax.tree.leaves([sampled for _, sampled in self.results]):
            array.copy_to_host_async()


class Runner:
    """Runs plans. Cache and sampler state are values: donated to each step and replaced by what it returns."""

    def __init__(self, program: Program, params: list[jax.Array], shapes: Shapes):
        self.program, self.params, self.shapes = program, params, shapes
        self.compile_seconds: dict[Bucket, float] = {}
        """Of each bucket met so far, its first call: trace and compilation."""
        self._steps: dict[Bucket, Callable[..., Any]] = {}
        self._lanes = abstract_cache(program, shapes)
        self._whole = replicated(program)
        self._copy = jax.jit(kv_cache.copy_blocks, donate_argnums=0, out_shardings=shardings(self._lanes))
        self._install = jax.jit(_install, donate_argnums=0, out_shardings=self._whole)
        self.reset()

    def reset(self) -> None:
        """A new, empty cache and sampler state: at the start, and when a failed step has consumed the old ones."""
        self.cache: list[kv_cache.Lane] = []  # the old one goes before the new one is made
        self.cache = kv_cache.allocate(self._lanes)
        self.tokens = jax.device_put(np.zeros(self.shapes.rows, np.int32), self._whole)
        self.edits: Edits | None = None

    def run(self, plan: Plan, tables: Tables) -> Flight:
        """Dispatches a plan: block copies, then the prefill, then the decode. Returns before they have run."""
        self._copy_blocks(*plan.copies)
        results = []
        if plan.chunks:
            samples = [s for _, s in plan.samples]
            results.append((samples, self._dispatch(self._prefill_bucket(plan), samples, plan, tables)))
        if plan.decodes:
            results.append((plan.decodes, self._dispatch(self._decode_bucket(plan), plan.decodes, plan, tables)))
        return Flight(plan, results)

    def _copy_blocks(self, sources: np.ndarray, targets: np.ndarray) -> None:
        if not len(sources):
            return
        width = COPY_BUCKET
        while width < len(sources):
            width *= COPY_BUCKET
        padding = (0, width - len(sources))
        targets = np.pad(targets, padding, constant_values=self.shapes.num_blocks)
        self.cache = self._copy(self.cache, np.pad(sources, padding), targets)

    def _dispatch(self, bucket: Bucket, samples: Sequence[Sample], plan: Plan, tables: Tables) -> Sampled:
        edited = bucket.level >= Level.EDITED
        if edited:
            self._install_edits(samples)
        parts = batches.prefill_parts if bucket.kind == "prefill" else batches.decode_parts
        packed = batches.pack(bucket, parts(plan, bucket, tables))
        step, started = self._steps.get(bucket), time.perf_counter()
        if step is None:
            step = self._steps[bucket] = make_step(self.program, self.shapes, bucket)
        try:
            self.cache, self.tokens, edits, sampled = step(
                self.params, self.cache, self.tokens, self.edits if edited else None, packed
            )
        except Exception as error:
            raise EngineError(f"the step {bucket} failed: {type(error).__name__}: {error}") from error
        if edited:
            self.edits = edits
        if bucket not in self.compile_seconds:
            self.compile_seconds[bucket] = time.perf_counter() - started
            log.info("compiled %s in %.1f s", bucket, self.compile_seconds[bucket])
        return sampled

    def _level(self, samples: Sequence[Sample]) -> tuple[Level, int]:
        level = max((s.request.level for s in samples), default=Level.GREEDY)
        wanted = any(s.request.params.logprobs is not None for s in samples)
        return level, self.shapes.max_logprobs if wanted else -1

    def _prefill_bucket(self, plan: Plan) -> Bucket:
        tokens = sum(chunk.count for chunk in plan.chunks)
        tokens = _least(self.shapes.prefill_buckets, tokens)
        asked = any(c.sequence.request.params.prompt_logprobs is not None and not c.sequence.made for c in plan.chunks)
        level, count = self._level([s for _, s in plan.samples])
        beside = self.shapes.max_logprobs if asked else -1
        return Bucket(
            "prefill", tokens, self.shapes.prefill_rows, self.shapes.width, level, count, beside, tile=self.program.tile
        )

    def _decode_bucket(self, plan: Plan) -> Bucket:
        rows = _least(self.shapes.decode_buckets, len(plan.decodes))
        needed = int((plan.positions // item_keys(self.shapes.block_size) + 1).sum())
        items = self.shapes.items_bucket(rows, needed)
        return Bucket("decode", rows, rows, self.shapes.width, *self._level(plan.decodes), items=items)

    def _install_edits(self, samples: Sequence[Sample]) -> None:
        """Brings histories and biases of edited rows up to date, where they changed."""
        if self.edits is None:
            make = partial(jnp.zeros, device=self._whole)
            history, bias = edit_shapes(self.program, self.shapes)
            self.edits = Edits(make(history, jnp.int32), make(bias, jnp.float32))
        for sequence in samples:
            if sequence.request.level < Level.EDITED:
                continue
            vocab = self.edits.bias.shape[1]
            position = sequence.length + sequence.pending - 1
            version, bias = bias_row(sequence, position, vocab)
            if version != sequence.bias_version:
                history = np.zeros(self.edits.history.shape[1], np.int32)
                history[: sequence.length] = sequence.tokens[: sequence.length]
                known = np.int32(sequence.length)
                self.edits = self._install(self.edits, np.int32(sequence.row), history, known, bias)
                sequence.bias_version = version


def _install(edits: Edits, row: jax.Array, history: jax.Array, known: jax.Array, bias: jax.Array) -> Edits:
    """Sets a row's bias and the first `known` tokens of its history; later ones are the device's own."""
    kept = jnp.where(jnp.arange(history.shape[0]) < known, history, edits.history[row])
    return Edits(edits.history.at[row].set(kept), edits.bias.at[row].set(bias))


def _least(sizes: Sequence[int], needed: int) -> int:
    return next(size for size in sizes if size >= needed)
