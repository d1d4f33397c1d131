"""What a part of the fuzzer is, how one input of it is run, and which errors count as public."""

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
"""Seconds that one input may take."""
HANG = 60.0
"""Seconds after which the process ends with a traceback: something in C does not come back."""


@dataclass(frozen=True)
class Part:
    """One kind of file."""

    name: str
    """By which `--part` names it."""
    make: Callable[[random.Random, Path], Callable[[], object]]
    """Writes one broken input into an empty folder, from random numbers alone, and returns the call that reads it."""


@dataclass(frozen=True)
class Failure:
    """An input that was not handled as it must be."""

    part: str
    case: int
    seconds: float
    report: str


class _TooLong(BaseException):
    """Ends an input that takes longer than `LIMIT`; no reader catches it."""


def run(part: Part, seed: int, case: int) -> Failure | None:
    """Make one input and read it; return what is wrong with that, if anything is."""
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
        except Exception as error:  # the point of this program
            report = "" if is_public(error) else traceback.format_exc()
        except BaseException as error:  # a panic of a library in Rust is no `Exception`
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            report = traceback.format_exc()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            faulthandler.cancel_dump_traceback_later()
    return Failure(part.name, case, time.monotonic() - start, report) if report else None


def is_public(error: Exception) -> bool:
    """Tell whether an error is one that jaxinfer documents.

    Errors of the package's own classes are; so are a TypeError and a ValueError that a line of the package raised, with
    a message of its own, and not Python because a line stumbled over a value.
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
