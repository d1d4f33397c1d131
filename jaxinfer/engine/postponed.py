"""Prefills that wait for their programs to be compiled, while sequences that decode go on."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from jaxinfer.engine.request import Sequence
from jaxinfer.engine.sequence_state import Status


@dataclass(eq=False)
class Postponed:
    """Sequences whose prefill was taken back, as its programs are not compiled yet."""

    sequences: set[Sequence]
    tokens: int
    """Number of tokens of the prefill, and the limit when it is planned again: more might need another program."""
    compilations: Mapping[Any, Future[Any]]
    """The programs."""
    ready: bool = False
    """Whether all programs are compiled or have failed to, so that the sequences may be planned again."""


class PostponedPrefills:
    """The postponed prefills in their order; their sequences are in the waiting queue."""

    def __init__(self) -> None:
        self._prefills: list[Postponed] = []

    def __len__(self) -> int:
        return len(self._prefills)

    def __iter__(self) -> Iterator[Postponed]:
        return iter(self._prefills)

    def __contains__(self, sequence: Sequence) -> bool:
        return any(sequence in one.sequences for one in self._prefills)

    def add(self, prefill: Postponed) -> None:
        """Append a prefill."""
        self._prefills.append(prefill)

    def take(self, *, decoding: bool) -> Postponed | None:
        """Remove and return the first prefill that need not wait any longer, or None.

        If nothing decodes, there is nothing to postpone a prefill for. Sequences that do not wait any more are
        forgotten.
        """
        for one in self._prefills:
            one.sequences = {s for s in one.sequences if s.status is Status.WAITING}
        self._prefills = [one for one in self._prefills if one.sequences]
        chosen = next((one for one in self._prefills if one.ready or not decoding), None)
        if chosen is not None:
            self._prefills.remove(chosen)
        return chosen
