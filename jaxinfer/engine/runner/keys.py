"""Keys of compiled programs, which say what state of the runner a program takes and returns."""

from dataclasses import dataclass

from jaxinfer.engine.runner.batch import Bucket
from jaxinfer.engine.runner.draft_steps import DraftFill, DraftSteps
from jaxinfer.engine.runner.logits import SampleLogits
from jaxinfer.engine.runner.mixed import Mixed
from jaxinfer.functional.encoder_batch import EncodeShape


@dataclass(frozen=True)
class Copies:
    """Key of the program that copies `width` blocks."""

    takes = gives = ("cache",)
    width: int


@dataclass(frozen=True)
class Install:
    """Key of the program that sets history and bias of one row."""

    takes = gives = ("edits",)


@dataclass(frozen=True)
class InstallTables:
    """Key of the program that writes `width` entries of the block tables."""

    takes = gives = ("rows",)
    width: int


@dataclass(frozen=True)
class Encode:
    """Key of the program that encodes `count` inputs into the feature pool."""

    takes, gives = ("params", "features"), ("features",)
    count: int


@dataclass(frozen=True)
class EncodeJoint(EncodeShape):
    """Key of the program that encodes whole inputs of this shape into the feature pool (`Features.joint`)."""

    takes, gives = ("params", "features"), ("features",)


@dataclass(frozen=True)
class EncodeCross(EncodeShape):
    """Key of the program that encodes inputs of this shape into the cache for cross-attention."""

    takes, gives = ("params", "cache"), ("cache",)


Key = (
    Bucket
    | Mixed
    | SampleLogits
    | DraftFill
    | DraftSteps
    | Copies
    | Install
    | InstallTables
    | Encode
    | EncodeJoint
    | EncodeCross
)
"""Key of a program. `takes` names the runner state passed before the call's own arrays, `gives` the runner state
that the program returns first (not in a tuple if it is a single value). None marks state that this program does not
use.
"""
