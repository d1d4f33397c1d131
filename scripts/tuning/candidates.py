"""Candidate tiles of a call, what they need of a multiprocessor, and how long they take."""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.gpu.models import values
from benchmarks.gpu.timing import measure

from jaxinfer.kernels.triton import triton_launch, tuned
from jaxinfer.kernels.triton.triton_launch import Binary, Target
from tuning.assembler import SHARED, Assembled, assemble
from tuning.problems import KERNELS, Load, Problem, Shape

Entry = Mapping[str, int]
REGISTERS = 8
"""Registers of a thread are allotted in multiples of this; a multiprocessor has 65,536."""


@dataclass(frozen=True)
class Needs:
    """What a candidate's kernel needs of a multiprocessor."""

    assembled: Assembled
    shared_bytes: int
    threads: int
    fits: bool
    """Whether it runs on the device without spills, as many at a time as the work is cut for."""

    def __str__(self) -> str:
        own = self.assembled
        return (
            f"{own.registers} registers, {own.spilled} B spilled, {self.shared_bytes / 1024:.1f} KiB shared, "
            f"{self.threads} threads{'' if self.fits else ': does not fit'}"
        )


class Call:
    """A call of a kernel, traced anew for each candidate."""

    def __init__(self, kernel: str, shape: Shape, target: Target, load: Load):
        self.kernel, self.shape, self._target = kernel, shape, target
        self._problem: Problem = KERNELS[kernel](shape, load, target)
        with tuned.watching() as calls:
            jax.eval_shape(self._problem.call, self._problem.given, self._problem.state)
        key = kernel, tuned.shape_text(shape)
        if key not in calls.estimated:
            raise ValueError(f"{kernel} has no shape {key[1]}; it asks for {', '.join(map(str, calls.estimated))}")
        self.tiles = calls.estimated[key]
        self.estimated: Entry = tuned.entry_of(self.tiles)

    def candidates(self) -> Iterator[Entry]:
        """Yield the estimated tiles, and those around them: half and twice the sizes, other warps and stages."""
        yield self.estimated
        sizes = {
            name: [size for size in (own // 2, own, 2 * own) if 16 <= size <= 256] if name != "block_m" else [own]
            for name, own in self.estimated.items()
            if name in tuned.TILE_SIZES
        }
        stages = [count for count in range(self.estimated["stages"] - 1, self.estimated["stages"] + 2) if count > 0]
        axes = sizes | {"warps": [4, 8], "stages": stages}
        for chosen in itertools.product(*axes.values()):
            if (entry := dict(zip(axes, chosen, strict=True))) != self.estimated:
                yield entry

    def needs(self, entry: Entry) -> Needs:
        """Compile a candidate and return what it needs; no device is used."""
        with compiled() as made, tuned.watching(entry):
            jax.eval_shape(lambda *operands: self._problem.call(*operands), self._problem.given, self._problem.state)
        binary = next(one for one in made if one.name == self.kernel)
        found = assemble(binary.ptx, self._target.capability)
        at_a_time = tuned.changed(self.tiles, entry).decode_programs if self.shape.get("decode") else 1
        room = SHARED.get(self._target.capability, 99) << 10
        registers = REGISTERS * -(-found.registers // REGISTERS) * binary.threads
        fits = not found.spilled and at_a_time * binary.shared_bytes <= room and at_a_time * registers <= 65536
        return Needs(found, binary.shared_bytes, binary.threads, fits)

    def seconds(self, entry: Entry) -> float:
        """Measure a candidate on the device: median seconds of a call."""
        given, states = self._filled(self._problem.given), [self._filled(self._problem.state)]
        run = jax.jit(lambda given, state: self._problem.call(given, state), donate_argnums=1)
        with tuned.watching(entry):
            program = run.lower(given, states[0]).compile()

        def once() -> Any:
            made, states[0] = program(given, states[0])
            return made

        return measure(once).median

    def _filled(self, tree: Any) -> Any:
        """Return arrays on the device: random values in place of shapes."""
        leaves, form = jax.tree.flatten(tree)
        return jax.tree.unflatten(form, [_filled(leaf, number) for number, leaf in enumerate(leaves)])


def _filled(leaf: Any, number: int) -> jax.Array:
    if isinstance(leaf, np.ndarray | np.generic | int):
        return jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        made = np.random.default_rng(number).integers(0, 100, leaf.shape)
        return jnp.asarray(made.astype(leaf.dtype))
    return jax.jit(values, static_argnums=(1, 2))(jnp.uint32(number), leaf.shape, leaf.dtype)


@contextmanager
def compiled() -> Iterator[list[Binary]]:
    """Collect the kernels of all calls traced in this context, in order."""
    made: list[Binary] = []
    real = triton_launch.binary

    def binary(*args: Any) -> Binary:
        made.append(real(*args))
        return made[-1]

    with mock.patch.object(triton_launch, "binary", binary):
        yield made
