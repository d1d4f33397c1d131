"""How a command ends."""

import os
import sys
from collections.abc import Callable

from jaxinfer.errors import JaxInferError


def status_of(work: Callable[[], int], interrupted: str = "interrupted") -> int:
    """What `work` returns; 2 for bad input and 130 after Ctrl+C, each said in one line; 141 where nobody reads the
    output."""
    try:
        return work()
    except (JaxInferError, ValueError, TypeError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            # The interpreter's own flush at the end must not fail as well.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
