"""Results of requests that end with their prefill: log-probabilities of given tokens, hidden states, embeddings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Rows = Mapping[str, np.ndarray]
"""Outputs of modules by path, for consecutive tokens of one prompt, `[n, ...]` each."""


class Captures:
    """Receiver of the captured rows of one prompt, in token order; rows that are computed again are taken once.

    `first`: position of the first token whose rows are taken.
    """

    def __init__(self, first: int = 0):
        self._first = self._next = first

    def reset(self) -> None:
        """Forget all rows: they are computed again."""
        self._next = self._first

    def take(self, start: int, rows: Rows) -> None:
        """Take rows of the tokens from position `start` on."""
        count = len(next(iter(rows.values())))
        skip = self._next - start
        if skip >= count:
            return
        self._next = start + count
        self._add({name: value[max(0, skip) :] for name, value in rows.items()})

    def _add(self, rows: Rows) -> None:
        raise NotImplementedError


class Kept(Captures):
    """Receiver that keeps all rows."""

    def __init__(self, first: int = 0):
        super().__init__(first)
        self._parts: list[Rows] = []

    def reset(self) -> None:
        """Forget all rows: they are computed again."""
        super().reset()
        self._parts.clear()

    def _add(self, rows: Rows) -> None:
        self._parts.append({name: np.array(value) for name, value in rows.items()})

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the rows of each module; floating-point numbers as float32."""
        joined = {name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]}
        return {
            name: value if np.issubdtype(value.dtype, np.integer) else value.astype(np.float32)
            for name, value in joined.items()
        }


class Pooled(Captures):
    """Receiver that keeps the mean of all rows, or the last row, of one module."""

    def __init__(self, first: int, *, mean: bool):
        super().__init__(first)
        self._mean, self._sum, self._count = mean, None, 0

    def reset(self) -> None:
        """Forget all rows: they are computed again."""
        super().reset()
        self._sum, self._count = None, 0

    def _add(self, rows: Rows) -> None:
        [values] = rows.values()
        values = values.astype(np.float64)
        if not self._mean:
            self._sum, self._count = values[-1], 1
            return
        own = values.sum(axis=0)
        self._sum = own if self._sum is None else self._sum + own
        self._count += len(values)

    def vector(self) -> np.ndarray:
        """Return the pooled row, float64 `[M]`."""
        return self._sum / self._count


@dataclass(frozen=True)
class Wanted:
    """Results of the prefill that a request asks for; it ends after the prefill, without a sampled token."""

    first: int
    """First position whose results are requested; a cached prefix is used up to it."""
    modules: Sequence[str] = ()
    """Paths of the modules whose outputs are requested (`functional.taps`)."""
    captures: Captures | None = None
    """Receiver of these outputs; None without `modules`."""
