"""Exit statuses of command lines."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from jaxinfer.errors import JaxInferError


def status_of(work: Callable[[], int], interrupted: str = "interrupted") -> int:
    """Run a command and return its exit status: its own, 2 for bad input and 130 after Ctrl+C, each with a one-line
    message, or 141 after a broken pipe.
    """
    try:
        return work()
    except (JaxInferError, ValueError, TypeError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            # Otherwise the interpreter's final flush of stdout would fail too.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130


def end(status: int) -> NoReturn:
    """End the process with an exit status; a program that is still being compiled is given up."""
    programs = sys.modules.get("jaxinfer.engine.runner.programs")
    if programs is not None:
        programs.exit_while_compiling(status)
    sys.exit(status)
