"""Count the cache blocks that an engine's steps hold, and the blocks they need."""

from collections.abc import Callable

import numpy as np

from jaxinfer.engine.engine import Engine
from jaxinfer.engine.plan import Plan
from jaxinfer.engine.runner.flight import Flight
from jaxinfer.kv.tables import Tables


class Counted:
    """Context manager that records, over an engine's steps, the most blocks held and the most blocks needed.

    Needed are the blocks of the positions that a step's tokens read or write, in every layer. Blocks of a common prompt
    prefix count once, except for a partial last block, which sequences cannot share.
    """

    def __init__(self, engine: Engine):
        self.held = self.fewest = 0
        self._engine, self._run = engine, engine.runner.run

    def __enter__(self) -> "Counted":
        self._engine.runner.run = self._count
        return self

    def __exit__(self, *exception: object) -> None:
        del self._engine.runner.run

    def _count(self, plan: Plan, tables: Tables, postpone: Callable[..., Plan]) -> Flight:
        self.held = max(self.held, self._holding(plan, tables))
        self.fewest = max(self.fewest, self._needed(plan))
        return self._run(plan, tables, postpone)

    def _holding(self, plan: Plan, tables: Tables) -> int:
        return int(self._engine.manager.pool.num_held)

    def _needed(self, plan: Plan) -> int:
        size, needed = self._engine.manager.block_size, set()
        spans = [(chunk.sequence, chunk.start, chunk.start + chunk.count) for chunk in plan.chunks]
        spans += [(sequence, at, at + 1) for sequence, at in zip(plan.decodes, plan.positions.tolist(), strict=True)]
        for number, kind in enumerate(self._engine.manager.kinds):
            for sequence, start, stop in spans:
                first, request = int(kind.kind.first_needed(start)) // size, sequence.request
                columns = np.arange(first, -(-stop // size))
                whole = (columns + 1) * size <= len(request.prompt)
                needed |= {(number, request.id, column) for column in columns[whole].tolist()}
                needed |= {(number, sequence, column) for column in columns[~whole].tolist()}
        return sum(self._engine.manager.kinds[number].count for number, *_ in needed)


class Read(Counted):
    """Blocks held and needed for encoder outputs alone: those of a step's sequences, and those of its distinct
    inputs.
    """

    def _holding(self, plan: Plan, tables: Tables) -> int:
        rows = sorted({sequence.row for sequence in plan.sequences})
        ids = tables.blocks[self._engine.manager.encoded.kind.span, rows]
        return len(np.unique(ids[ids >= 0]))

    def _needed(self, plan: Plan) -> int:
        read = (sequence.request.encoded for sequence in plan.sequences)
        inputs = {(one.salt, one.identity): one.blocks for one in read if one is not None}
        return self._engine.manager.encoded.kind.count * sum(inputs.values())
