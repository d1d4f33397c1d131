"""Decorator of Triton kernels. Imports triton, so only kernel modules may import it."""

import inspect
from collections.abc import Callable
from typing import Any

import triton


def jit(function: Callable[..., Any]) -> Any:
    """Declare a Triton kernel.

    Triton compiles the function's source, so wrappers of type checkers are removed.
    """
    return triton.jit(inspect.unwrap(function))
