"""Engines over random models, and the time of their steps."""

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
"""How often a pass that compiled something is done again."""


@dataclass(frozen=True)
class Subject:
    """A random model and an engine over it."""

    module: LanguageModel
    engine: Engine
    init_seconds: float
    """How long the weights took, compilation of their makers included."""

    @property
    def compile_seconds(self) -> dict[str, float]:
        """Of each step met so far: its first call, which traces and compiles it."""
        return {str(bucket): seconds for bucket, seconds in self.engine.runner.compile_seconds.items()}

    @property
    def token_bytes(self) -> int:
        """Of keys and values of one position."""
        program = self.engine.runner.program
        return models.token_bytes(self.module, program.mesh, program.dtype)


def build(hf: dict[str, Any], **settings: Any) -> Subject:
    """The model with random weights and an engine with these settings of `EngineConfig`."""
    start = time.perf_counter()
    module = models.random(hf, make_mesh())
    jax.block_until_ready([array for _, array in models.arrays(module)])
    seconds = time.perf_counter() - start
    return Subject(module, engine_of(module, **settings), seconds)


def engine_of(module: LanguageModel, **settings: Any) -> Engine:
    """An engine over a model whose weights are in place."""
    # Every prompt is computed, as a cached one would look free; and a step of the engine is one of the device.
    config = EngineConfig.of({"enable_prefix_caching": False, "decode_steps": 1} | settings)
    return build_engine(module, config, make_mesh())


@dataclass(frozen=True)
class Decoded:
    """What a run of decode steps took."""

    seconds: float
    """A step."""
    positions: float
    """Positions that a sequence had on average, its new token included."""


def decode(engine: Engine, *, rows: int, prompt: int, steps: int) -> Decoded:
    """Seconds of a decode step of `rows` sequences, over `steps` steps after a prompt of `prompt` tokens.

    The engine as it is: scheduling, packing and reading the tokens are part of it, as far as the device does not
    hide them.
    """

    def once() -> Decoded:
        start_decode(engine, rows=rows, prompt=prompt, steps=steps)
        # What is known or on its way when the first of the steps is dispatched; each step adds one.
        first = _positions(engine)
        seconds = run_steps(engine, steps) / steps
        if _positions(engine) != first + steps:
            raise RuntimeError(f"{steps} steps took sequences from {first} to {_positions(engine)} positions")
        drain(engine)
        return Decoded(seconds, first + (steps - 1) / 2)

    return settled(engine, once)


def _positions(engine: Engine) -> float:
    """Of a sequence on average, with the tokens that are on their way."""
    return mean(s.length + s.pending for request in engine.requests.values() for s in request.sequences)


WARM = 2
"""Decode steps that do not count."""


def start_decode(engine: Engine, *, rows: int, prompt: int, steps: int) -> None:
    """Requests with room for `steps` decode steps more, brought to where all of them have decoded `WARM` steps."""
    add(engine, rows=rows, prompt=prompt, new=1 + WARM + steps + 4)
    target = engine.metrics.counters["generation_tokens"] + rows * (1 + WARM)
    while engine.metrics.counters["generation_tokens"] < target:
        if not engine.has_work:
            raise RuntimeError("requests ended before they had decoded; the log says why")
        engine.step()


def run_steps(engine: Engine, steps: int) -> float:
    """Seconds that `steps` steps of the engine take, until the device has done them."""
    jax.block_until_ready(engine.runner.rows.tokens)
    start = time.perf_counter()
    for _ in range(steps):
        engine.step()
    jax.block_until_ready(engine.runner.rows.tokens)
    return time.perf_counter() - start


def drain(engine: Engine) -> None:
    """Ends all requests."""
    for request in list(engine.requests):
        engine.abort(request)
    engine.settle()


def prefill(engine: Engine, *, tokens: int, repeats: int = 5) -> float:
    """Seconds from a prompt's arrival to its first token: the median over `repeats` prompts."""

    def once() -> float:
        start = time.perf_counter()
        add(engine, rows=1, prompt=tokens, new=1)
        while engine.has_work:
            engine.step()
        return time.perf_counter() - start

    settled(engine, once)
    return median(once() for _ in range(repeats))


def settled(engine: Engine, once: Callable[[], Any]) -> Any:
    """The result of a pass in which nothing was compiled."""
    once()
    for _ in range(SETTLING):
        before = len(engine.runner.compile_seconds)
        result = once()
        if len(engine.runner.compile_seconds) == before:
            return result
    raise RuntimeError(f"{SETTLING} passes over the same work each compiled a new step; there is no settled figure")


_number = count()


def add(engine: Engine, *, rows: int, prompt: int, new: int) -> None:
    """Queues `rows` greedy requests of random tokens that run to their length."""
    limits = ModelLimits(engine.runner.program.vocab, engine.runner.shapes.max_length)
    params = resolve(SamplingParams(temperature=0, max_tokens=new, ignore_eos=True), limits, prompt_len=prompt)
    for _ in range(rows):
        number = next(_number)
        ids = np.random.default_rng(number).integers(3, limits.vocab_size, prompt).astype(np.int32)
        engine.add(Request(str(number), ids, params, prompt + new))
