"""Run engines on random models, and time their steps."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from statistics import mean, median
from typing import Any

import jax
import numpy as np

from benchmarks.gpu import models
from jaxinfer import EngineConfig, SamplingParams
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.request import Request
from jaxinfer.engine.sizing.setup import build_engine
from jaxinfer.inputs.defaults import ModelLimits, resolve
from jaxinfer.models.base import LanguageModel
from jaxinfer.sharding import make_mesh

SETTLING = 4
"""Maximum repetitions of a pass in which something was compiled."""


@dataclass(frozen=True)
class Subject:
    """Random model with an engine."""

    module: LanguageModel
    engine: Engine
    init_seconds: float
    """Seconds to initialise the weights, including compilation."""

    @property
    def compile_seconds(self) -> dict[str, float]:
        """Seconds of the first call of each step, which traces and compiles it."""
        return {str(bucket): seconds for bucket, seconds in self.engine.runner.compile_seconds.items()}

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values of one position."""
        program = self.engine.runner.program
        return models.token_bytes(self.module, program.mesh, program.dtype)


def build(hf: dict[str, Any], **settings: Any) -> Subject:
    """Make a model with random weights, and an engine with these `EngineConfig` settings."""
    start = time.perf_counter()
    module = models.random(hf, make_mesh())
    jax.block_until_ready([array for _, array in models.arrays(module)])
    seconds = time.perf_counter() - start
    return Subject(module, engine_of(module, **settings), seconds)


def engine_of(module: LanguageModel, **settings: Any) -> Engine:
    """Make an engine for a model with loaded weights."""
    # No prefix caching, since cached prompts would seem free; and one device step per engine step.
    config = EngineConfig.of({"enable_prefix_caching": False, "decode_steps": 1} | settings)
    return build_engine(module, config, make_mesh())


@dataclass(frozen=True)
class Decoded:
    """Result of a run of decode steps."""

    seconds: float
    """Seconds per step."""
    positions: float
    """Mean number of positions of a sequence, including its new token."""


def decode(engine: Engine, *, rows: int, prompt: int, steps: int) -> Decoded:
    """Measure a decode step of `rows` sequences, over `steps` steps after a prompt of `prompt` tokens.

    Includes the engine's scheduling, packing and reading of tokens, as far as they do not overlap with device time.
    """

    def once() -> Decoded:
        start_decode(engine, rows=rows, prompt=prompt, steps=steps)
        # Positions known or in flight when the first step is dispatched; each step adds one.
        first = _positions(engine)
        seconds = run_steps(engine, steps) / steps
        if _positions(engine) != first + steps:
            raise RuntimeError(f"{steps} steps took sequences from {first} to {_positions(engine)} positions")
        drain(engine)
        return Decoded(seconds, first + (steps - 1) / 2)

    return settled(engine, once)


def _positions(engine: Engine) -> float:
    """Return the mean number of positions of a sequence, including tokens in flight."""
    return mean(s.length + s.pending for request in engine.requests.values() for s in request.sequences)


WARM = 2
"""Warm-up decode steps."""


def start_decode(engine: Engine, *, rows: int, prompt: int, steps: int) -> None:
    """Add requests with capacity for `steps` more decode steps, and run until all of them have decoded `WARM` steps."""
    add(engine, rows=rows, prompt=prompt, new=1 + WARM + steps + 4)
    target = engine.metrics.counters["generation_tokens"] + rows * (1 + WARM)
    while engine.metrics.counters["generation_tokens"] < target:
        if not engine.has_work:
            raise RuntimeError("requests ended before they had decoded; the log says why")
        engine.step()


def run_steps(engine: Engine, steps: int) -> float:
    """Return the seconds of `steps` engine steps, until the device has finished them."""
    jax.block_until_ready(engine.runner.rows.tokens)
    start = time.perf_counter()
    for _ in range(steps):
        engine.step()
    jax.block_until_ready(engine.runner.rows.tokens)
    return time.perf_counter() - start


def drain(engine: Engine) -> None:
    """Finish all requests."""
    for request in list(engine.requests):
        engine.abort(request)
    engine.settle()


def prefill(engine: Engine, *, tokens: int, repeats: int = 5) -> float:
    """Return the seconds from a prompt's arrival to its first token: the median over `repeats` prompts."""

    def once() -> float:
        start = time.perf_counter()
        add(engine, rows=1, prompt=tokens, new=1)
        while engine.has_work:
            engine.step()
        return time.perf_counter() - start

    settled(engine, once)
    return median(once() for _ in range(repeats))


def settled(engine: Engine, once: Callable[[], Any]) -> Any:
    """Run passes until one in which nothing was compiled; return its result."""
    once()
    for _ in range(SETTLING):
        before = len(engine.runner.compile_seconds)
        result = once()
        if len(engine.runner.compile_seconds) == before:
            return result
    raise RuntimeError(f"{SETTLING} passes over the same work each compiled a new step; there is no settled figure")


_number = count()


def add(engine: Engine, *, rows: int, prompt: int, new: int) -> None:
    """Queue `rows` greedy requests of random tokens that run to their maximum length."""
    limits = ModelLimits(engine.runner.program.vocab, engine.runner.shapes.max_length)
    params = resolve(SamplingParams(temperature=0, max_tokens=new, ignore_eos=True), limits, prompt_len=prompt)
    for _ in range(rows):
        number = next(_number)
        ids = np.random.default_rng(number).integers(3, limits.vocab_size, prompt).astype(np.int32)
        engine.add(Request(str(number), ids, params, prompt + new))
