"""Convert the various errors of transformers and the tokenizers library to `CheckpointError`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from jaxinfer.errors import CheckpointError

REMEDY = "pass tokenizer=DIR of a folder with a whole one, or skip_tokenizer_init=True to serve token ids"


def is_library_error(error: BaseException) -> bool:
    """Return whether a library raised this error: an `Exception`, or a Rust panic, which is not an `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def cause(error: BaseException) -> str:
    """Format a library's error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


@contextlib.contextmanager
def as_checkpoint_error(what: str) -> Iterator[None]:
    """Convert errors of a library to `CheckpointError`.

    Args:
        what: subject of the message, what could not be done.
    """
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as error:
        if not is_library_error(error):
            raise
        raise CheckpointError(
            f"{what} ({cause(error)}): the tokenizer's files are broken or incomplete; {REMEDY}."
        ) from error
