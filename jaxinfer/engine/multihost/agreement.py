"""Calls that every process makes, as a trainer's steps are: all of them go on, or all raise the same error."""

from collections.abc import Callable
from typing import TypeVar

from jaxinfer.distributed.group import Group
from jaxinfer.errors import CheckpointError, ConfigError, DistributedError

Found = TypeVar("Found")
ERRORS = {kind.__name__: kind for kind in (CheckpointError, ConfigError, TypeError, ValueError, RuntimeError)}
"""Errors that end a call and leave the engine as it was."""


def agree(group: Group, method: str, what: str, make: Callable[[], tuple[Found, str]]) -> Found:
    """Make a value in every process and check that all have made the same.

    All processes must call it, in the same order as their programs on the devices.

    Args:
        group: the processes.
        method: name of the method that the user called.
        what: what the processes agree on, for the error.
        make: returns the value, and a text that is equal in all processes if the value is.

    Raises:
        CheckpointError, ConfigError, TypeError, ValueError, RuntimeError: `make` raised it in some process, which is
            named unless it is this one; other errors of other processes are a RuntimeError here.
        DistributedError: the texts differ, or the processes have called different methods.
    """
    value, text, failure = None, "", None
    try:
        value, text = make()
    except Exception as error:
        failure = error
    kind = "" if failure is None else _kind(failure)
    answers = group.all_gather([method, kind, text if failure is None else str(failure)])
    called = [answer[0] for answer in answers]
    if len(set(called)) > 1:
        listed = ", ".join(f"process {i} {name}" for i, name in enumerate(called))
        group.fail(f"all processes must call the same method, but {listed}")
        raise group.error()
    if failure is not None:
        raise failure
    for process, (_, other, message) in enumerate(answers):
        if other:
            raise ERRORS[other](f"process {process}: {message}")
    texts = [answer[2] for answer in answers]
    if len(set(texts)) > 1:
        process = next(i for i, one in enumerate(texts) if one != texts[0])
        raise DistributedError(
            f"{method}: process {process} differs from process 0 in {what}; pass the same in all processes"
        )
    return value


def _kind(error: Exception) -> str:
    """Return the name of the class under which an error is raised in the other processes."""
    return next((name for name, kind in ERRORS.items() if isinstance(error, kind)), RuntimeError.__name__)
