"""The decorator of Triton kernels. It imports triton, so only files of kernels import it."""

import inspect
from collections.abc import Callable
from typing import Any

import triton


def jit(function: Callable[..., Any]) -> Any:
    """Declare a Triton kernel.

    Triton compiles the source of a function, so wrappers that a type checker has put around it are removed.
    """
    return triton.jit(inspect.unwrap(function))
