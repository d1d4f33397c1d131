"""Results of `placement.py --tune`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.steptime import Step

from jaxinfer.sharding import Plan
from jaxinfer.sharding.policy import REPLICATE


@dataclass(frozen=True)
class Kind:
    """Modules whose names differ only in the layer index."""

    pattern: str
    """Pattern that matches all of them."""
    steps: tuple[str, ...]
    """Steps that run them."""
    count: int
    """Number of these modules in the whole model."""
    measured: int
    """Number of these modules in the measured model."""
    sharded_bytes: int
    """Bytes per device of all of them when sharded."""
    replicated_bytes: int
    """Bytes per device of all of them when replicated."""


@dataclass(frozen=True)
class Timing:
    """Duration of a step of the whole model, extrapolated from the measured layers."""

    step: Step
    seconds: float
    """Seconds with every module sharded."""
    saved: Mapping[str, float]
    """Seconds saved by replicating each kind, negative for a cost; 0 if the passes disagree."""

    def ratio(self, patterns: Sequence[str]) -> float:
        """Return the step's duration with these kinds replicated, relative to all sharded."""
        return max(0.0, 1 - sum(self.saved.get(pattern, 0.0) for pattern in patterns) / self.seconds)


@dataclass(frozen=True)
class Tuned:
    """Measurements and the proposed placement."""

    devices: int
    kinds: tuple[Kind, ...]
    timings: tuple[Timing, ...]
    proposal: tuple[str, ...]
    """Patterns of the modules to replicate."""
    plan: Plan
    """Plan with these modules replicated."""
    fits: bool
    """Whether the proposal fits in the requested memory; False if no placement does."""
    needed_tokens: int
    """Tokens that the cache must hold: the most rows of a decode step, each at its context length."""
    confirmed: Mapping[str, float]
    """Final measurement of the proposal in the shortened model: duration relative to all sharded, for each step."""

    @property
    def flags(self) -> str:
        """Command-line flags of the proposal; empty if nothing is replicated."""
        return "" if not self.proposal else " ".join(["--placement", *(f"'{p}={REPLICATE}'" for p in self.proposal)])

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON data; times in seconds."""
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
