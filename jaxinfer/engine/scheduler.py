"""Scheduler: chooses the sequences, tokens and blocks of the next step.

A step is scheduled while the previous one may still be running: the values of the previous tokens may be unknown, their
number is known. Decoding sequences are scheduled first, then prefill chunks fill the token budget. If nothing is
waiting, a plan may hold several decode steps of the same sequences, so that the host works once for all of them. When
no blocks are left, the youngest sequence is preempted: its blocks are released and it is recomputed later.
"""

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np

from jaxinfer.engine.admission import Admission
from jaxinfer.engine.encoder_cache import EncoderCache
from jaxinfer.engine.inflight_prefixes import InflightPrefixes
from jaxinfer.engine.plan import Limits, Plan
from jaxinfer.engine.postponed import Postponed, PostponedPrefills
from jaxinfer.engine.prefill import PrefillPlanner
from jaxinfer.engine.publishing import Publisher
from jaxinfer.engine.request import Request, Sequence
from jaxinfer.engine.rows import Rows
from jaxinfer.engine.sequence_state import Status
from jaxinfer.engine.speculation.drafter import Drafter
from jaxinfer.engine.waiting import Waiting
from jaxinfer.kv.cross_cache import Encoded
from jaxinfer.kv.interface import CacheManager


class Scheduler:
    """The waiting queue, the running rows and the plans made of them."""

    def __init__(self, manager: CacheManager, limits: Limits, drafter: Drafter | None = None):
        self.manager = manager
        self.drafter = drafter
        """Drafts tokens for decode steps; None without speculative decoding."""
        self.limits = limits
        self.waiting = Waiting()
        self.rows = Rows(manager.tables.rows)
        self.inflight = InflightPrefixes()
        self.encoder_cache = EncoderCache(limits.feature_slots)
        self.admission = Admission(manager, self.rows, limits, self.inflight, self.encoder_cache)
        self.postponed = PostponedPrefills()
        self.prefills = PrefillPlanner(
            manager, limits, self.waiting, self.rows, self.admission, self.postponed, self.encoder_cache
        )
        self.publisher = Publisher(manager, self.inflight)
        self._requeued_in_flight: list[Sequence] = []
        """Waiting sequences that were requeued while a sampled token was still in flight."""
        self.preempted = 0

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
    def has_work(self) -> bool:
        """Whether there is anything to schedule, now or after the step in flight."""
        return bool(self.waiting) or self.rows.num_used > 0

    def schedule(self, most: int = 1) -> Plan:
        """Plan the next step, or up to `most` decode steps, and update all state as if it had been dispatched."""
        self.manager.begin_plan()
        rows, steps, copies = self._decodes(most)
        drafts = self._drafts(rows) if steps == 1 else None
        if drafts is None:
            positions, slots = self.manager.advance(rows, steps)
            decodes, computed = self.rows.advance(rows, steps), len(rows)
        else:
            tokens, slots = np.array([len(draft) + 1 for draft in drafts]), []
            positions = self.manager.advance_drafts(rows, tokens)
            decodes, computed = self.rows.advance(rows, tokens), int(tokens.sum())
        prefill = self.prefills.plan_compiled(self.limits.tokens - computed, decoding=bool(decodes))
        while not prefill.chunks and not len(rows) and (blocking := self._blocking_sequence()) is not None:
            self.preempt(blocking)
            prefill = self.prefills.plan(self.limits.tokens)
        self.manager.take_evicted()
        encodes, reads, reused = self.encoder_cache.take_scheduled()
        return Plan(
            prefill.chunks,
            prefill.samples,
            decodes,
            rows.astype(np.int32),
            positions,
            steps,
            copies,
            slots,
            encodes,
            reused,
            reads,
            drafts,
        )

    @property
    def needs_tokens(self) -> bool:
        """Whether the next step depends on tokens that the host must have read."""
        return self.rows.needs_history or self._may_draft(self.decodable())

    def _may_draft(self, rows: np.ndarray) -> bool:
        return self.drafter is not None and len(rows) > 0 and self.drafter.may_draft(self.rows.sequences(rows))

    def _drafts(self, rows: np.ndarray) -> list[np.ndarray] | None:
        """Return a draft for each row of a decode step, with blocks for its tokens; None if all are empty."""
        if self.drafter is None or not len(rows):
            return None
        # Drafts stay within the tokens of a step; the plan's prefill takes what is left of them.
        remaining = np.minimum(self.rows.remaining[rows], self.limits.tokens // len(rows))
        drafts = self.drafter.propose(self.rows.sequences(rows), rows, remaining)
        if drafts is None:
            return None
        for i, draft in enumerate(drafts):
            if len(draft) and self.manager.grow(rows[i : i + 1], len(draft) + 1) is None:
                drafts[i] = np.empty(0, np.int32)
        return drafts if any(map(len, drafts)) else None

    def take_back(self, sequence: Sequence, tokens: int) -> None:
        """Forget the last tokens of a dispatched step: those of a draft that are wrong."""
        sequence.pending -= tokens
        if sequence.status is Status.RUNNING:
            self.manager.take_back(sequence.row, tokens)
            self.rows.take_back(sequence, tokens)

    def decodable(self) -> np.ndarray:
        """Return the rows of the next decode step, within the token budget, `[B]`."""
        return self.rows.decodable(self.limits.tokens)

    def _decodes(self, most: int) -> tuple[np.ndarray, int, tuple[np.ndarray, np.ndarray]]:
        """Choose rows to decode within the token budget, and the number of steps; allocate their blocks."""
        while True:
            rows = self.decodable()
            steps = self._steps(rows, most)
            copies = self.manager.grow(rows, steps)
            while copies is None and steps > 1:  # fewer steps instead of a preemption
                steps //= 2
                copies = self.manager.grow(rows, steps)
            if copies is not None:
                return rows, steps, copies
            self.preempt(max(self.rows.active, key=lambda s: s.age))

    def _steps(self, rows: np.ndarray, most: int) -> int:
        """Return the number of decode steps until the host must act.

        It acts to admit, to prefill, to end a row at its limit, or to change a bias.
        """
        if most == 1 or not len(rows) or self.waiting or self.rows.prefilling or self._may_draft(rows):
            return 1
        return self.rows.steps_until_a_change(rows, most)

    def _blocking_sequence(self) -> Sequence | None:
        """Return the youngest sequence that blocks the progress of others, or None.

        A sequence blocks others if it holds blocks that they need for their next chunk, and no running decode will
        release any.
        """
        chosen, prefilling = [s for s in self.rows.active if s.candidates is not None], self.rows.prefilling
        if np.count_nonzero(self.rows.decoding) > len(chosen) or self._awaits_tokens():
            return None
        if chosen and (prefilling or any(s.candidates is None for s in self.waiting)):
            return max(chosen, key=lambda s: s.age)  # beams that wait for the others of their search
        return max(prefilling, key=lambda s: s.age) if len(prefilling) > 1 else None

    def _awaits_tokens(self) -> bool:
        """Return whether a waiting sequence has a token in flight that its recomputation must include."""
        self._requeued_in_flight = [s for s in self._requeued_in_flight if s.pending and s.status is Status.WAITING]
        return bool(self._requeued_in_flight)

    def branch(self, source: Sequence, target: Sequence) -> None:
        """Continue beam `target` from beam `source`, sharing all of its blocks.

        If the source's blocks have been released or no row is free, the target waits to be recomputed.
        """
        shares = self.limits.share_blocks and source.row >= 0 and (target.row >= 0 or bool(self.rows.free))
        if target.row >= 0 and not shares:
            self._requeue(target)
        target.adopt(source)
        if not shares:
            return
        if target.row < 0:
            self.waiting.remove(target)
            self.rows.take(target)
            self.rows.start_decoding(target)
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
        self.inflight.unregister(sequence, sequence.num_registered)
        self.encoder_cache.release(sequence.row)
        if self.drafter is not None:
            self.drafter.leave(sequence)
        self.manager.free(sequence.row, sequence.digests)
        self.rows.release(sequence)

    def postpone(self, plan: Plan, compilations: Mapping[Any, Future[Any]]) -> Plan:
        """Take back the prefill of a plan that is not dispatched, until programs are compiled; return the rest.

        Its sequences wait at the head of the queue again, with no row and no blocks.
        """
        sequences = {chunk.sequence for chunk in plan.chunks} | {sequence for _, sequence in plan.samples}
        for sequence in sorted(sequences, key=lambda s: s.age, reverse=True):
            sequence.pending = 0  # a sequence in prefill has no other token in flight
            self._requeue(sequence)
        if plan.encodes:
            self.encoder_cache.reset()  # some of its inputs are not encoded
        self.postponed.add(Postponed(sequences, sum(chunk.count for chunk in plan.chunks), compilations))
        return replace(plan, chunks=[], samples=[], encodes=[], reads=[], reused=0)

    def hold(self, plan: Plan) -> None:
        """Mark a plan as not dispatched yet; blocks that it fills are not published until it is."""
        self.publisher.hold(plan)

    def drop(self, plan: Plan) -> None:
        """Forget a plan that is held and whose sequences have all ended; it is never dispatched."""
        self.publisher.end_hold()
        if plan.encodes:
            self.encoder_cache.reset()  # some of its inputs were never encoded
        self.manager.resend([sequence.row for sequence in self.rows.active])

    def dispatched(self, plan: Plan) -> None:
        """Publish what a dispatched plan writes; later steps may reuse it and may overwrite what the plan reads."""
        self.publisher.end_hold()
        for chunk in plan.chunks:
            if chunk.start + chunk.count == chunk.sequence.prefilled:
                self.encoder_cache.release(chunk.sequence.row)
            self.manager.publish_encoded(chunk.sequence.row)
            self.publisher.publish(chunk.sequence)
