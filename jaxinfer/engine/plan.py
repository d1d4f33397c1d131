"""What one step does, decided: the scheduler writes it, the runner runs it, the engine reads its results by it."""

from dataclasses import dataclass, field

import numpy as np

from jaxinfer.engine.request import Sequence
from jaxinfer.functional.encoder_batch import EncodeJob
from jaxinfer.kv.encoder_pool import Slots
from jaxinfer.kv.recurrent import Segment
from jaxinfer.media import EncoderInput


@dataclass(frozen=True)
class Chunk:
    """The next tokens of one prompt: positions [start, start + count)."""

    sequence: Sequence
    start: int
    count: int
    segments: tuple[Segment, ...] = ()
    """Its parts after which recurrent layers keep a state."""
    features: np.ndarray | None = None
    """`[count]` int32: for each token the row of the feature pool it takes, -1 for none; None: none does."""

    @property
    def seen(self) -> np.ndarray:
        """`[count, 2]` int32: the first and the end of the encoder positions that each token sees."""
        cross = self.sequence.request.cross
        return np.zeros((self.count, 2), np.int32) if cross is None else cross.seen(self.start, self.count)

    @property
    def parts(self) -> int:
        """Runs of tokens that see the same: a step has room for so many of all its chunks."""
        cross = self.sequence.request.cross
        return 1 if cross is None else cross.parts(self.start, self.count)


@dataclass(frozen=True)
class Plan:
    """One step, decided."""

    chunks: list[Chunk] = field(default_factory=list)
    """Prompts, or what of them fits."""
    samples: list[tuple[int, Sequence]] = field(default_factory=list)
    """(chunk, sequence): who samples after a chunk that ends its prompt, the forks included."""
    decodes: list[Sequence] = field(default_factory=list)
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    """`[B]` rows of `decodes`."""
    positions: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    """`[B]` positions that `decodes` write, in the first of the steps."""
    steps: int = 1
    """Decode steps, one position further each."""
    copies: tuple[np.ndarray, np.ndarray] = field(
        default_factory=lambda: (np.empty(0, np.int32), np.empty(0, np.int32))
    )
    """Block copies that run before anything is written."""
    slots: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    """Of each step, where recurrent layers have a state: the slots `[B]` that `decodes` read and write."""
    encodes: list[tuple[EncoderInput, Slots]] = field(default_factory=list)
    """What is encoded before the chunks run, and the slots of the feature pool it goes to."""
    reused: int = 0
    """Inputs that the chunks read and that were in the feature pool, or in the cache, already."""
    reads: list[EncodeJob] = field(default_factory=list)
    """What is encoded into the cache before the chunks run."""

    @property
    def sequences(self) -> list[Sequence]:
        """Everyone in it."""
        return [chunk.sequence for chunk in self.chunks] + [s for _, s in self.samples] + self.decodes

    def __bool__(self) -> bool:
        return bool(self.chunks or self.decodes)
