"""The queue of sequences that have no row: first come, first served, whatever its length."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from jaxinfer.engine.request import Sequence


class Waiting:
    """Waiting sequences in order. Each operation takes the same time in a queue of a hundred thousand as in one of
    ten."""

    def __init__(self) -> None:
        self._sequences: OrderedDict[Sequence, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def extend(self, sequences: Iterable[Sequence]) -> None:
        """Add sequences at the end."""
        for sequence in sequences:
            self._sequences[sequence] = None

    def push(self, sequence: Sequence) -> None:
        """Add a sequence at the head."""
        self._sequences[sequence] = None
        self._sequences.move_to_end(sequence, last=False)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is.

        Raises:
            KeyError: it is not in the queue.
        """
        del self._sequences[sequence]
