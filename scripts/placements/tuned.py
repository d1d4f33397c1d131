"""What `placement.py --tune` finds, as a value."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.steptime import Step

from jaxinfer.sharding import Plan
from jaxinfer.sharding.policy import REPLICATE


@dataclass(frozen=True)
class Kind:
    """Modules that differ in the number of their layer alone."""

    pattern: str
    """Which names them all."""
    steps: tuple[str, ...]
    """The steps they are part of."""
    count: int
    """In the whole model."""
    measured: int
    """In the one measured."""
    sharded_bytes: int
    """On each device, of all of them, where they are divided."""
    replicated_bytes: int
    """And where they are not."""


@dataclass(frozen=True)
class Timing:
    """A step of the whole model, as far as the few layers tell."""

    step: Step
    seconds: float
    """With every module sharded."""
    saved: Mapping[str, float]
    """Seconds that replicating all of a kind saves, negative where it costs; 0 where the passes do not agree."""

    def ratio(self, patterns: Sequence[str]) -> float:
        """How long the step takes with these replicated, of the time it takes with none."""
        return max(0.0, 1 - sum(self.saved.get(pattern, 0.0) for pattern in patterns) / self.seconds)


@dataclass(frozen=True)
class Tuned:
    """What was measured, and what follows."""

    devices: int
    kinds: tuple[Kind, ...]
    timings: tuple[Timing, ...]
    proposal: tuple[str, ...]
    """Patterns to replicate."""
    plan: Plan
    """With them replicated."""
    fits: bool
    """Whether it, or any, fits in the memory asked for."""
    needed_tokens: int
    """That the cache must hold: the most rows of a decode step at their context."""
    confirmed: Mapping[str, float]
    """The proposal measured at last, in the model of few layers: its time of that of all sharded, for each step."""

    @property
    def flags(self) -> str:
        """For `--placement`, or empty."""
        return "" if not self.proposal else " ".join(["--placement", *(f"'{p}={REPLICATE}'" for p in self.proposal)])

    def as_dict(self) -> dict[str, Any]:
        """For JSON; times in seconds."""
        return {
            "devices": self.devices,
            "kinds": [vars(kind) for kind in self.kinds],
            "steps": [
                {
                    "step": str(t.step),
                    "seconds": t.seconds,
                    "saved": dict(t.saved),
                    "predicted": t.ratio(self.proposal),
                    "confirmed": self.confirmed.get(str(t.step)),
                }
                for t in self.timings
            ],
            "placement": dict.fromkeys(self.proposal, REPLICATE),
            "fits": self.fits,
            "flags": self.flags,
            "device_bytes": self.plan.device_bytes,
            "needed_tokens": self.needed_tokens,
            "tokens": self.plan.tokens,
        }
