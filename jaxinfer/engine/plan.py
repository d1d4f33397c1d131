"""The plan of one step and its limits: written by the scheduler, run by the runner, committed by the engine."""

from dataclasses import dataclass, field

import numpy as np

from jaxinfer.engine.request import Sequence
from jaxinfer.functional.encoder_batch import EncodeJob
from jaxinfer.kv.encoder_pool import Slots
from jaxinfer.kv.recurrent import Segment
from jaxinfer.media import EncoderInput


@dataclass(frozen=True)
class Limits:
    """Limits of one step."""

    tokens: int
    """Token budget of prefill and decode together."""
    prefill_rows: int
    """Maximum number of sequences, and of samples, in one prefill."""
    share_blocks: bool = True
    """Whether samples of a request share their prompt's blocks by forking."""
    feature_slots: int = 0
    """Number of slots of the feature pool (in total, not per step)."""
    encode_units: int = 0
    """Maximum number of values encoded for cross-attention in one step; a single request may exceed it."""
    whole_prompts: bool = False
    """Whether no prompt uses the prefix cache, because results of all prompt tokens are requested and the cache does
    not keep them.
    """


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
    drafts: list[np.ndarray] | None = None
    """With speculative decoding: tokens drafted for each of `decodes`, `[n]` int32 each and possibly none. The step
    then verifies them and makes up to n + 1 tokens of each sequence. None if no sequence has a draft.
    """

    @property
    def tokens(self) -> list[int]:
        """Number of positions that each of `decodes` writes."""
        if self.drafts is None:
            return [self.steps] * len(self.decodes)
        return [len(draft) + 1 for draft in self.drafts]

    @property
    def sequences(self) -> list[Sequence]:
        """All sequences of the step."""
        return [chunk.sequence for chunk in self.chunks] + [s for _, s in self.samples] + self.decodes

    def __bool__(self) -> bool:
        return bool(self.chunks or self.decodes)
