"""The plan of one step: written by the scheduler, run by the runner, committed by the engine."""

from dataclasses import dataclass, field

import numpy as np

from jaxinfer.engine.request import Sequence
from jaxinfer.functional.encoder_batch import EncodeJob
from jaxinfer.kv.encoder_pool import Slots
from jaxinfer.kv.recurrent import Segment
from jaxinfer.media import EncoderInput


@dataclass(frozen=True)
class Chunk:
    """A prefill chunk of one prompt: positions [start, start + count)."""

    sequence: Sequence
    start: int
    count: int
    segments: tuple[Segment, ...] = ()
    """Parts of the chunk after which recurrent layers store a state."""
    features: np.ndarray | None = None
    """Row of the feature pool for each token, `[count]` int32, -1 for text tokens; None if no token takes one."""

    @property
    def seen(self) -> np.ndarray:
        """Encoder positions visible to each token, `[count, 2]` int32: first and end."""
        cross = self.sequence.request.cross
        return np.zeros((self.count, 2), np.int32) if cross is None else cross.seen(self.start, self.count)

    @property
    def parts(self) -> int:
        """Number of runs of tokens with equal visible encoder positions, which a prefill has limited room for."""
        cross = self.sequence.request.cross
        return 1 if cross is None else cross.parts(self.start, self.count)


@dataclass(frozen=True)
class Plan:
    """The prefill chunks, decodes, block copies and encoder inputs of one step."""

    chunks: list[Chunk] = field(default_factory=list)
    """Prefill chunks."""
    samples: list[tuple[int, Sequence]] = field(default_factory=list)
    """(index into `chunks`, sequence) for each sequence sampled after a chunk that completes its prompt, forks
    included.
    """
    decodes: list[Sequence] = field(default_factory=list)
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    """Rows of `decodes`, `[B]`."""
    positions: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    """Positions that `decodes` write in the first decode step, `[B]`."""
    steps: int = 1
    """Number of consecutive decode steps."""
    copies: tuple[np.ndarray, np.ndarray] = field(
        default_factory=lambda: (np.empty(0, np.int32), np.empty(0, np.int32))
    )
    """Source and target ids of block copies that run before anything is written."""
    slots: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    """For each decode step of a model with recurrent layers: the state slots `[B]` that `decodes` read and write."""
    encodes: list[tuple[EncoderInput, Slots]] = field(default_factory=list)
    """Inputs to encode before the chunks run, with their slots of the feature pool."""
    reused: int = 0
    """Number of inputs of the chunks that were already in the feature pool or the cache."""
    reads: list[EncodeJob] = field(default_factory=list)
    """Inputs to encode into the cache for cross-attention before the chunks run."""

    @property
    def sequences(self) -> list[Sequence]:
        """All sequences of the step."""
        return [chunk.sequence for chunk in self.chunks] + [s for _, s in self.samples] + self.decodes

    def __bool__(self) -> bool:
        return bool(self.chunks or self.decodes)
