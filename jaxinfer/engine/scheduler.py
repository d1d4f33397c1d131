"""Scheduler: chooses the sequences, tokens and blocks of the next step.

A step is scheduled while the previous one may still be running: the values of the previous tokens may be unknown, their
number is known. Decoding sequences are scheduled first, then prefill chunks fill the token budget. If nothing is
waiting, a plan may hold several decode steps of the same sequences, so that the host works once for all of them. When
no blocks are left, the youngest sequence is preempted: its blocks are released and it is recomputed later.
"""

from dataclasses import dataclass
from itertools import islice

import numpy as np

from jaxinfer.engine.encoder_cache import EncoderCache
from jaxinfer.engine.inflight_prefixes import LEAST_SHARED, InflightPrefixes
from jaxinfer.engine.plan import Chunk, Plan
from jaxinfer.engine.request import Request, Sequence, Status, depends_on_history
from jaxinfer.engine.waiting import Waiting
from jaxinfer.kv.cross_cache import Encoded
from jaxinfer.kv.interface import CacheManager
from jaxinfer.kv.prefix_match import Hit


@dataclass(frozen=True)
class Limits:
    """Limits of one step."""

    tokens: int
    """Token budget of prefill and decode together."""
    prefill_rows: int
    """Maximum number of sequences, and of samples, in one prefill."""
    share_blocks: bool = True
    """Whether samples of a request share their prompt's blocks by forking."""
    feature_slots: int = 0
    """Number of slots of the feature pool (in total, not per step)."""
    encode_units: int = 0
    """Maximum number of values encoded for cross-attention in one step; a single request may exceed it."""
    whole_prompts: bool = False
    """Whether all prompts are computed whole, since what is wanted of their tokens is not kept in the prefix cache."""


class Scheduler:
    """The waiting queue, the running rows and their scheduling state."""

    def __init__(self, manager: CacheManager, limits: Limits):
        self.manager = manager
        self.limits = limits
        self.waiting = Waiting()
        self._requeued_in_flight: list[Sequence] = []
        """Waiting sequences that were requeued while a sampled token was still in flight."""
        rows = manager.tables.rows
        self.running: list[Sequence | None] = [None] * rows
        self.free_rows = list(range(rows - 1, -1, -1))
        self.decoding = np.zeros(rows, bool)
        """Whether the prompt of each row is computed."""
        self.prefilling: list[Sequence] = []
        """Running sequences whose prompt is not computed yet."""
        self.remaining = np.zeros(rows, np.int64)
        """Number of tokens each row may still sample, not counting those in flight."""
        self.masked = np.zeros(rows, np.int64)
        """Number of tokens until the row's bias changes (`min_tokens`); 0 or less if it no longer does."""
        self._num_history_dependent = 0
        """Number of running sequences whose next step depends on tokens the host must have read."""
        self._unwritten: dict[Sequence, int] = {}
        """Number of the last positions of each sequence that a plan which is not dispatched yet will write."""
        self._num_structured = 0
        """Number of running sequences with a grammar: the mask of each step depends on the token before."""
        self.inflight = InflightPrefixes()
        self.preempted = 0
        self.last_arrival: int | None = None
        """While draining: number of the last request to start (`Request.arrival`); None if all may start."""
        self.encoder_cache = EncoderCache(limits.feature_slots)

    def add(self, request: Request) -> None:
        """Queue all sequences of a request."""
        size, cross = self.manager.block_size, request.cross
        if request.inputs is not None:
            request.extras = request.inputs.extras(size)
        if cross is not None:
            request.extras = cross.extras(size)
            request.encoded = Encoded(request.salt, cross.digest, cross.identity, cross.length, size)
        self.waiting.extend(request.sequences)

    @property
    def active(self) -> list[Sequence]:
        """Running sequences."""
        return [s for s in self.running if s is not None]

    @property
    def rows_in_use(self) -> int:
        """Number of running sequences."""
        return len(self.running) - len(self.free_rows)

    @property
    def has_work(self) -> bool:
        """Whether there is anything to schedule, now or after the step in flight."""
        return bool(self.waiting) or self.rows_in_use > 0

    @property
    def needs_history(self) -> bool:
        """Whether some running sequence's next step depends on tokens the host must have read."""
        return self._num_history_dependent > 0

    def schedule(self, most: int = 1) -> Plan:
        """Plan the next step, or up to `most` decode steps, and update all state as if it had been dispatched."""
        states = self.manager.states
        if states is not None:
            states.begin()
        rows, steps, copies = self._decodes(most)
        slots = [] if states is None else [states.step(rows) for _ in range(steps)]
        tables, running = self.manager.tables, self.running
        positions = tables.lengths[rows]
        tables.lengths[rows] += steps
        self.remaining[rows] -= steps
        self.masked[rows] -= steps
        decodes = [running[row] for row in rows.tolist()]
        for sequence in decodes:
            sequence.pending += steps
        chunks, samples = self._prefills(self.limits.tokens - len(rows))
        while not chunks and not len(rows) and (blocking := self._blocking_sequence()) is not None:
            self.preempt(blocking)
            chunks, samples = self._prefills(self.limits.tokens)
        self.manager.take_evicted()
        encodes, reads, reused = self.encoder_cache.take_scheduled()
        return Plan(
            chunks, samples, decodes, rows.astype(np.int32), positions, steps, copies, slots, encodes, reused, reads
        )

    def _decodes(self, most: int) -> tuple[np.ndarray, int, tuple[np.ndarray, np.ndarray]]:
        """Choose rows to decode within the token budget, and the number of steps; allocate their blocks."""
        while True:
            rows = np.flatnonzero(self.decoding & (self.remaining > 0))[: self.limits.tokens]
            steps = self._steps(rows, most)
            copies = self.manager.grow(rows, steps)
            while copies is None and steps > 1:  # fewer steps instead of a preemption
                steps //= 2
                copies = self.manager.grow(rows, steps)
            if copies is not None:
                return rows, steps, copies
            self.preempt(max(self.active, key=lambda s: s.age))

    def _blocking_sequence(self) -> Sequence | None:
        """Return the youngest sequence that blocks the progress of others, or None.

        A sequence blocks others if it holds blocks that they need for their next chunk, and no running decode will
        release any.
        """
        chosen = [s for s in self.active if s.candidates is not None]
        if np.count_nonzero(self.decoding) > len(chosen) or self._awaits_tokens():
            return None
        if chosen and (self.prefilling or any(s.candidates is None for s in self.waiting)):
            return max(chosen, key=lambda s: s.age)  # beams that wait for the others of their search
        return max(self.prefilling, key=lambda s: s.age) if len(self.prefilling) > 1 else None

    def _awaits_tokens(self) -> bool:
        """Return whether a waiting sequence has a token in flight that its recomputation must include."""
        self._requeued_in_flight = [s for s in self._requeued_in_flight if s.pending and s.status is Status.WAITING]
        return bool(self._requeued_in_flight)

    def _steps(self, rows: np.ndarray, most: int) -> int:
        """Return the number of decode steps until the host must act.

        It acts to admit, to prefill, to end a row at its limit, or to change a bias.
        """
        if most == 1 or not len(rows) or self.waiting or self.prefilling or self.needs_history or self._num_structured:
            return 1
        masked = self.masked[rows]
        return min(most, int(self.remaining[rows].min()), int(masked[masked > 0].min(initial=most)))

    def _prefills(self, budget: int) -> tuple[list[Chunk], list[tuple[int, Sequence]]]:
        """Plan chunks of partly prefilled sequences, then of waiting sequences that fit, in order of arrival."""
        chunks: list[Chunk] = []
        samples: list[tuple[int, Sequence]] = []
        for sequence in sorted(self.prefilling, key=lambda s: s.age):
            if budget <= 0 or not self._room(chunks):
                break
            count, start = self._chunk_length(sequence, budget, chunks), sequence.computed
            if not self.manager.extend(sequence.row, start, start + count):
                return chunks, samples  # decoding sequences will release blocks
            budget -= self._chunk(sequence, count, chunks, samples)
        for sequence in self._queue_head():
            if not (self.free_rows and budget > 0 and self._room(chunks) and self._room(samples)):
                break
            if sequence.status is not Status.WAITING:
                continue  # a sample that was just forked
            if self._lacks_blocks(sequence):
                break
            if self._waits_for_prefix(sequence):
                continue
            # A sequence preempted in this call may have a token in flight, which its recomputation must include.
            if sequence.pending or not self._admit(sequence, budget):
                break
            self.waiting.remove(sequence)
            count = self._chunk_length(sequence, budget, chunks)
            budget -= self._chunk(sequence, count, chunks, samples)
        return chunks, samples

    def _queue_head(self) -> list[Sequence]:
        """Return the head of the waiting queue that a step considers.

        Its size is twice the number of rows, as up to one batch may be waiting for prefixes that others compute.
        """
        head = list(islice(self.waiting, 2 * len(self.running))) if self.free_rows else []
        last = self.last_arrival
        return head if last is None else [sequence for sequence in head if sequence.request.arrival <= last]

    def _lacks_blocks(self, sequence: Sequence) -> bool:
        """Return whether the cache still has too few blocks for a sequence that failed admission, in O(1).

        Returns False if more of its prompt has been published since.
        """
        if sequence.needed_blocks <= 0 or self.manager.pool.num_available >= sequence.needed_blocks:
            return False
        return sequence.first_missing is None or sequence.first_missing not in self.manager.index

    def _room(self, taken: list[Chunk] | list[tuple[int, Sequence]]) -> int:
        """Return how many more chunk parts, or samples, fit into the prefill."""
        parts = sum(one.parts if isinstance(one, Chunk) else 1 for one in taken)
        return max(0, self.limits.prefill_rows - parts)

    def _chunk_length(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        """Return the number of tokens of a prompt's next chunk."""
        count, cross = min(budget, sequence.prefilled - sequence.computed), sequence.request.cross
        reach = None if cross is None else cross.tokens_within(sequence.computed, self._room(chunks))
        return count if reach is None else min(count, reach)

    def _waits_for_prefix(self, sequence: Sequence) -> bool:
        """Return whether a waiting sequence should wait for a prefix that another request is computing."""
        if sequence.candidates is not None or self.inflight.still_waits(sequence):
            return True
        findable = self._findable(sequence)
        if not self.inflight or sequence.pending or not findable:
            return False
        key = self.inflight.version, sequence.length
        if sequence.checked_inflight == key:
            return False
        self._chain(sequence)
        size = self.manager.block_size
        waits = self.inflight.should_wait(sequence, (findable - 1) // size, LEAST_SHARED * self.limits.tokens / size)
        sequence.checked_inflight = None if waits else key
        return waits

    def _findable(self, sequence: Sequence) -> int:
        """Return the number of leading tokens of which all but the last may be found in the prefix cache.

        Log-probabilities, hidden states and experts of a prompt's tokens are not kept there.
        """
        request = sequence.request
        if request.wanted is not None:
            return request.wanted.first + 1 if request.wanted.first else 0
        if self.limits.whole_prompts or (request.params.prompt_logprobs is not None and sequence.made == 0):
            return 0
        return sequence.length

    def _chain(self, sequence: Sequence) -> None:
        """Update the sequence's block digests to all known tokens."""
        if self.manager.prefix_caching:
            tokens = sequence.tokens[: sequence.length]
            extras = sequence.request.extras
            sequence.digests = self.manager.digests(tokens, sequence.root, sequence.digests, extras)

    def _lookup(self, sequence: Sequence) -> Hit:
        """Return the prefix hit of a waiting sequence, looked up again only after the prefix index has changed."""
        key = self.manager.index_version, sequence.length
        if sequence.last_hit is None or sequence.last_hit[0] != key:
            self._chain(sequence)
            tokens, extras = sequence.tokens[: self._findable(sequence)], sequence.request.extras
            sequence.last_hit = key, self.manager.lookup(tokens, sequence.digests, sequence.root, extras)
        return sequence.last_hit[1]

    def _admit(self, sequence: Sequence, budget: int) -> bool:
        """Admit a waiting sequence: assign a row and allocate blocks for all known tokens, if they fit.

        For layers with a window only the blocks of the first chunk are allocated.
        """
        manager, request = self.manager, sequence.request
        skip = self._findable(sequence) < sequence.length
        encoded = manager.lookup_encoded(request.encoded)
        if encoded.missing and not self.encoder_cache.has_cross_room(request.cross, self.limits.encode_units):
            return False
        hit = self._lookup(sequence)
        row, found = self.free_rows[-1], hit.blocks * manager.block_size
        reservation = self.encoder_cache.find_room(sequence, found)
        if not reservation.fits:
            return False
        chunk_end = min(sequence.length, found + budget)
        if not manager.admit(row, hit, sequence.length, chunk_end, encoded):
            sequence.needed_blocks = manager.needed(hit, sequence.length, chunk_end, encoded)
            sequence.first_missing = None if skip else next(iter(sequence.digests[hit.known : hit.known + 1]), None)
            return False
        self._take_row(sequence)
        self.encoder_cache.pin(sequence, reservation)
        self.encoder_cache.add_cross(request.cross, manager.encoded.writes(row))
        sequence.computed = found
        sequence.prefilled = sequence.length
        sequence.published = sequence.hit_blocks = hit.blocks
        sequence.stale = False
        self.inflight.register(sequence)
        if sequence.made == 0 and sequence.index == 0:
            request.cached_tokens, request.hits = found, hit.kinds
            request.miss_reason = "the request needs more of its prompt computed" if skip else hit.reason
        return True

    def _take_row(self, sequence: Sequence) -> None:
        sequence.row = self.free_rows.pop()
        sequence.status, sequence.bias_version, sequence.needed_blocks = Status.RUNNING, -1, 0
        sequence.last_hit = sequence.checked_inflight = None
        sequence.prepare()
        row, request = sequence.row, sequence.request
        self.running[row] = sequence
        self.prefilling.append(sequence)
        # A beam samples one token; the search then chooses among the continuations of all beams.
        self.remaining[row] = sequence.stage_limit - sequence.length if request.beams is None else 1
        self.masked[row] = request.params.min_tokens - sequence.made if request.stop_ids else 0
        if request.cross is not None:
            self.manager.tables.seen[row] = request.cross.seen(len(request.prompt), 1)[0]
        self._num_history_dependent += depends_on_history(request)
        self._num_structured += request.grammar is not None

    def _chunk(self, sequence: Sequence, count: int, chunks: list[Chunk], samples: list[tuple[int, Sequence]]) -> int:
        """Add a chunk of `count` tokens and, if it completes the prompt, its samples; return the tokens taken."""
        index = self.encoder_cache.feature_rows(sequence.row, sequence.computed, count)
        states, stop = self.manager.states, sequence.computed + count
        segments = () if states is None else tuple(states.chunk(sequence.row, stop))
        chunks.append(Chunk(sequence, sequence.computed, count, segments, index))
        sequence.computed += count
        self.manager.tables.lengths[sequence.row] = sequence.computed
        if sequence.computed == sequence.prefilled and sequence.request.wanted is not None:
            self._end_prefill(sequence)
        elif sequence.computed == sequence.prefilled:
            self._start_decoding(sequence, len(chunks) - 1, samples)
            if sequence.made == 0 and self.limits.share_blocks:
                self._fork(sequence, len(chunks) - 1, samples)
        return count

    def _end_prefill(self, sequence: Sequence) -> None:
        """Let a sequence that samples no token wait for the end of the step that completes its prefill."""
        sequence.pending += 1  # so that it is not computed again meanwhile if it is preempted
        self.prefilling.remove(sequence)
        self.decoding[sequence.row], self.remaining[sequence.row] = True, 0

    def _start_decoding(self, sequence: Sequence, chunk: int, samples: list[tuple[int, Sequence]]) -> None:
        samples.append((chunk, sequence))
        sequence.pending += 1
        self.prefilling.remove(sequence)
        self.decoding[sequence.row] = True
        self.remaining[sequence.row] -= 1
        self.masked[sequence.row] -= 1

    def _fork(self, parent: Sequence, chunk: int, samples: list[tuple[int, Sequence]]) -> None:
        """Fork the parent into its waiting siblings, sharing its blocks, while there are free rows."""
        for child in parent.request.sequences:
            if child.status is not Status.WAITING or child.made or child.pending:
                continue
            if not self.free_rows or len(samples) >= self.limits.prefill_rows:
                break
            self.waiting.remove(child)
            self._take_row(child)
            self.manager.fork(parent.row, child.row)
            child.adopt(parent)
            self._start_decoding(child, chunk, samples)

    def branch(self, source: Sequence, target: Sequence) -> None:
        """Continue beam `target` from beam `source`, sharing all of its blocks.

        If the source's blocks have been released or no row is free, the target waits to be recomputed.
        """
        shares = self.limits.share_blocks and source.row >= 0 and (target.row >= 0 or bool(self.free_rows))
        if target.row >= 0 and not shares:
            self._requeue(target)
        target.adopt(source)
        if not shares:
            return
        if target.row < 0:
            self.waiting.remove(target)
            self._take_row(target)
            self.prefilling.remove(target)
            self.decoding[target.row] = True
        self.manager.fork(source.row, target.row)

    def preempt(self, sequence: Sequence) -> None:
        """Preempt a running sequence: release its blocks and requeue it at the head to be recomputed."""
        self.preempted += 1
        sequence.request.preemptions += 1
        self._requeue(sequence)

    def recompute(self, sequence: Sequence) -> None:
        """Requeue a sequence to be recomputed from its first token, as its rope changes with its length (longrope)."""
        if sequence.status is Status.RUNNING:
            self._requeue(sequence)
        sequence.start_over()

    def _requeue(self, sequence: Sequence) -> None:
        self._leave(sequence)
        sequence.status, sequence.computed = Status.WAITING, 0
        self.waiting.push(sequence)
        if sequence.pending:
            self._requeued_in_flight.append(sequence)

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End a sequence in any state; does nothing if it has already finished."""
        if sequence.status is Status.FINISHED:
            return
        if sequence.status is Status.RUNNING:
            self._leave(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.status, sequence.finish_reason = Status.FINISHED, reason
        sequence.trim()
        if sequence.request.finished:
            sequence.request.drop_inputs()

    def _leave(self, sequence: Sequence) -> None:
        row = sequence.row
        if not self.decoding[row]:
            self.prefilling.remove(sequence)
        self._num_history_dependent -= depends_on_history(sequence.request)
        self._num_structured -= sequence.request.grammar is not None
        self.inflight.unregister(sequence, sequence.num_registered)
        self.encoder_cache.release(row)
        self.manager.free(row, sequence.digests)
        self.running[row], self.decoding[row], self.remaining[row] = None, False, 0
        self.free_rows.append(row)
        sequence.row = -1

    def hold(self, plan: Plan) -> None:
        """Note that a plan is not dispatched yet: the blocks that it fills are not published before it is."""
        self._unwritten = {
            **{chunk.sequence: chunk.count for chunk in plan.chunks},
            **{sequence: plan.chunks[number].count for number, sequence in plan.samples},
            **dict.fromkeys(plan.decodes, plan.steps),
        }

    def drop(self, plan: Plan) -> None:
        """Forget a plan that is held and whose sequences have all ended; it is never dispatched."""
        self._unwritten = {}
        if plan.encodes:
            self.encoder_cache.reset()  # some of its inputs were never encoded
        self.manager.resend([sequence.row for sequence in self.active])

    def dispatched(self, plan: Plan) -> None:
        """Publish what a dispatched plan writes; later steps may reuse it and may overwrite what the plan reads."""
        self._unwritten = {}
        for chunk in plan.chunks:
            if chunk.start + chunk.count == chunk.sequence.prefilled:
                self.encoder_cache.release(chunk.sequence.row)
            self.manager.publish_encoded(chunk.sequence.row)
            self.publish(chunk.sequence)

    def publish(self, sequence: Sequence) -> None:
        """Publish the sequence's full blocks whose tokens are known and whose writing steps have been dispatched."""
        manager = self.manager
        if not manager.prefix_caching or sequence.status is not Status.RUNNING or sequence.stale:
            return
        written = int(manager.tables.lengths[sequence.row])
        if self._unwritten:
            written -= self._unwritten.get(sequence, 0)
        written = min(written, sequence.length)
        full, digests = written // manager.block_size, sequence.digests
        if full <= sequence.published:
            return
        tokens = sequence.tokens[: full * manager.block_size]
        # Only new blocks are hashed and copied, however long the sequence is.
        extras = sequence.request.extras
        manager.extend_digests(digests, tokens, sequence.root, extras)
        manager.publish(sequence.row, tokens, digests, sequence.root, sequence.published, full, extras)
        if self.inflight:
            self.inflight.unregister(sequence, full)
        sequence.published = full
