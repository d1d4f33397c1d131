"""First-come, first-served queue of waiting sequences."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import islice

from jaxinfer.engine.request import Sequence


class Waiting:
    """Ordered queue of waiting sequences with O(1) operations, independent of its length."""

    def __init__(self) -> None:
        self._sequences: OrderedDict[Sequence, None] = OrderedDict()
        self.last_arrival: int | None = None
        """While draining: number of the last request to start (`Request.arrival`); None if all may start."""

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def head(self, most: int) -> list[Sequence]:
        """Return those of the first `most` sequences that may start."""
        head, last = list(islice(self._sequences, most)), self.last_arrival
        return head if last is None else [sequence for sequence in head if sequence.request.arrival <= last]

    def extend(self, sequences: Iterable[Sequence]) -> None:
        """Append sequences at the end."""
        for sequence in sequences:
            self._sequences[sequence] = None

    def push(self, sequence: Sequence) -> None:
        """Insert a sequence at the head."""
        self._sequences[sequence] = None
        self._sequences.move_to_end(sequence, last=False)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence from any place in the queue.

        Raises:
            KeyError: the sequence is not in the queue.
        """
        del self._sequences[sequence]
