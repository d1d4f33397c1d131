"""Plan the prefill of a step: chunks of prompts, and the samples after them, within the step's limits."""

from collections.abc import Set as AbstractSet

from jaxinfer.engine.admission import Admission
from jaxinfer.engine.encoder_cache import EncoderCache
from jaxinfer.engine.plan import Chunk, Limits
from jaxinfer.engine.postponed import PostponedPrefills
from jaxinfer.engine.request import Sequence
from jaxinfer.engine.rows import Rows
from jaxinfer.engine.sequence_state import Status
from jaxinfer.engine.waiting import Waiting
from jaxinfer.kv.interface import CacheManager


class Prefill:
    """Chunks of prompts, and the sequences that sample a token after them."""

    def __init__(self, tokens: int, rows: int):
        """Start an empty prefill.

        Args:
            tokens: maximum number of tokens.
            rows: maximum number of chunk parts, and of samples.
        """
        self.chunks: list[Chunk] = []
        self.samples: list[tuple[int, Sequence]] = []
        """(index into `chunks`, sequence), as in `Plan`."""
        self.budget = tokens
        """Number of tokens that still fit."""
        self._rows, self._parts = rows, 0

    @property
    def has_room(self) -> bool:
        """Whether another chunk fits."""
        return self.budget > 0 and self._parts < self._rows

    @property
    def has_room_for_a_sample(self) -> bool:
        """Whether another sample fits."""
        return len(self.samples) < self._rows

    def next_count(self, sequence: Sequence) -> int:
        """Return the number of tokens of a prompt's next chunk."""
        count, cross = min(self.budget, sequence.prefilled - sequence.computed), sequence.request.cross
        room = max(0, self._rows - self._parts)
        reach = None if cross is None else cross.tokens_within(sequence.computed, room)
        return count if reach is None else min(count, reach)

    def add(self, chunk: Chunk) -> None:
        """Add a chunk."""
        self.chunks.append(chunk)
        self.budget -= chunk.count
        self._parts += chunk.parts

    def add_sample(self, sequence: Sequence) -> None:
        """Let a sequence sample a token after the last chunk."""
        self.samples.append((len(self.chunks) - 1, sequence))


class PrefillPlanner:
    """Plans prefills of partly prefilled and of waiting sequences."""

    def __init__(
        self,
        manager: CacheManager,
        limits: Limits,
        waiting: Waiting,
        rows: Rows,
        admission: Admission,
        postponed: PostponedPrefills,
        encoder_cache: EncoderCache,
    ):
        self._manager, self._limits, self._waiting, self._rows = manager, limits, waiting, rows
        self._admission, self._postponed, self._encoder_cache = admission, postponed, encoder_cache

    def plan_compiled(self, budget: int, *, decoding: bool) -> Prefill:
        """Plan a prefill of sequences that were postponed and need not wait any longer, or of others.

        Sequences that were postponed together are planned without others, so that the plan needs the programs that were
        compiled for it.
        """
        chosen = self._postponed.take(decoding=decoding)
        if chosen is not None:
            prefill = self.plan(min(budget, chosen.tokens), chosen.sequences)
            if prefill.chunks:
                return prefill
        return self.plan(budget)

    def plan(self, budget: int, chosen: AbstractSet[Sequence] | None = None) -> Prefill:
        """Plan chunks of partly prefilled sequences, then of waiting sequences that fit, in order of arrival.

        Args:
            budget: maximum number of tokens.
            chosen: the only sequences to plan for; None for all that are not postponed.
        """
        prefill = Prefill(budget, self._limits.prefill_rows)
        for sequence in sorted(self._rows.prefilling, key=lambda s: s.age) if chosen is None else ():
            if not prefill.has_room:
                break
            count, start = prefill.next_count(sequence), sequence.computed
            if not self._manager.extend(sequence.row, start, start + count):
                return prefill  # decoding sequences will release blocks
            self._chunk(sequence, count, prefill)
        for sequence in self._queue_head(chosen):
            if not (self._rows.free and prefill.has_room and prefill.has_room_for_a_sample):
                break
            if sequence.status is not Status.WAITING:
                continue  # a sample that was just forked
            if self._admission.lacks_blocks(sequence):
                break
            if self._admission.waits_for_prefix(sequence):
                continue
            # A sequence preempted in this call may have a token in flight, which its recomputation must include.
            if sequence.pending or not self._admission.admit(sequence, prefill.budget):
                break
            self._waiting.remove(sequence)
            self._chunk(sequence, prefill.next_count(sequence), prefill)
        return prefill

    def _queue_head(self, chosen: AbstractSet[Sequence] | None) -> list[Sequence]:
        """Return the head of the waiting queue that a step considers, or those of it that are chosen.

        Its size is twice the number of rows, as up to one batch may be waiting for prefixes that others compute.
        """
        head = self._waiting.head(2 * len(self._rows.running)) if self._rows.free else []
        if chosen is not None:
            return [sequence for sequence in head if sequence in chosen]
        return [sequence for sequence in head if sequence not in self._postponed] if self._postponed else head

    def _chunk(self, sequence: Sequence, count: int, prefill: Prefill) -> None:
        """Add a chunk of `count` tokens and, if it completes the prompt, its samples."""
        index = self._encoder_cache.feature_rows(sequence.row, sequence.computed, count)
        start, sequence.computed = sequence.computed, sequence.computed + count
        segments = self._manager.advance_prompt(sequence.row, sequence.computed)
        prefill.add(Chunk(sequence, start, count, segments, index))
        if sequence.computed < sequence.prefilled:
            return
        if sequence.request.wanted is not None:
            self._end_prefill(sequence)
            return
        self._start_decoding(sequence, prefill)
        if sequence.made == 0 and self._limits.share_blocks:
            self._fork(sequence, prefill)

    def _end_prefill(self, sequence: Sequence) -> None:
        """Let a sequence that samples no token wait for the end of the step that completes its prefill."""
        sequence.pending += 1  # so that it is not computed again meanwhile if it is preempted
        self._rows.start_decoding(sequence)
        self._rows.remaining[sequence.row] = 0

    def _start_decoding(self, sequence: Sequence, prefill: Prefill) -> None:
        prefill.add_sample(sequence)
        sequence.pending += 1
        self._rows.start_decoding(sequence)
        self._rows.remaining[sequence.row] -= 1
        self._rows.masked[sequence.row] -= 1

    def _fork(self, parent: Sequence, prefill: Prefill) -> None:
        """Fork the parent into its waiting siblings, sharing its blocks, while there are free rows."""
        for child in parent.request.sequences:
            if child.status is not Status.WAITING or child.made or child.pending:
                continue
            if not self._rows.free or not prefill.has_room_for_a_sample:
                break
            self._waiting.remove(child)
            self._rows.take(child)
            self._manager.fork(parent.row, child.row)
            child.adopt(parent)
            self._start_decoding(child, prefill)
