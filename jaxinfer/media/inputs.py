"""Inputs of a model's encoder, and where in a prompt the rows that it makes of them go."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, eq=False)
class EncoderInput:
    """One image (or whatever else an encoder reads), preprocessed."""

    modality: str
    """"image"."""
    values: np.ndarray
    """`[n, *shape]` float32: its tiles, each encoded by itself."""
    rows: int
    """Embeddings that one of the n values becomes."""
    digest: bytes = field(init=False)
    """32 bytes, the same wherever the values are: sha256."""

    def __post_init__(self) -> None:
        values = np.ascontiguousarray(self.values, np.dtype("<f4"))
        digest = hashlib.sha256(f"{self.modality} {values.shape} {self.rows} ".encode())
        digest.update(values.data)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "digest", digest.digest())

    @property
    def count(self) -> int:
        """n."""
        return len(self.values)

    @property
    def length(self) -> int:
        """Tokens of a prompt whose places it takes."""
        return self.count * self.rows


@dataclass(frozen=True, eq=False)
class PlacedInputs:
    """The inputs of one prompt, in order, and the tokens whose places their rows take."""

    inputs: tuple[EncoderInput, ...]
    places: np.ndarray
    """Ascending positions in the prompt: those of the first input's rows, then those of the second's, ..."""

    def spans(self) -> list[tuple[EncoderInput, np.ndarray]]:
        """Each input with its positions."""
        ends = np.cumsum([one.length for one in self.inputs])
        return list(zip(self.inputs, np.split(self.places, ends[:-1]), strict=True))

    def distinct(self) -> dict[bytes, EncoderInput]:
        """By digest."""
        return {one.digest: one for one in self.inputs}

    def wanted(self, start: int) -> dict[bytes, EncoderInput]:
        """Those of them that tokens from position `start` on read."""
        return {one.digest: one for one, places in self.spans() if places[-1] >= start}

    def index(self, slots: Mapping[bytes, Sequence[int]], length: int) -> np.ndarray:
        """`[length]` int32: for each position the row of the feature pool it takes, -1 for its own embedding.

        `slots`: those of the inputs that are in the pool, each slot as many rows as an input has for one value.
        """
        index = np.full(length, -1, np.int32)
        for one, places in self.spans():
            if one.digest in slots:
                first = np.asarray(slots[one.digest], np.int32)[:, None] * one.rows
                index[places] = (first + np.arange(one.rows, dtype=np.int32)).ravel()
        return index

    def extras(self, block_size: int) -> dict[int, bytes]:
        """What beside its tokens decides the content of a block, by the number of the block in the sequence.

        Of every input with a place in the block: its digest, and which of its rows is the first there.
        """
        found: dict[int, bytes] = {}
        for one, places in self.spans():
            blocks, first = np.unique(places // block_size, return_index=True)
            for block, row in zip(blocks.tolist(), first.tolist(), strict=True):
                found[block] = found.get(block, b"") + one.digest + row.to_bytes(8, "little")
        return found
