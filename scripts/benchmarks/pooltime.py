"""Measure the block pool by its size, and what a blocked prompt at the head of the queue costs a step."""

import time
from statistics import median

import numpy as np

from jaxinfer import SamplingParams
from jaxinfer.engine.plan import Limits
from jaxinfer.engine.request import Request
from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.engine.sequence_state import Status
from jaxinfer.kv import pool as pools
from jaxinfer.kv import pool_check
from jaxinfer.kv.manager import BlockManager

BLOCK, IDS, VOCAB = 16, 16, 97
POOLS = (10_000, 1_000_000, 4_000_000)
"""Blocks of the measured pools."""
REPEATS = 2000
CACHED_PROMPT = 131_056
"""Tokens of the blocked prompt."""


def pool_times(blocks: int, repeats: int = REPEATS) -> dict[str, float]:
    """Measure microseconds to allocate, share and release 16 block ids, in a pool with held, cached and free blocks.

    `admit_cached` is a transaction that shares 16 cached blocks and allocates 16, and the release of both.
    """
    pool, held, _, _ = pools.allocate(pools.BlockPool.create(blocks), blocks // 2)
    cached = held[: blocks // 4]
    pool = pools.release(pools.publish(pool, cached), cached)
    hit, plain, admitted = cached[:IDS], [], []
    for _ in range(repeats):
        started = time.perf_counter()
        pool, ids, _, _ = pools.allocate(pool, IDS)
        pool = pools.release(pools.share(pool, ids), ids)
        plain.append(time.perf_counter() - started)
        pool = pools.release(pool, ids)
        started = time.perf_counter()
        pool, ids, _, _ = pools.allocate(pools.share(pools.begin(pool), hit), IDS)
        pool = pools.release(pools.release(pools.commit(pool), ids), hit)
        admitted.append(time.perf_counter() - started)
    pool_check.check(pool, [held[blocks // 4 :]])
    return {"allocate_share_release_us": 1e6 * median(plain), "admit_cached_us": 1e6 * median(admitted)}


class Steps:
    """A scheduler whose steps are committed at once with made-up tokens, without an engine or a device."""

    def __init__(self, blocks: int, rows: int, budget: int, longest: int):
        self.manager = BlockManager(blocks, rows, longest // BLOCK, BLOCK)
        self.scheduler = Scheduler(self.manager, Limits(budget, rows))

    def add(self, prompt: np.ndarray, new: int) -> Request:
        """Queue a prompt."""
        request = Request("", prompt, SamplingParams(max_tokens=new, ignore_eos=True), len(prompt) + new)
        self.scheduler.add(request)
        return request

    def step(self) -> float:
        """Run a step; return the seconds that scheduling took."""
        started = time.perf_counter()
        plan = self.scheduler.schedule()
        seconds = time.perf_counter() - started
        for sequence in [chunk.sequence for chunk in plan.chunks]:
            self.scheduler.publisher.publish(sequence)
        for sequence in [*(sequence for _, sequence in plan.samples), *plan.decodes]:
            sequence.pending -= 1
            reason = sequence.add(sequence.length % VOCAB)
            if reason is None:
                self.scheduler.publisher.publish(sequence)
            else:
                self.scheduler.finish(sequence, reason)
        return seconds


def blocked_head(rows: int, tokens: int = CACHED_PROMPT, steps: int = 100) -> dict[str, float]:
    """Measure the milliseconds of scheduling a decode step of `rows` sequences, without and with a cached prompt of
    `tokens` tokens at the head of the queue that the pool has no room for.

    Raises:
        RuntimeError: the prompt was admitted, so that what was measured is not a blocked prompt.
    """
    rng, new = np.random.default_rng(0), 2 * steps + 8
    short, longest = 2 * BLOCK, tokens + 2 * BLOCK
    # Room for the prompt alone, or for the rows to the end, if the prompt's blocks are evicted one by one.
    own = rows * -(-(short + new) // BLOCK)
    run = Steps(longest // BLOCK + own, rows + 1, max(2048, 2 * rows), longest)
    prompt = rng.integers(3, VOCAB, tokens).astype(np.int32)
    first = run.add(prompt, 1)
    while not first.finished:
        run.step()
    for _ in range(rows):
        run.add(rng.integers(3, VOCAB, short).astype(np.int32), new)
    while int(run.scheduler.rows.decoding.sum()) < rows:
        run.step()
    # One block more than there are: what is free goes to the rows, and the rest of the prompt is cached.
    extra = BLOCK * (run.manager.pool.num_available - len(prompt) // BLOCK + 1)
    alone = median(run.step() for _ in range(steps))
    blocked = run.add(np.concatenate([prompt, rng.integers(3, VOCAB, extra).astype(np.int32)]), 1)
    first_look = run.step()
    waiting = median(run.step() for _ in range(steps))
    if blocked.sequences[0].status is not Status.WAITING or blocked.cached_tokens:
        raise RuntimeError("the prompt that should be blocked was admitted: raise its length or lower the steps")
    return {
        "schedule_ms": 1e3 * alone,
        "blocked_head_first_ms": 1e3 * first_look,
        "blocked_head_adds_ms": 1e3 * (waiting - alone),
    }
