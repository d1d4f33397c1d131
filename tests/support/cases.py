"""Requests that the equivalence tests run in different ways, and what they give when each runs alone."""

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
"""Tokens a request makes: more than two blocks, so that decoding crosses block ends."""

GREEDY = SamplingParams(temperature=0, max_tokens=MADE)
SEEDED = SamplingParams(temperature=0.1, seed=13, max_tokens=MADE)
"""Cold, as the tiny models' logits lie close together: at 1 the noise alone would decide, whatever was computed."""

EDGES = sorted({length + d for length in (BLOCK, 2 * BLOCK, CHUNK, 2 * CHUNK) for d in (-1, 0, 1)} | {1})
"""Prompt lengths at and beside the ends of blocks and chunks."""


def requests(lengths: Sequence[int], params: SamplingParams, *, first_seed: int = 0, **fields: Any) -> list[Request]:
    """One request a length, each with its own prompt; the same arguments give the same requests."""
    return [
        make_request(f"{first_seed + i}", prompt(length, first_seed + i), params, **fields)
        for i, length in enumerate(lengths)
    ]


def mixed(lengths: Sequence[int]) -> list[Request]:
    """Greedy and seeded requests in turn: one step of them runs at the higher sampler level."""
    return [make_request(str(i), prompt(length, i), (GREEDY, SEEDED)[i % 2]) for i, length in enumerate(lengths)]


def alone(runner: Runner, wanted: Sequence[Request]) -> list[list[list[int]]]:
    """Every request in an engine of its own, nothing shared, nothing cached, nothing preempted."""
    return [_alone(runner, r.id, tuple(r.prompt.tolist()), r.params, r.seed) for r in wanted]


@cache
def _alone(runner: Runner, name: str, ids: tuple[int, ...], params: SamplingParams, seed: int) -> list[list[int]]:
    state = runner.cache, runner.rows, runner.edits, runner.asked  # of the engine that is being tested
    request = make_request(name, ids, params, seed=seed)
    [made] = run(make_engine(runner, prefix_caching=False, block_sharing=False), [request])
    assert all(s.finish_reason != "error" for s in request.sequences)
    runner.cache, runner.rows, runner.edits, runner.asked = state
    return made


def poison(runner: Runner) -> None:
    """NaN in every place of the cache; only what is written afterwards is a number."""
    runner.cache = jax.tree.map(lambda a: jax.device_put(np.full(a.shape, np.nan, a.dtype), a.sharding), runner.cache)
