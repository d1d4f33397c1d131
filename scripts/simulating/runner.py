"""A runner without a device: steps take the time of a model, and sample tokens that mean nothing."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxinfer.engine.plan import Plan
from jaxinfer.engine.runner.flight import Flight, Result
from jaxinfer.engine.runner.launches import Launch
from jaxinfer.engine.runner.row_params import RowParams
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.engine.runner.shapes import Shapes
from jaxinfer.engine.runner.step_sampling import Sampled
from jaxinfer.functional import Program
from simulating.times import StepTimes
from simulating.work import of_launch, windows


class Clock:
    """Simulated time in seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the time, as `time.monotonic` does."""
        return self.now


class InFlight:
    """Tokens of a step that is ready at a time. Reading them waits, i.e. moves the clock there."""

    def __init__(self, tokens: np.ndarray, ready_at: float, clock: Clock):
        self._tokens, self._ready_at, self._clock = tokens, ready_at, clock

    def copy_to_host_async(self) -> None:
        """Do nothing."""

    def is_ready(self) -> bool:
        """Return whether the step has run."""
        return self._ready_at <= self._clock.now

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        """Wait for the step and return its tokens."""
        self._clock.now = max(self._clock.now, self._ready_at)
        return self._tokens


class SimulatedRunner(Runner):
    """Runner that packs plans as the real one and replaces each launch by its time."""

    def __init__(self, program: Program, params: Sequence[Any], shapes: Shapes, times: StepTimes, clock: Clock):
        """Make a runner.

        Args:
            program, params: the model; its parameters may be shapes.
            shapes: sizes of the steps.
            times: how long the device takes.
            clock: the simulated time.
        """
        self._times, self._clock, self._free_at, self._made = times, clock, 0.0, 0
        self._sizes = windows(program.specs)
        self._plan, self._ahead = Plan(), 0
        super().__init__(program, list(params), shapes)

    def reset(self) -> None:
        """Forget the rows' sampling parameters; there are no arrays on a device."""
        self.cache, self.rows, self.features, self.edits = [], None, None, None
        self.row_params = RowParams(self.shapes.rows)

    def dispatch(self, flight: Flight) -> None:
        """Start the steps of a plan one after another, once the device is free."""
        self._plan, self._ahead = flight.plan, 0
        super().dispatch(flight)

    def _run_launch(self, launch: Launch) -> Result | None:
        work = of_launch(launch, self._plan, self._ahead, self._sizes)
        if work is None:
            return None
        self._ahead += work.decode
        self._free_at = max(self._free_at, self._clock.now) + self._times.seconds(work)
        self.places += work.tokens
        self.padding += work.tokens - launch.step.tokens
        self._made += 1
        # Distinct tokens in every step, so that no two generated texts are equal by chance.
        first = self._made * 7919
        tokens = (first + np.arange(launch.key.tokens + launch.key.rows)) % self.shapes.sampled_vocab
        sampled = Sampled(InFlight(tokens, self._free_at, self._clock), None)
        return Result(launch.step.samples, launch.step.indices, sampled, launch.step.first)
