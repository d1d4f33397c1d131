"""Record an engine's steps in an event log, while a recording is switched on."""

import time
from collections.abc import Callable, Iterable
from itertools import islice

import numpy as np

from jaxinfer.engine.plan import Plan
from jaxinfer.engine.request import Sequence
from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.engine.sequence_state import Status
from jaxinfer.kv.interface import CacheManager
from jaxinfer.recording.events import CACHED, FREE, MAX_STEPS, EventLog, Owner
from jaxinfer.recording.recording import Recording

MOST_WAITING = 256
"""Number of sequences at the head of the waiting queue that a recording shows before they start."""


class Recorder:
    """Writer of an engine's event log; all methods run on the engine thread.

    An event costs O(N) for a pool of N blocks, so that no operation of the cache is slower without a recording.
    """

    def __init__(self, manager: CacheManager, max_steps: int = MAX_STEPS):
        self.log = EventLog(manager.pool.num_blocks, manager.block_size, max_steps, time.monotonic())
        self._live: dict[Sequence, Owner] = {}
        """Sequences in the log that have not ended."""
        self._running: set[Sequence] = set()
        """Those of them that were running at the last event."""
        self._closed = True
        """Whether the last event is an idle one."""

    def observe(self, scheduler: Scheduler, plan: Plan, now: float) -> None:
        """Append a plan that was dispatched at `now`; an empty one if nothing was left to do."""
        if not plan and self._closed:
            self._update(now)
            return
        number = self.number
        # First, as some of the plan's sequences may have ended with the tokens of the step before.
        took_part = dict(
            decode_steps=plan.steps if plan else 0,
            prefills=tuple((number(chunk.sequence), chunk.count) for chunk in plan.chunks),
            decodes=tuple(number(sequence) for sequence in plan.decodes),
            forks=tuple(
                (number(plan.chunks[chunk].sequence), number(sequence))
                for chunk, sequence in plan.samples
                if sequence is not plan.chunks[chunk].sequence
            ),
        )
        preempted = self._update(now)
        codes = block_codes(scheduler.manager, scheduler.rows.active, number)
        copies = tuple(zip(*(ids.tolist() for ids in plan.copies), strict=True))
        self.log.append(now, codes, preempted=preempted, copies=copies, **took_part)
        self._closed = not plan
        self._running.update(sequence for sequence in self._live if sequence.status is Status.RUNNING)

    def wait(self, now: float) -> None:
        """Record that the next step waits for its programs, so that no sequence is charged with this time."""
        preempted = self._update(now)
        if preempted or not self._closed:
            self.log.append(now, self.log.codes, preempted=preempted)
        self._closed = True

    def read(self, scheduler: Scheduler) -> Recording:
        """Return the recording so far, with the sequences that wait."""
        now = time.monotonic()
        self._update(now)
        for sequence in islice(scheduler.waiting, MOST_WAITING):
            self.number(sequence)
        return Recording.of(self.log, now)

    def _update(self, now: float) -> tuple[int, ...]:
        """Bring the log's sequences up to date; return the numbers of those that were preempted since."""
        preempted = []
        for sequence, owner in list(self._live.items()):
            request = sequence.request
            owner.tokens, owner.samples = sequence.made, len(request.sequences)  # a beam search makes more of them
            owner.cached_tokens, owner.miss_reason = request.cached_tokens, request.miss_reason
            if sequence.status is Status.FINISHED:
                owner.end, owner.finish_reason = now, sequence.finish_reason
                if request.finished_time is not None:
                    owner.end = min(now, request.finished_time)
                del self._live[sequence]
                self._running.discard(sequence)
            elif sequence.status is Status.WAITING and sequence in self._running:
                self._running.remove(sequence)
                preempted.append(owner.number)
        return tuple(preempted)

    def number(self, sequence: Sequence) -> int:
        """Return the number of a sequence, which enters the log if it is new."""
        owner = self._live.get(sequence)
        if owner is None:
            owner = self._live[sequence] = self.log.name(owner_of(sequence))
        return owner.number


def owner_of(sequence: Sequence, number: int = 0) -> Owner:
    """Describe a sequence."""
    request = sequence.request
    return Owner(
        number=number,
        request_id=request.id,
        sample=sequence.index,
        samples=len(request.sequences),
        arrival=request.arrival_time,
        prompt_tokens=len(request.prompt),
        cached_tokens=request.cached_tokens,
        miss_reason=request.miss_reason,
        tokens=sequence.made,
    )


def block_codes(manager: CacheManager, active: Iterable[Sequence], number: Callable[[Sequence], int]) -> np.ndarray:
    """Return a code of each block's owner, `[N]` int32 (`recording.events`).

    Args:
        manager: the cache's manager.
        active: the running sequences.
        number: returns the number of a sequence.
    """
    codes = np.full(manager.pool.num_blocks, FREE, np.int32)
    holders = np.zeros(len(codes), np.int32)
    codes[manager.cached_blocks()] = CACHED
    for sequence in active:
        ids = manager.blocks_of(sequence.row)
        codes[ids] = number(sequence) + 1
        holders[ids] += 1
    return np.where(holders > 1, -holders, codes)
