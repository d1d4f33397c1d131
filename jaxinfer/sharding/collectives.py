"""What the modules of a model say of the exchanges between devices that they cause.

A module that causes some has a method `collectives()`, beside the code that causes them; nothing else knows of them.
A module that is not part of every step says so by its attribute `steps`, which holds for all within it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

ALL_REDUCE, ALL_GATHER = "all-reduce", "all-gather"
KINDS = (ALL_REDUCE, ALL_GATHER)

DECODE, PREFILL, ENCODE = "decode", "prefill", "encode"
STEPS = (DECODE, PREFILL)
"""The compiled steps that a module is part of unless it has an attribute `steps`."""

TOKEN, SAMPLE = "token", "sampled sequence"


@dataclass(frozen=True)
class Collective:
    """One exchange that each call of a module makes, in a program for GPUs."""

    kind: str
    """One of `KINDS`, as XLA names it."""
    what: str
    """What is exchanged, in words."""
    width: int
    """Numbers of a row, in each of the arrays, that every device has afterwards."""
    arrays: int = 1
    """Arrays that go together."""
    rows: str = TOKEN
    """What there is a row for: each token of the step, or each sequence that is sampled."""
    itemsize: int | None = None
    """Bytes of a number; None: those of the activations."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a collective's kind is one of {', '.join(KINDS)}, got {self.kind!r}")


@runtime_checkable
class Exchanging(Protocol):
    """A module that causes collectives."""

    def collectives(self) -> Sequence[Collective]:
        """Those of one call, of this module alone and not of its parts; none where it is whole on every device."""
        ...
