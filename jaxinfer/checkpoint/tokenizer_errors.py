"""Errors of transformers and of the tokenizers library, which are of many kinds, as public ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from jaxinfer.errors import CheckpointError

REMEDY = "pass tokenizer=DIR of a folder with a whole one, or skip_tokenizer_init=True to serve token ids"


def is_library_error(error: BaseException) -> bool:
    """Tell whether a library raised an error: an exception, or a panic of Rust code, which is no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def cause(error: BaseException) -> str:
    """Say what a library raised, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


@contextlib.contextmanager
def as_checkpoint_error(what: str) -> Iterator[None]:
    """Raise what the library raises as a `CheckpointError`.

    Args:
        what: what could not be done, the subject of the message.
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
