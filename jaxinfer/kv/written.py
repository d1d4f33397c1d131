"""Positions that planned steps write, row by row, and the state slots that go with them."""

import numpy as np

from jaxinfer.kv.cross_cache import EncodedBlocks
from jaxinfer.kv.recurrent import RecurrentStates, Segment
from jaxinfer.kv.tables import Tables


class WrittenPositions:
    """Base of the cache managers: how far each row is written by the steps planned so far."""

    tables: Tables
    encoded: EncodedBlocks
    states: RecurrentStates | None

    def begin_plan(self) -> None:
        """Begin a plan: state slots that the previous plan reads may now be written."""
        if self.states is not None:
            self.states.begin()

    def length(self, row: int) -> int:
        """Return the number of positions of a row that are written."""
        return int(self.tables.lengths[row])

    def advance(self, rows: np.ndarray, steps: int) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
        """Let rows `[B]`, which have room for them (`grow`), write one position in each of `steps` decode steps.

        Returns:
            The positions that the first step writes, `[B]`, and with recurrent layers the state slots `[B]` that each
            step reads and writes.
        """
        slots = [] if self.states is None else [self.states.step(rows) for _ in range(steps)]
        positions = self.tables.lengths[rows]
        self.tables.lengths[rows] += steps
        return positions, slots

    def advance_drafts(self, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Let rows `[B]`, which have room for them (`grow`), write `tokens` `[B]` positions each in a single step.

        Returns:
            The first of these positions, `[B]`.
        """
        positions = self.tables.lengths[rows]
        # The step is a prefill, which reads the block tables and is not sent new blocks as a decode step is.
        self.tables.send_from(rows, positions // self.tables.block_size)
        self.tables.lengths[rows] += tokens
        return positions

    def take_back(self, row: int, tokens: int) -> None:
        """Forget the last `tokens` positions of a row, which are to be written again."""
        self.tables.lengths[row] -= tokens

    def advance_prompt(self, row: int, stop: int) -> tuple[Segment, ...]:
        """Let a row write its prompt up to position `stop`.

        Returns:
            With recurrent layers the parts of the chunk, after each of which a state is stored.
        """
        self.tables.lengths[row] = stop
        return () if self.states is None else tuple(self.states.chunk(row, stop))

    def encoder_writes(self, row: int) -> np.ndarray | None:
        """Return the blocks `[m, n]` that the next step writes a row's encoder input to; None if it writes none."""
        return self.encoded.writes(row)
