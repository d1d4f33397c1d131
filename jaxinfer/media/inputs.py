"""Inputs of a model's encoder, where in a prompt the rows that it makes of them go, or which tokens attend to them."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, eq=False)
class EncoderInput:
    """One image, text, or whatever else an encoder reads, preprocessed."""

    modality: str
    """"image", "text", "audio"."""
    values: np.ndarray
    """`[n, *shape]`: float32, such as its tiles; int32 where they are token ids."""
    rows: int
    """Embeddings, or positions of cross-attention, that one of the n values becomes."""
    kept: int | None = None
    """Of cross-attention: the first so many of all its rows are positions, the others padding; None: all are."""
    numbers: np.ndarray | None = None
    """`[n, A]` int32 that the encoder reads beside the values; None: none."""
    digest: bytes = field(init=False)
    """32 bytes, the same wherever the values are: sha256."""

    def __post_init__(self) -> None:
        integers = np.asarray(self.values).dtype.kind in "iu"
        values = np.ascontiguousarray(self.values, np.dtype("<i4" if integers else "<f4"))
        numbers = np.zeros((len(values), 0)) if self.numbers is None else self.numbers
        numbers = np.ascontiguousarray(numbers, np.dtype("<i4"))
        digest = hashlib.sha256(self._described(values, numbers))
        digest.update(values.data)
        for name, value in (("values", values), ("numbers", numbers), ("digest", digest.digest())):
            object.__setattr__(self, name, value)

    def _described(self, values: np.ndarray, numbers: np.ndarray) -> bytes:
        """All but the values."""
        beside = b"" if self.kept is None and not numbers.size else f"{self.kept} ".encode() + numbers.tobytes()
        return f"{self.modality} {values.shape} {self.rows} ".encode() + beside

    @property
    def identity(self) -> bytes:
        """What an input is held against where its digest was found: token ids themselves; of larger arrays, which are
        not kept, another hash (BLAKE2b).
        """
        described = self._described(self.values, self.numbers)
        if self.values.dtype.kind == "i":
            return described + self.values.tobytes()
        return described + hashlib.blake2b(self.values.data).digest()

    @property
    def count(self) -> int:
        """n."""
        return len(self.values)

    @property
    def length(self) -> int:
        """Tokens of a prompt whose places it takes, or positions of cross-attention."""
        return self.count * self.rows if self.kept is None else self.kept


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


@dataclass(frozen=True, eq=False)
class CrossInputs:
    """What the encoder of a model with cross-attention reads for one request: its positions are those of all inputs,
    one after another.
    """

    inputs: tuple[EncoderInput, ...]
    """At least one; each is encoded by itself."""
    ranges: tuple[tuple[int, int, int], ...] = ()
    """(token, first, end), ascending: from the prompt's position `token` on, to that of the next, tokens see the
    encoder positions [first, end), and those before the first see none. By default every token sees all."""
    digest: bytes = field(init=False)
    """32 bytes that follow from the content."""
    identity: bytes = field(init=False)
    """What is compared where the digest was found (`EncoderInput.identity`)."""

    def __post_init__(self) -> None:
        digest = hashlib.sha256(b"".join(one.digest for one in self.inputs)).digest()
        object.__setattr__(self, "digest", digest)
        object.__setattr__(self, "identity", b"".join(one.identity for one in self.inputs))

    @property
    def length(self) -> int:
        """S: positions."""
        return sum(one.length for one in self.inputs)

    @property
    def token_ids(self) -> list[int] | None:
        """What is read where that are tokens; None: it is something else."""
        texts = [one.values.tolist() for one in self.inputs if one.values.dtype.kind == "i"]
        return [token for text in texts for token in text] if len(texts) == len(self.inputs) else None

    def seen(self, start: int, count: int) -> np.ndarray:
        """`[count, 2]` int32: the first and the end of the positions that tokens from `start` on see."""
        if not self.ranges:
            return np.full((count, 2), (0, self.length), np.int32)
        tokens, spans = np.array(self.ranges)[:, 0], np.array([(0, 0), *(span[1:] for span in self.ranges)], np.int32)
        return spans[np.searchsorted(tokens, np.arange(start, start + count), side="right")]

    def extras(self, block_size: int) -> dict[int, bytes]:
        """What beside its tokens decides the content of a block of the decoder, by its number: the first has the
        input's identity, and each the ranges that begin in it.
        """
        found = {0: self.identity}
        for token, first, end in self.ranges:
            block = token // block_size
            found[block] = found.get(block, b"") + np.array([token, first, end], "<i8").tobytes()
        return found

    def reach(self, start: int, most: int) -> int | None:
        """How many tokens from `start` on fall into `most` ranges; None: all that follow."""
        later = [token for token, _, _ in self.ranges if token > start]
        return later[most - 1] - start if len(later) >= most else None

    def parts(self, start: int, count: int) -> int:
        """Into how many ranges tokens from `start` on fall."""
        return 1 + sum(start < token < start + count for token, _, _ in self.ranges)
