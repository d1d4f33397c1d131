"""Define a fuzzer part, run one of its inputs, and classify errors as public or not."""

import faulthandler
import linecache
import random
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import jaxinfer
from jaxinfer.errors import JaxInferError

PACKAGE = str(Path(jaxinfer.__file__).parent)
LIMIT = 5.0
"""Time limit of one input in seconds."""
HANG = 60.0
"""Time in seconds after which the process exits with a traceback, for C code that does not return."""


@dataclass(frozen=True)
class Part:
    """Fuzzer of one kind of file."""

    name: str
    """Name for `--part`."""
    make: Callable[[random.Random, Path], Callable[[], object]]
    """Function that writes a corrupted input into an empty folder, from the random generator alone, and returns the
    call that reads it."""


@dataclass(frozen=True)
class Failure:
    """Input that was not handled correctly."""

    part: str
    case: int
    seconds: float
    report: str


class _TooLong(BaseException):
    """Interrupts an input that takes longer than `LIMIT`; no reader catches it."""


def run(part: Part, seed: int, case: int) -> Failure | None:
    """Generate one input and read it; return the failure, if any."""
    rng = random.Random(f"{seed}:{part.name}:{case}")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        read = part.make(rng, Path(folder))
        faulthandler.dump_traceback_later(HANG, exit=True)
        before = signal.signal(signal.SIGALRM, _stop)
        start = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, LIMIT)
        try:
            read()
            report = ""
        except _TooLong:
            report = f"no answer after {LIMIT:g} s\n{traceback.format_exc()}"
        except Exception as error:  # any error that is not public is a failure
            report = "" if is_public(error) else traceback.format_exc()
        except BaseException as error:  # a Rust library's panic is not an `Exception`
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            report = traceback.format_exc()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            faulthandler.cancel_dump_traceback_later()
    return Failure(part.name, case, time.monotonic() - start, report) if report else None


def is_public(error: Exception) -> bool:
    """Return whether jaxinfer documents an error.

    That holds for the package's own error classes, and for a TypeError or ValueError that a line of the package raised
    with a message of its own, as opposed to one that Python raised on an unexpected value.
    """
    if isinstance(error, JaxInferError):
        return True
    if not isinstance(error, TypeError | ValueError):
        return False
    last = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(last.filename, last.lineno or 0).strip()
    return last.filename.startswith(PACKAGE) and line.startswith("raise ")


def _stop(signum: int, frame: FrameType | None) -> None:
    raise _TooLong
