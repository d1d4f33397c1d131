"""Requests of the equivalence tests, and their tokens when each request runs alone."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import numpy as np

from jaxinfer.engine.request import Request
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.sampling_params import SamplingParams
from support.tiny import BLOCK, CHUNK, make_engine, make_request, prompt, run

MADE = 10
"""Tokens generated per request: more than two blocks, so that decoding crosses block boundaries."""

GREEDY = SamplingParams(temperature=0, max_tokens=MADE)
SEEDED = SamplingParams(temperature=0.1, seed=13, max_tokens=MADE)
"""Seeded sampling at a low temperature: the logits of tiny models are close together, so that at temperature 1 the
sampling noise alone would decide and hide wrong logits."""

EDGES = sorted({length + d for length in (BLOCK, 2 * BLOCK, CHUNK, 2 * CHUNK) for d in (-1, 0, 1)} | {1})
"""Prompt lengths at and next to block and chunk boundaries."""


def requests(lengths: Sequence[int], params: SamplingParams, *, first_seed: int = 0, **fields: Any) -> list[Request]:
    """Make one request per length, each with its own prompt; the same arguments give the same requests."""
    return [
        make_request(f"{first_seed + i}", prompt(length, first_seed + i), params, **fields)
        for i, length in enumerate(lengths)
    ]


def mixed(lengths: Sequence[int]) -> list[Request]:
    """Make greedy and seeded requests in turn, so that a common step runs at the higher sampler level."""
    return [make_request(str(i), prompt(length, i), (GREEDY, SEEDED)[i % 2]) for i, length in enumerate(lengths)]


def alone(runner: Runner, wanted: Sequence[Request]) -> list[list[list[int]]]:
    """Run each request in its own engine, without batching, prefix-cache hits or preemption."""
    return [_alone(runner, r.id, tuple(r.prompt.tolist()), r.params, r.seed) for r in wanted]


@cache
def _alone(runner: Runner, name: str, ids: tuple[int, ...], params: SamplingParams, seed: int) -> list[list[int]]:
    state = runner.cache, runner.rows, runner.edits, runner.row_params  # save the state of the engine under test
    request = make_request(name, ids, params, seed=seed)
    [made] = run(make_engine(runner, prefix_caching=False, block_sharing=False), [request])
    assert all(s.finish_reason != "error" for s in request.sequences)
    runner.cache, runner.rows, runner.edits, runner.row_params = state
    return made


def poison(runner: Runner) -> None:
    """Fill the cache with NaN, so that a read of an unwritten slot shows."""
    runner.cache = jax.tree.map(lambda a: jax.device_put(np.full(a.shape, np.nan, a.dtype), a.sharding), runner.cache)
