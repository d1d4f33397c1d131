"""Time and count a layer alone: several calls in one program, each with its own weights."""

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.gpu.models import values
from benchmarks.gpu.projections import Way, chained, copies_of
from jaxinfer.layers.linear import use_fusion, use_kernel

PASS = 0.01
"""Minimum seconds of a pass, so that host time overlaps with device time, and a disturbance of the machine spans
several passes."""
_PRODUCT = re.compile(r' dot\(|custom_call_target="(?:__cublas|__onednn|jaxinfer_)[^"]*(?:gemm|matmul)')


@dataclass(frozen=True)
class Layer:
    """Module with random parameters, and the settings with which the engine would run it."""

    make: Callable[[], nnx.Module]
    kernel: str
    """Implementation of its matrix products (`kernels.matmul`)."""
    fused: bool
    """Argument of `layers.linear.use_fusion`."""
    options: Mapping[str, Any]
    """Compiler options."""


@dataclass(frozen=True)
class Calls:
    """Compiled program of several calls, with its arguments."""

    compiled: jax.stages.Compiled
    arguments: tuple[Any, ...]
    count: int
    """Number of calls in the program."""

    @classmethod
    def of(cls, layer: Layer, shapes: Sequence[tuple[int, ...]], dtype: jnp.dtype, count: int | None = None) -> "Calls":
        """Compile calls `layer(*inputs)` with inputs of these shapes; by default so many that weights leave the
        caches between uses.
        """
        module = nnx.eval_shape(layer.make)
        use_kernel(module, layer.kernel)
        use_fusion(module, layer.fused)
        graph, state = nnx.split(module)
        leaves, tree = jax.tree.flatten(state)
        way = Way(lambda x, weights: nnx.merge(graph, jax.tree.unflatten(tree, weights))(*x), dict(layer.options))
        count = count or copies_of(sum(leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in leaves), shapes[0][0])
        make = jax.jit(values, static_argnums=(1, 2))
        inputs = [tuple(make(jnp.uint32(call), shape, dtype) for shape in shapes) for call in range(count)]
        weights = [
            [make(jnp.uint32(count + call * len(leaves) + i), leaf.shape, leaf.dtype) for i, leaf in enumerate(leaves)]
            for call in range(count)
        ]
        lowered = chained(way).lower(inputs, weights)
        return cls(lowered.compile(compiler_options=way.options or None), (inputs, weights), count)

    @property
    def products(self) -> float:
        """Matrix products per call."""
        return products(self.compiled) / self.count

    def timer(self) -> Callable[[], float]:
        """Return a function that times a pass of at least `PASS` seconds and returns seconds per call."""
        passes: list[int] = []

        def run() -> float:
            start = time.perf_counter()
            for _ in range(passes[0] if passes else 1):
                result = self.compiled(*self.arguments)
            jax.block_until_ready(result)
            seconds = time.perf_counter() - start
            if passes:
                return seconds / passes[0] / self.count
            passes.append(max(1, round(PASS / seconds)))
            return seconds / self.count

        return run


def products(compiled: jax.stages.Compiled) -> int:
    """Count the matrix products of a program; a batched product counts once."""
    return len(_PRODUCT.findall(compiled.as_text()))


def cost(compiled: jax.stages.Compiled) -> dict[str, float]:
    """Return the operations and the bytes read and written, as counted by XLA; 0 for jaxinfer's own kernels."""
    found = compiled.cost_analysis()
    return {"gflops": found["flops"] / 1e9, "gigabytes": found["bytes accessed"] / 1e9}
