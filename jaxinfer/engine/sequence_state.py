"""Scheduling state of a sequence: its row, what of it is in the cache, and what it waits for."""

from dataclasses import dataclass, field
from enum import Enum

from jaxinfer.kv.prefix_match import Hit


class Status(Enum):
    """Scheduling state of a sequence. A preempted sequence is WAITING again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True, kw_only=True)
class SequenceState:
    """What the scheduler knows of one sequence."""

    status: Status = Status.WAITING
    row: int = -1
    """Row in the block tables and in the sampler state while running, else -1."""
    computed: int = 0
    """Number of tokens whose keys and values are in the cache: from dispatched prefills or a prefix hit."""
    prefilled: int = 0
    """Number of tokens to prefill before decoding starts: all tokens known at admission."""
    pending: int = 0
    """Number of tokens sampled by dispatched steps that the host has not read yet."""
    digests: list[bytes] = field(default_factory=list)
    published: int = 0
    """Number of leading blocks in the prefix index."""
    hit_blocks: int = 0
    """Number of leading blocks that were found in the prefix index at admission."""
    num_registered: int = 0
    """Number of leading blocks registered with `InflightPrefixes`, for which other sequences may wait."""
    stale: bool = False
    """While running: whether its cache was computed with weights that have been replaced, so it is never published."""
    draft_from: int = 0
    """With speculative decoding: length in tokens from which on a draft is looked up."""
    draft_size: int = 3
    """Most tokens of the next draft: it grows while drafts are right."""
    empty_lookups: int = 0
    """Number of consecutive look-ups that found no draft."""
    wrong_drafts: int = 0
    """Number of consecutive drafts of which no token was right."""
    bias_version: int | tuple[int, ...] = -1
    """While running: version of the bias row on the device (the temporarily forbidden token ids); -1 if none is
    installed.
    """
    commit_limit: int = 0
    """While running: length in tokens from which on a token needs more than being appended: `stage_limit`, or 0 with a
    listener, log-probabilities, a grammar or beams; 0 after the end.
    """
    awaited_digest: bytes | None = None
    """While waiting: digest of the last prompt block that another sequence is computing."""
    needed_blocks: int = 0
    """While waiting: number of available blocks required, as found by the last failed admission; 0 if blocks were
    not what it failed on.
    """
    first_missing: bytes | None = None
    """Digest of the first prompt block missing from the prefix index at the last failed admission; once it is
    published fewer blocks are needed.
    """
    last_hit: tuple[tuple[int, int], Hit] | None = None
    """While waiting: the last prefix hit, with the version of the prefix index and the length it was found for."""
    checked_inflight: tuple[int, int] | None = None
    """While waiting: version of `InflightPrefixes` and length for which the sequence need not wait for a prefix."""
