"""Event log of an engine: one event a step, with the blocks whose owner changed. Bounded in memory."""

from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np

FREE, CACHED = 0, -1
"""Codes of blocks without an owner. A code above 0 is the number of the owner plus 1; -k is k owners, for k of at least
2."""
MAX_STEPS = 2000
"""Number of events that a log keeps by default."""
MAX_CHANGES = 1 << 20
"""Number of changed blocks that a log keeps, over all of its events: 8 MiB."""


def as_runs(codes: np.ndarray) -> list[list[int]]:
    """Return the codes of blocks as runs of `[code, length]`."""
    starts = np.flatnonzero(np.diff(codes, prepend=codes[:1] - 1))
    return np.stack([codes[starts], np.diff(np.append(starts, len(codes)))], axis=1).tolist()


@dataclass(slots=True)
class Owner:
    """A sequence in the log: one sample of a request."""

    number: int
    request_id: str
    sample: int
    """Index of the sample in its request."""
    samples: int
    """Number of samples of the request."""
    arrival: float
    """Seconds of `time.monotonic`, like all times here."""
    prompt_tokens: int
    cached_tokens: int = 0
    """Number of prompt tokens that were found in the prefix cache."""
    miss_reason: str | None = None
    """Why no more were found."""
    tokens: int = 0
    """Number of output tokens so far."""
    end: float | None = None
    """When the engine had read the last token; None while it runs or waits."""
    finish_reason: str | None = None
    last_event: int = -1
    """Number of the last event that the sequence took part in."""

    @property
    def label(self) -> str:
        """Name in plots: the request's id, and the sample's number if there are several."""
        return self.request_id if self.samples == 1 else f"{self.request_id} #{self.sample}"


@dataclass(frozen=True, slots=True)
class Step:
    """One event: a dispatched plan, or an idle engine."""

    number: int
    time: float
    """When the step was dispatched."""
    changed: np.ndarray
    """Blocks whose code changed since the event before, and their codes: `[2, n]` int32."""
    decode_steps: int = 0
    """Number of decode steps of the plan; 0 if there was nothing to do."""
    prefills: tuple[tuple[int, int], ...] = ()
    """Number of the owner and of the prompt tokens of each chunk."""
    decodes: tuple[int, ...] = ()
    """Numbers of the owners that decode."""
    preempted: tuple[int, ...] = ()
    """Owners whose blocks were released since the event before, to be computed again."""
    forks: tuple[tuple[int, int], ...] = ()
    """Pairs of owners, parent and child, that share all blocks from here on."""
    copies: tuple[tuple[int, int], ...] = ()
    """Pairs of blocks, source and target, that were copied before they were written."""

    @property
    def idle(self) -> bool:
        """Whether nothing was dispatched."""
        return not self.prefills and not self.decodes


@dataclass
class EventLog:
    """Bounded log: the newest events, and the state of the blocks before the first of them.

    Args:
        num_blocks: N.
        block_size: P.
        max_steps: number of events to keep.
    """

    num_blocks: int
    block_size: int
    max_steps: int = MAX_STEPS
    started: float = 0.0
    """When the log was begun."""
    owners: dict[int, Owner] = field(default_factory=dict)
    events: deque[Step] = field(default_factory=deque)
    count: int = 0
    """Number of events so far, dropped ones included."""
    num_changes: int = 0

    def __post_init__(self) -> None:
        self.before = np.full(self.num_blocks, FREE, np.int32)
        """Codes of the blocks before the first event that is kept, `[N]`."""
        self.codes = self.before.copy()
        """Current codes, `[N]`."""
        self._named = 0

    def name(self, owner: Owner) -> Owner:
        """Number a new owner."""
        owner.number, self._named = self._named, self._named + 1
        self.owners[owner.number] = owner
        return owner

    def append(self, time: float, codes: np.ndarray, **fields: object) -> Step:
        """Append an event with the codes `[N]` of all blocks; `fields`: the others of `Step`."""
        blocks = np.flatnonzero(codes != self.codes)
        event = Step(self.count, time, np.stack([blocks, codes[blocks]]).astype(np.int32), **fields)
        for number in (*(number for number, _ in event.prefills), *event.decodes, *event.preempted):
            self.owners[number].last_event = event.number
        self.codes, self.count = codes, self.count + 1
        self.events.append(event)
        self.num_changes += len(blocks)
        while len(self.events) > 1 and (len(self.events) > self.max_steps or self.num_changes > MAX_CHANGES):
            self._drop()
        return event

    def _drop(self) -> None:
        """Fold the oldest event into the state before the log; forget owners that no event names any more."""
        dropped = self.events.popleft()
        blocks, codes = dropped.changed
        self.before[blocks] = codes
        self.num_changes -= len(blocks)
        if dropped.number % max(1, self.max_steps // 4) == 0:
            first, shown = self.events[0].number, set(self.before[self.before > FREE].tolist())
            self.owners = {
                number: owner
                for number, owner in self.owners.items()
                if owner.end is None or owner.last_event >= first or number + 1 in shown
            }

    def owners_now(self) -> dict[int, Owner]:
        """Return copies of the owners, by number."""
        return {number: replace(owner) for number, owner in self.owners.items()}
