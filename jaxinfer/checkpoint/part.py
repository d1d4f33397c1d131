"""A checkpoint of a whole model read as that of one of its parts."""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxinfer.checkpoint.source import Info, Source


class Part:
    """A source that has the tensors of one part under the names they have where it stands alone, and none of others'."""

    def __init__(self, source: Source, prefixes: Mapping[str, str], others: Sequence[str]):
        """
        Args:
            source: the whole model's tensors.
            prefixes: what the part's names begin with there -> what they begin with here.
            others: what the names of other parts begin with. All that begin with neither stay as they are.
        """
        self._source = source
        self._names: dict[str, str] = {}
        """Name here -> name there."""
        for name in source.names():
            if not name.startswith(tuple(others)):
                prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
                self._names[prefixes.get(prefix, "") + name.removeprefix(prefix)] = name

    def names(self) -> list[str]:
        return list(self._names)

    def info(self, name: str) -> Info:
        return self._source.info(self._names[name])

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> np.ndarray:
        return self._source.read(self._names[name], slices)

    def release(self) -> None:
        self._source.release()
