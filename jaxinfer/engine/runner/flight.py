"""Flight of a plan: its launches, the programs that they wait for, and the outputs of its steps."""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from jaxinfer.engine.plan import Plan
from jaxinfer.engine.request import Sequence as Sample
from jaxinfer.engine.runner.batch import Bucket
from jaxinfer.engine.runner.keys import Encode, EncodeCross, EncodeJoint, Key
from jaxinfer.engine.runner.launches import Launch, Step, describe
from jaxinfer.engine.runner.logits import SampleLogits
from jaxinfer.engine.runner.programs import CompilationError
from jaxinfer.engine.runner.step_sampling import Sampled


@dataclass(frozen=True)
class Result:
    """Output of a compiled step, still on the device, and the sequences it belongs to."""

    samples: Sequence[Sample]
    indices: np.ndarray
    """Index of each sequence in the step's batch."""
    sampled: Sampled
    first: bool
    """Whether these are the first tokens after a prefill."""
    places: np.ndarray | None = None
    """Decode: index of each sequence's token among those of the step."""
    drafts: Sequence[np.ndarray] | None = None
    """Drafts that the step verified; `samples` then has each sequence once for each token that was sampled."""

    def __post_init__(self) -> None:
        for array in jax.tree.leaves(self.sampled):
            array.copy_to_host_async()

    @property
    def ready(self) -> bool:
        """Whether the step has run."""
        return self.sampled.tokens.is_ready()


Compilations = dict[Key, Future[Any]]
"""Programs that are being compiled."""


def are_done(compilations: Compilations) -> bool:
    """Return whether no program is being compiled any more."""
    return all(future.done() for future in compilations.values())


def check_compiled(compilations: Compilations) -> None:
    """Check that programs have been compiled.

    Raises:
        CompilationError: one could not be.
    """
    for key, future in compilations.items():
        if (error := future.exception()) is not None:
            message = f"{describe(key)} could not be compiled: {type(error).__name__}: {error}"
            raise CompilationError(key, message) from error


@dataclass
class Flight:
    """A packed plan: its launches, and once it is dispatched the outputs of its steps."""

    plan: Plan
    launches: list[Launch]
    compilations: Compilations = field(default_factory=dict)
    """Programs of the launches that were missing when the plan was packed."""
    results: list[Result] = field(default_factory=list)
    pending: Launch | None = None
    """Launch that samples the decode step's tokens, until the tokens that its masks depend on are read."""
    started: float = field(default_factory=time.monotonic)
    """Time of the first dispatch."""

    @property
    def compiled(self) -> bool:
        """Whether no program is being compiled any more."""
        return are_done(self.compilations)

    def needing(self, key: Key) -> Plan:
        """Return the part of the plan that a program is for: its prefill, its decodes, or both."""
        prefills = {launch.step.first for launch in self.launches if launch.key == key and launch.step is not None}
        if isinstance(key, (Bucket, SampleLogits)) and prefills == {False}:
            return replace(self.plan, chunks=[], samples=[])
        own = isinstance(key, (Bucket, SampleLogits)) and prefills == {True}
        own = own or isinstance(key, (Encode, EncodeJoint, EncodeCross))
        return replace(self.plan, decodes=[]) if own else self.plan


def of_decodes(result: Result, step: Step) -> Result:
    """Return the part of a mixed step's output that belongs to its decodes."""
    captured = {name: result.sampled.captured[name] for name in step.capture}
    sampled = result.sampled._replace(prompt_logprobs=None, captured=captured)
    return Result(step.samples, step.indices, sampled, first=False, places=step.places)
