"""Draft tokens by a smaller model, whose cache follows that of the served model (`draft_keys`)."""

import time
from collections.abc import Sequence

import numpy as np

from jaxinfer.engine.request import Sequence as Sample
from jaxinfer.engine.runner.batch import sampling_rows
from jaxinfer.engine.runner.buckets import read_size
from jaxinfer.engine.runner.draft_steps import DraftFill, DraftSteps, fill_key, fill_sizes, steps_key
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.engine.speculation.draft_keys import DraftKeys
from jaxinfer.engine.speculation.drafter import LONGEST_PAUSE, Drafter
from jaxinfer.functional import prefill_batch
from jaxinfer.kv.interface import CacheManager
from jaxinfer.speculative_config import SpeculativeConfig

NONE = np.empty(0, np.int32)


class ModelDrafter(Drafter):
    """Drafts for each decoding sequence that is due, as many tokens of each as the step that verifies has room for.

    The draft model first computes what its cache lacks of a sequence, at most a prefill step of tokens at a time: the
    prompt before the first draft, later what was sampled since. So it costs nothing while drafts pause.
    """

    def __init__(self, config: SpeculativeConfig, runner: Runner, manager: CacheManager):
        """Make a drafter with the runner's draft model.

        Args:
            config: how to draft.
            runner: runs the draft model's steps.
            manager: allocates blocks for the drafts.
        """
        super().__init__(config, runner.shapes.verify_buckets[-1], runner.lacks_to_verify)
        self._runner, self._manager = runner, manager
        self._longest = runner.program.draft.module(runner.draft_params).config.max_length
        """Maximum tokens of a sequence that the draft model supports."""
        self.forget()

    def propose(self, sequences: Sequence[Sample], rows: np.ndarray, remaining: np.ndarray) -> list[np.ndarray] | None:
        """Return a draft for each sequence of a decode step, as `Drafter.propose`."""
        if not self.may_draft(sequences) or any(s.pending for s in sequences):
            return None
        counts = self._counts(sequences, remaining)
        if not any(counts) or self._lacks(sequences, rows, len(sequences) + sum(counts)):
            return None
        began, compiled = time.monotonic(), len(self._runner.programs.seconds)
        drafts = self._draft(sequences, rows, counts)
        if compiled == len(self._runner.programs.seconds):
            self._spent += time.monotonic() - began
        tokens = len(sequences) + sum(map(len, drafts))
        return None if tokens <= len(sequences) or self._lacks(sequences, rows, tokens) else drafts

    def _is_due(self, sequence: Sample) -> bool:
        return sequence.length < self._longest and super()._is_due(sequence)

    def _misses(self, key: DraftFill | DraftSteps) -> bool:
        """Return whether a program of the draft model is missing, and begin to compile it; if it cannot be, pause."""
        if key in self._runner.programs.failed:
            self.payoff.pause = LONGEST_PAUSE
        return self._runner.lacks([key])

    def leave(self, sequence: Sample) -> None:
        """Forget what the draft model has computed of a sequence that is about to lose its row."""
        self._keys.leave(sequence)

    def forget(self) -> None:
        """Forget all that the draft model has computed."""
        self._keys = DraftKeys(self._manager.tables, self._runner.shapes.num_blocks)

    def _counts(self, sequences: Sequence[Sample], remaining: np.ndarray) -> list[int]:
        """Return the number of tokens to draft for each sequence: the room is divided equally."""
        due = sum(map(self._is_due, sequences))
        room, counts = self._most - len(sequences), []
        for sequence, left in zip(sequences, remaining.tolist(), strict=True):
            if not self._is_due(sequence):
                counts.append(0)
                continue
            most = min(self._config.num_speculative_tokens, sequence.draft_size, self._longest - sequence.length)
            counts.append(max(0, min(most, left - 1, -(-room // due))))
            room, due = room - counts[-1], due - 1
        return counts

    def _draft(self, sequences: Sequence[Sample], rows: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
        """Return the drafts; none for a sequence without blocks for it, or too much of which is not computed yet."""
        drafts = [NONE] * len(sequences)
        chosen = [i for i, n in enumerate(counts) if n and self._manager.grow(rows[i : i + 1], n + 1) is not None]
        ready = self._fill([sequences[i] for i in chosen])
        chosen = [i for i, filled in zip(chosen, ready, strict=True) if filled]
        # What the draft model reads of prompts is computed before the step that is timed.
        self._reads_prompts = not all(ready)
        if chosen:
            found = self._steps([sequences[i] for i in chosen], rows[chosen], np.array([counts[i] for i in chosen]))
            for i, draft in zip(chosen, found, strict=True):
                drafts[i] = draft
        return drafts

    def _fill(self, sequences: Sequence[Sample]) -> list[bool]:
        """Compute what the draft model lacks of sequences before their last tokens; return of which it has all."""
        shapes, keys = self._runner.shapes, self._keys
        known = [keys.known(sequence) for sequence in sequences]
        lacking = [sequence.length - 1 - start for sequence, start in zip(sequences, known, strict=True)]
        room, counts = fill_sizes(shapes)[-1], [0] * len(sequences)
        for i in sorted(range(len(sequences)), key=lacking.__getitem__):  # the others in the next step
            counts[i] = min(lacking[i], room)
            room -= counts[i]
        some = [i for i, count in enumerate(counts) if count]
        if some:
            key = fill_key(self._runner.program, shapes, sum(counts))
            if self._misses(key):
                return [not count for count in lacking]
            last = self._runner.program.draft.vocab - 1
            chunks = [(np.minimum(sequences[i].tokens[known[i] :][: counts[i]], last), known[i], 0) for i in some]
            tables = np.stack([self._table(sequences[i]) for i in some])
            batch = prefill_batch(chunks, tables, tokens=key.tokens, rows=key.rows, tile=key.tile)
            self._runner.draft(key, vars(batch))
            for i in some:
                keys.wrote(sequences[i], known[i], known[i] + counts[i], NONE)
        return [count == lacks for count, lacks in zip(counts, lacking, strict=True)]

    def _steps(self, sequences: Sequence[Sample], rows: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
        """Draft `counts` `[B]` tokens of sequences of which nothing is lacking."""
        runner, shapes = self._runner, self._runner.shapes
        lengths, size = np.array([sequence.length for sequence in sequences]), len(sequences)
        reads = read_size(shapes, lengths + counts - 2, np.zeros((size, 2), np.int32))
        key = steps_key(runner.program, shapes, size, reads, runner.row_params.needs(rows).level)
        if self._misses(key):
            return [NONE] * size
        parts = {name: np.zeros(shape, np.int32) for name, shape in key.shapes.items()}
        parts["positions"][:] = -1
        params = runner.row_params.packed
        parts["sampling"] = sampling_rows(params, rows, np.arange(size), lengths, key.rows)
        parts["tokens"][:size] = [sequence.tokens[sequence.length - 1] for sequence in sequences]
        parts["positions"][:size], parts["counts"][:size] = lengths - 1, counts
        parts["tables"][:size] = [self._table(sequence) for sequence in sequences]
        made = runner.draft(key, parts)
        drafts = [made[:count, i] for i, count in enumerate(counts.tolist())]
        for sequence, draft in zip(sequences, drafts, strict=True):
            self._keys.wrote(sequence, sequence.length - 1, sequence.length, draft[:-1])
        return drafts

    def _table(self, sequence: Sample) -> np.ndarray:
        return np.maximum(self._keys.table(sequence.row), 0)
