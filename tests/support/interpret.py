"""Run Triton kernels in Triton's interpreter, without a GPU: as NumPy, one program after the other."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxinfer.kernels.triton import triton_launch
from jaxinfer.kernels.triton.triton_launch import Options, Target


class Memory:
    """NumPy array with the tensor interface that the interpreter needs."""

    def __init__(self, array: np.ndarray):
        self.array, self.dtype = array, str(array.dtype)

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "Memory":
        return self

    def cpu(self) -> "Memory":
        return self

    def new_empty(self, *_size: int, **_device: str) -> "Memory":
        return Memory(self.array[:0])

    def set_(self, source: "Memory", *_shape: Any) -> None:
        self.array = source.array

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def copy_(self, _other: "Memory") -> None:
        """Do nothing: the kernel has written to the array itself."""


def launch(
    kernel: Any,
    operands: Mapping[str, Any],
    results: Mapping[str, Any],
    *,
    aliases: Mapping[str, str],
    constants: Mapping[str, Any],
    grid: tuple[int, int],
    target: Target,
    options: Options,
) -> dict[str, Any]:
    """Replace `triton_launch.launch`; also works under jit."""
    given = {name: array for name, array in operands.items() if array is not None}
    wanted = {name: shape for name, shape in results.items() if shape is not None}
    missing = dict.fromkeys(name for name in (*operands, *results) if name not in given and name not in wanted)

    def on_host(*arrays: Any) -> list[np.ndarray]:
        inputs = {name: np.array(array, order="C") for name, array in zip(given, arrays, strict=True)}
        # Outputs that no program writes stay NaN.
        outputs = {name: _unwritten(shape) for name, shape in wanted.items()}
        outputs |= {result: inputs[operand] for operand, result in aliases.items() if operand in inputs}
        with np.errstate(all="ignore"):
            memory = {name: Memory(array) for name, array in (inputs | outputs).items()}
            _interpreted(kernel.fn)[grid](**memory, **missing, **constants)
        return [outputs[name] for name in wanted]

    shapes = [jax.ShapeDtypeStruct(shape.shape, shape.dtype) for shape in wanted.values()]
    return dict.fromkeys(results) | dict(zip(wanted, jax.pure_callback(on_host, shapes, *given.values()), strict=True))


@cache
def _interpreted(function: Callable[..., Any]) -> Any:
    from triton.runtime.interpreter import InterpretedFunction

    return InterpretedFunction(function)


def _dot(_builder: Any, a: Any, b: Any, acc: Any, *_precision: Any) -> Any:
    """Return a b + acc; the interpreter's own version misreads bfloat16 and FP8 as the integers it stores them as."""
    return type(acc)((np.matmul(_wide(a), _wide(b)) + acc.data).astype(acc.data.dtype), acc.dtype.scalar)


def _wide(operand: Any) -> np.ndarray:
    own = {"bf16": ml_dtypes.bfloat16, "fp8e4nv": ml_dtypes.float8_e4m3fn}.get(operand.dtype.scalar.name)
    return (operand.data if own is None else operand.data.view(own)).astype(np.float32)


def _unwritten(shape: jax.ShapeDtypeStruct) -> np.ndarray:
    return np.full(shape.shape, np.nan, shape.dtype)


@contextmanager
def interpreted() -> Iterator[pytest.MonkeyPatch]:
    """Run kernels in the interpreter; skip the test if triton is missing or its interpreter needs an older NumPy."""
    pytest.importorskip("triton", minversion="3.9")
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder
    from triton.runtime.jit import JITFunction

    # Those rewritten before found names in the language that were put back below.
    _interpreted.cache_clear()
    InterpretedFunction.rewritten_fn.clear()
    with pytest.MonkeyPatch.context() as patch:
        # What a kernel calls: its helpers, and the part of triton's own language that is written in it.
        patch.setattr(JITFunction, "__call__", lambda self, *args, **kwargs: _interpreted(self.fn)(*args, **kwargs))
        patch.setattr(InterpreterBuilder, "create_dot", _dot)
        patch.setattr(triton_launch, "launch", launch)
        # The interpreter replaces parts of the language, and of a nested call does not put them back.
        places = [tl, tl.core, tl.math, tl.standard, *(c for c in vars(tl.core).values() if isinstance(c, type))]
        language = [(place, dict(vars(place))) for place in places]
        yield patch
        for place, before in language:
            for name, value in dict(vars(place)).items():
                if name not in before:
                    delattr(place, name)
                elif value is not before[name]:
                    setattr(place, name, before[name])
