"""Collectives that the modules of a model declare.

A module that causes collectives declares them in a method `collectives()`, next to the code that causes them. A module
that does not run in every step lists its steps in the attribute `steps`, which also applies to its submodules.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

ALL_REDUCE, ALL_GATHER = "all-reduce", "all-gather"
KINDS = (ALL_REDUCE, ALL_GATHER)

DECODE, PREFILL, ENCODE = "decode", "prefill", "encode"
STEPS = (DECODE, PREFILL)
"""Compiled steps that run a module unless it has an attribute `steps`."""

TOKEN, SAMPLE = "token", "sampled sequence"


@dataclass(frozen=True)
class Collective:
    """One collective operation of each call of a module, as compiled for GPUs."""

    kind: str
    """One of `KINDS`, XLA's name of the operation."""
    what: str
    """Description of the data."""
    width: int
    """Elements per row, and per array, of the result on every device."""
    arrays: int = 1
    """Arrays combined in the operation."""
    rows: str = TOKEN
    """Unit of the rows: tokens of the step, or sampled sequences."""
    itemsize: int | None = None
    """Bytes per element; None for the activations' dtype."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")


@runtime_checkable
class Exchanging(Protocol):
    """A module that causes collectives."""

    def collectives(self) -> Sequence[Collective]:
        """Return the collectives of one call, without those of submodules; empty if the module is replicated."""
        ...
