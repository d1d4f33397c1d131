"""Encoder inputs of a prompt, and the tokens whose embeddings they replace or that attend to them."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxinfer.media.rope_positions import RopePositions


@dataclass(frozen=True, eq=False)
class EncoderInput:
    """A preprocessed input of an encoder: an image, a text, audio."""

    modality: str
    """Modality: "image", "text", "audio"."""
    values: np.ndarray
    """Values, `[n, *shape]`: float32 (such as the tiles of an image), or int32 token ids."""
    rows: int
    """Number of embeddings, or of cross-attention positions, per value."""
    num_positions: int | None = None
    """Cross-attention: number of leading rows that are positions, the others being padding; None if all are."""
    numbers: np.ndarray | None = None
    """Integers for the encoder beside the values, `[n, A]` int32; None if there are none."""
    digest: bytes = field(init=False)
    """SHA-256 of the content, 32 bytes."""

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
        """Return everything but the values as bytes."""
        beside = (
            b""
            if self.num_positions is None and not numbers.size
            else f"{self.num_positions} ".encode() + numbers.tobytes()
        )
        return f"{self.modality} {values.shape} {self.rows} ".encode() + beside

    @property
    def identity(self) -> bytes:
        """Bytes compared after a digest matches.

        Token ids themselves; for larger arrays, which are not kept, a second hash (BLAKE2b).
        """
        described = self._described(self.values, self.numbers)
        if self.values.dtype.kind == "i":
            return described + self.values.tobytes()
        return described + hashlib.blake2b(self.values.data).digest()

    @property
    def count(self) -> int:
        """n: number of values."""
        return len(self.values)

    @property
    def length(self) -> int:
        """Number of prompt tokens that the input replaces, or of its cross-attention positions."""
        return self.count * self.rows if self.num_positions is None else self.num_positions


@dataclass(frozen=True, eq=False)
class PlacedInputs:
    """Encoder inputs of one prompt, in order, and the positions of the tokens that they replace."""

    inputs: tuple[EncoderInput, ...]
    places: np.ndarray
    """Positions in the prompt, ascending: those of the first input's rows, then of the second's, and so on."""
    rope: RopePositions | None = None
    """Positions that rope rotates by, if they are not those in the prompt (`Features.rope_axes`)."""

    def spans(self) -> list[tuple[EncoderInput, np.ndarray]]:
        """Return each input with its positions."""
        ends = np.cumsum([one.length for one in self.inputs])
        return list(zip(self.inputs, np.split(self.places, ends[:-1]), strict=True))

    def distinct(self) -> dict[bytes, EncoderInput]:
        """Return the inputs by digest, without duplicates."""
        return {one.digest: one for one in self.inputs}

    def wanted(self, start: int) -> dict[bytes, EncoderInput]:
        """Return the inputs by digest that tokens from position `start` on take."""
        return {one.digest: one for one, places in self.spans() if places[-1] >= start}

    def index(self, slots: Mapping[bytes, Sequence[int]], length: int) -> np.ndarray:
        """Return the feature pool row of each position, `[length]` int32; -1 for the token's own embedding.

        `slots` maps digests of inputs in the pool to their slots; each slot has the rows of one value.
        """
        index = np.full(length, -1, np.int32)
        for one, places in self.spans():
            if one.digest in slots:
                first = np.asarray(slots[one.digest], np.int32)[:, None] * one.rows
                index[places] = (first + np.arange(one.rows, dtype=np.int32)).ravel()
        return index

    def extras(self, block_size: int) -> dict[int, bytes]:
        """Return the media content of each block, by block number, for the prefix cache hash.

        For every input with a position in the block: its digest and the first of its rows there.
        """
        found: dict[int, bytes] = {}
        for one, places in self.spans():
            blocks, first = np.unique(places // block_size, return_index=True)
            for block, row in zip(blocks.tolist(), first.tolist(), strict=True):
                found[block] = found.get(block, b"") + one.digest + row.to_bytes(8, "little")
        return found


@dataclass(frozen=True, eq=False)
class CrossInputs:
    """Encoder inputs of a request for cross-attention; their positions are concatenated."""

    inputs: tuple[EncoderInput, ...]
    """At least one input; each is encoded separately."""
    ranges: tuple[tuple[int, int, int], ...] = ()
    """Visible encoder positions, as (token, first, end) in ascending order: tokens from position `token` up to that
    of the next entry see positions [first, end), and tokens before the first entry see none. If empty, every token
    sees all.
    """
    digest: bytes = field(init=False)
    """SHA-256 of the content, 32 bytes."""
    identity: bytes = field(init=False)
    """Bytes compared after a digest matches (`EncoderInput.identity`)."""

    def __post_init__(self) -> None:
        digest = hashlib.sha256(b"".join(one.digest for one in self.inputs)).digest()
        object.__setattr__(self, "digest", digest)
        object.__setattr__(self, "identity", b"".join(one.identity for one in self.inputs))

    @property
    def length(self) -> int:
        """S: number of encoder positions."""
        return sum(one.length for one in self.inputs)

    @property
    def token_ids(self) -> list[int] | None:
        """Token ids, if all inputs are text; otherwise None."""
        texts = [one.values.tolist() for one in self.inputs if one.values.dtype.kind == "i"]
        return [token for text in texts for token in text] if len(texts) == len(self.inputs) else None

    def seen(self, start: int, count: int) -> np.ndarray:
        """Return first and end of the encoder positions visible to tokens from `start` on, `[count, 2]` int32."""
        if not self.ranges:
            return np.full((count, 2), (0, self.length), np.int32)
        tokens, spans = np.array(self.ranges)[:, 0], np.array([(0, 0), *(span[1:] for span in self.ranges)], np.int32)
        return spans[np.searchsorted(tokens, np.arange(start, start + count), side="right")]

    def extras(self, block_size: int) -> dict[int, bytes]:
        """Return the media content of each decoder block, by block number, for the prefix cache hash.

        The first block has the inputs' identity, each block the ranges that begin in it.
        """
        found = {0: self.identity}
        for token, first, end in self.ranges:
            block = token // block_size
            found[block] = found.get(block, b"") + np.array([token, first, end], "<i8").tobytes()
        return found

    def tokens_within(self, start: int, most: int) -> int | None:
        """Return how many tokens from `start` on fall into `most` ranges; None if all remaining ones do."""
        later = [token for token, _, _ in self.ranges if token > start]
        return later[most - 1] - start if len(later) >= most else None

    def parts(self, start: int, count: int) -> int:
        """Return the number of ranges that tokens from `start` on fall into."""
        return 1 + sum(start < token < start + count for token, _, _ in self.ranges)


@dataclass(frozen=True)
class Features:
    """Encoder inputs whose embeddings replace those of placeholder tokens, such as tiles of images."""

    modality: str
    """Key in `multi_modal_data`: "image"."""
    shape: tuple[int, ...]
    """Shape of one input: pixel values `(C, height, width)` of a tile, as computed by transformers' processor."""
    rows: int
    """Number of embeddings `[rows, M]` per input, in the order of the tokens that they replace."""
    placeholder: int
    """Id of the placeholder token; -1 if the checkpoint does not say."""
    joint: "Joint | None" = None
    """How the values of an input are encoded together; None if each is encoded by itself."""
    rope_axes: int = 0
    """Number of positions that rope rotates a token by: 3 with M-RoPE (time, row and column of an image's grid); 0 if
    they are the position in the sequence alone."""


@dataclass(frozen=True)
class Joint:
    """Encoder of inputs whose values attend to each other, so that an input is encoded whole: an image of any size is
    one value for each token that it becomes."""

    positions: int
    """Number of encoder positions of a value: the patches that are merged to a row."""
    width: int
    """Columns of a row of the feature pool: (1 + n) M, if the outputs of the n first decoder layers get features added
    at an input's tokens (DeepStack, arXiv:2406.04334)."""
    head_dim: int
    """D of the encoder's attention, which decides about its tiles."""
    numbers: int = 4
    """A: number of integers that come with each value: row and column in the input's grid, rows and columns of the
    grid."""
