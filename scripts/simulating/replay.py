"""Replay a trace through an engine, in simulated or in real time, and compute the figures of a serving benchmark."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np

from jaxinfer.commands.bench.client import Answer
from jaxinfer.commands.bench.serving import figures
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.request import Request
from jaxinfer.errors import CapacityError
from jaxinfer.inputs.defaults import ModelLimits, resolve
from jaxinfer.sampling_params import SamplingParams
from simulating.runner import Clock
from simulating.trace import Arrival
from simulating.work import Work, of_launch, windows

SHOWN = (50, 90, 99)
"""Percentiles of the latencies."""
IDLE = 1e-4
"""Seconds between two looks at an empty queue in real time."""


@dataclass
class Outcome:
    """What became of the requests of a trace, and the state of the engine while they ran."""

    answers: list[Answer] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    """Why requests could never run."""
    seconds: float = 0.0
    steps: int = 0
    cached: int = 0
    """Prompt tokens that were found in the prefix cache."""
    preemptions: int = 0
    most_waiting: int = 0
    most_running: int = 0
    busiest: float = 0.0
    """Largest fraction of the cache's blocks in use."""
    padding: float = 0.0
    """Fraction of the computed tokens that were padding."""

    def figures(self) -> dict[str, Any]:
        """Return throughput and latencies, named as those of `jaxinfer bench serve`, and what the engine did."""
        found = figures(self.answers, self.seconds, SHOWN)
        prompts = sum(answer.prompt_tokens for answer in self.answers)
        return found | {
            "refused": len(self.refused),
            "steps": self.steps,
            "prefix_cache_hit_rate": self.cached / max(1, prompts),
            "preemptions": self.preemptions,
            "max_waiting": self.most_waiting,
            "max_running": self.most_running,
            "max_kv_cache_usage": self.busiest,
            "padding": self.padding,
        }


def replay(
    engine: Engine,
    arrivals: Sequence[Arrival],
    clock: Callable[[], float],
    wait_until: Callable[[float], None],
    stepped: Callable[[Engine], None] = lambda engine: None,
) -> Outcome:
    """Queue each request when it arrives, and step the engine until all have ended.

    Args:
        engine: the engine; nothing else may use it.
        arrivals: the trace, in order.
        clock: seconds, as the engine sees them.
        wait_until: called with a time when nothing runs until the next arrival.
        stepped: called after each step.
    """
    found, left, running, start = Outcome(), deque(enumerate(arrivals)), {}, clock()
    shapes = engine.runner.shapes
    limits = ModelLimits(shapes.sampled_vocab, shapes.max_length)
    places, padding = engine.runner.places, engine.runner.padding
    preempted = engine.scheduler.preempted
    while left or engine.has_work:
        while left and start + left[0][1].at <= clock():
            index, one = left.popleft()
            answer = Answer(prompt_tokens=one.prompt, new_tokens=one.output)
            try:
                request = _request(index, one, limits)
                engine.add(request)
            except (CapacityError, ValueError) as error:
                found.refused.append(f"request {index}: {error}")
                continue
            running[request.id] = _Running(request, answer, start + one.at)
            found.answers.append(answer)
        if not engine.has_work:
            if left:
                wait_until(start + left[0][1].at)
            continue
        engine.step()
        found.steps += 1
        stepped(engine)
        now = clock()
        for key in [key for key, each in running.items() if each.ended(now)]:
            found.cached += running.pop(key).request.cached_tokens
        found.most_waiting = max(found.most_waiting, len(engine.scheduler.waiting))
        found.most_running = max(found.most_running, engine.scheduler.rows.num_used)
        found.busiest = max(found.busiest, engine.manager.usage)
    found.seconds = clock() - start
    found.preemptions = engine.scheduler.preempted - preempted
    computed = engine.runner.places - places
    found.padding = (engine.runner.padding - padding) / max(1, computed)
    return found


@dataclass
class _Running:
    """A request in the engine, and when its tokens came."""

    request: Request
    answer: Answer
    arrived: float
    seen: int = 0
    last: float = 0.0

    def ended(self, now: float) -> bool:
        """Note the tokens that have come by now; return whether the request has ended."""
        made = self.request.sequences[0].made
        if made > self.seen:
            if self.seen:
                self.answer.gaps.append(now - self.last)
            else:
                self.answer.first = now - self.arrived
            self.seen, self.last = made, now
            self.answer.seconds = now - self.arrived
        if self.request.error is not None:
            self.answer.error = self.request.error
        self.answer.new_tokens = made
        return self.request.finished


def _request(index: int, one: Arrival, limits: ModelLimits) -> Request:
    if one.prompt >= limits.max_model_len:
        raise ValueError(f"its prompt has {one.prompt} tokens, and max_model_len is {limits.max_model_len}; raise it")
    params = SamplingParams(temperature=0, max_tokens=one.output, ignore_eos=True)
    own, prompt = resolve(params, limits, prompt_len=one.prompt), one.tokens(index, limits.vocab_size)
    return Request(id=str(index), prompt=prompt, params=own, limit=one.prompt + own.max_tokens)


def simulated(engine: Engine, arrivals: Sequence[Arrival], clock: Clock) -> Outcome:
    """Replay a trace in simulated time; the engine's own clock shows it as well."""

    def wait_until(at: float) -> None:
        clock.now = max(clock.now, at)

    with mock.patch.object(time, "monotonic", clock):
        return replay(engine, arrivals, clock, wait_until)


def real(engine: Engine, arrivals: Sequence[Arrival], stepped: Callable[[Engine], None] = lambda _: None) -> Outcome:
    """Replay a trace in real time. The engine must have all programs: a step would wait for one that is missing."""
    engine.compile_aside(None)
    return replay(engine, arrivals, time.monotonic, lambda at: time.sleep(max(0.0, at - time.monotonic())), stepped)


class Stopwatch:
    """Measures the time of each step of a real engine, from when the device can begin until the tokens are read."""

    def __init__(self, engine: Engine):
        self._sizes = windows(engine.runner.program.specs)
        self._flight, self._read_at = engine.pipeline.flight, time.monotonic()
        self.works: list[list[Work]] = []
        self.seconds: list[float] = []

    def __call__(self, engine: Engine) -> None:
        """Record the step whose tokens have just been read."""
        now, flight, self._flight = time.monotonic(), self._flight, engine.pipeline.flight
        if flight is not None and flight is not self._flight:
            self.works.append(_works(flight, self._sizes))
            self.seconds.append(now - max(flight.started, self._read_at))
        self._read_at = now


def _works(flight: Any, sizes: Sequence[int | None]) -> list[Work]:
    ahead, found = 0, []
    for launch in flight.launches:
        work = of_launch(launch, flight.plan, ahead, sizes)
        if work is not None:
            found.append(work)
            ahead += work.decode
    return found


def calibration(rows: int, length: int, tokens: int, seed: int = 0) -> list[list[Arrival]]:
    """Return batches to run one after another, with steps of all sizes: from one request to `rows`, of many lengths.

    Args:
        rows: sequences that run at a time.
        length: maximum length of a sequence.
        tokens: prompt tokens that a step computes.
        seed: of the lengths.
    """
    rng, batches = np.random.default_rng(seed), []
    longest = max(1, min(length * 3 // 4, 4 * tokens))
    for size in sorted({1, 2, 3, rows // 4, rows // 2, rows * 3 // 4, rows} - {0}):
        prompts = np.exp(rng.uniform(0, np.log(longest), size)).astype(int).tolist()
        prompts[0] = longest
        batches.append([Arrival(0.0, prompt, int(min(48, length - prompt))) for prompt in prompts])
    return batches
