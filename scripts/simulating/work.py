"""Describe the work of a step's launches, as the models of step times take it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxinfer.engine.plan import Plan
from jaxinfer.engine.runner.launches import Launch
from jaxinfer.kv.spec import Full


@dataclass(frozen=True)
class Work:
    """Work of one compiled step."""

    decode: bool
    """Whether it is a decode step; a mixed step of a deterministic engine counts as prefill."""
    tokens: int
    """Tokens computed, padding included."""
    rows: int
    """Sequences, padding included."""
    kv: tuple[int, ...]
    """For each of the model's attention layouts: positions whose keys and values are read, over all sequences. A
    prefill reads those of a sequence once for each `PREFILL_TILE` of its queries."""
    pairs: tuple[int, ...]
    """For each layout: pairs of a query and a key that it sees."""

    @property
    def features(self) -> list[float]:
        """Return the terms in which a measured model is linear (`TERMS`)."""
        own = [1.0, self.tokens, float(sum(self.pairs))]
        none = [0.0] * len(own)
        return [*own, *none] if self.decode else [*none, *own]


PREFILL_TILE = 128
"""Queries that a prefill kernel computes together."""
TERMS = tuple(f"{kind} {term}" for kind in ("decode", "prefill") for term in ("step", "token", "pair"))


def windows(specs: Sequence[object]) -> tuple[int | None, ...]:
    """Return the distinct sliding windows of a model's attention layers; None stands for all positions."""
    found = {getattr(one.kind, "size", None) for one in specs if isinstance(one, Full) and not one.kind.encoded}
    return tuple(sorted(found, key=lambda size: -1 if size is None else size))


def of_launch(launch: Launch, plan: Plan, ahead: int, sizes: Sequence[int | None]) -> Work | None:
    """Return the work of a launch of a plan; None if it computes no tokens.

    Args:
        launch: the launch.
        plan: the plan it belongs to.
        ahead: number of the plan's decode steps before it.
        sizes: `windows` of the model.
    """
    if launch.step is None or not hasattr(launch.key, "tokens"):
        return None
    decode = getattr(launch.key, "kind", "") == "decode"
    contexts, chunks = np.empty(0, np.int64), []
    if decode or launch.decodes is not None:
        contexts = plan.positions.astype(np.int64) + ahead + 1
    if not decode and not ahead:
        chunks = [(chunk.start, chunk.count) for chunk in plan.chunks]
    kv, pairs = zip(*(attended(contexts, chunks, size) for size in sizes), strict=True) if sizes else ((), ())
    return Work(decode, launch.key.tokens, launch.key.rows, kv, pairs)


def attended(contexts: np.ndarray, chunks: Sequence[tuple[int, int]], window: int | None) -> tuple[int, int]:
    """Return the positions that are read, and the pairs of a query and a key."""
    seen = contexts if window is None else np.minimum(contexts, window)
    kv = pairs = int(seen.sum())
    for start, count in chunks:
        ends = np.arange(start + 1, start + count + 1)
        seen = ends if window is None else np.minimum(ends, window)
        pairs += int(seen.sum())
        for tile in range(0, count, PREFILL_TILE):
            size = min(PREFILL_TILE, count - tile)
            end = start + tile + size
            kv += end if window is None else min(end, window + size - 1)
    return kv, pairs
