"""Divide a device's memory between weights, temporaries of steps, arrays beside the cache, and the cache.

Temporaries are read from the compiled programs (`memory_analysis`) before the cache is allocated. They hardly depend on
the cache's size, but the shapes of the programs do. So the programs are compiled for a first candidate of the size, and
again for the size that their temporaries leave, unless the two are nearly equal.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxinfer._utils import html
from jaxinfer._utils.units import size_text
from jaxinfer.config import EngineConfig
from jaxinfer.engine.runner.buckets import copy_widths, encode_key, encode_shape, largest_buckets, mixed_bucket
from jaxinfer.engine.runner.device_state import (
    abstract_cache,
    abstract_draft_cache,
    abstract_edits,
    abstract_features,
    abstract_rows,
)
from jaxinfer.engine.runner.draft_steps import largest_keys
from jaxinfer.engine.runner.keys import Copies, EncodeCross, Key
from jaxinfer.engine.runner.logits import programs as programs_of
from jaxinfer.engine.runner.programs import Programs
from jaxinfer.engine.runner.shapes import Shapes
from jaxinfer.engine.runner.warmup import default_threads
from jaxinfer.errors import CapacityError, ConfigError
from jaxinfer.functional import Program
from jaxinfer.recording import palette
from jaxinfer.sharding import Mesh, placement
from jaxinfer.sharding import mesh as meshes

FIRST_GUESS = 6
"""Number of arrays of logits that the sampler's highest level keeps at a time in a program for an H100. The first
candidate leaves as much memory; a wrong guess costs a compilation, not memory."""
LEAST_GAIN = 0.02
"""Smallest gain, as a fraction of the cache, for which programs are compiled a second time."""
ROUNDS = 4
REMEDY = (
    "lower max_num_batched_tokens or max_num_seqs, divide the model over more devices (tensor_parallel_size), raise "
    "gpu_memory_utilization, or let JAX's allocator take more than 75% of the memory (XLA_CLIENT_MEM_FRACTION)"
)
ROUNDING = 4096
"""Memory in use is rounded up to the limit divided by this, so that a difference of a few bytes compiles no other
programs."""


@dataclass(frozen=True)
class Budget:
    """Memory that the cache may take."""

    size: int
    """Bytes over all devices."""
    source: str
    """Origin of the size, for log lines and errors."""
    remedy: str = "raise kv_cache_memory_bytes"


@dataclass(frozen=True)
class DeviceMemory:
    """Memory, in bytes, of the device that has the least left once the weights are loaded."""

    limit: int
    """Bytes that JAX's allocator may take."""
    in_use: int
    weights: int
    share: float
    """Fraction of the limit that weights, cache and steps may take together (`gpu_memory_utilization`)."""

    @property
    def left(self) -> int:
        """Bytes of the share that are not in use."""
        unit = max(1, self.limit // ROUNDING)
        return int(self.limit * self.share) - math.ceil(self.in_use / unit) * unit

    def budget(self, temporaries: int | None, arrays: int, devices: int) -> Budget:
        """Return the cache's budget over all devices.

        Args:
            temporaries: bytes of temporaries of steps on each device; None if neither they nor `arrays` are known yet.
            arrays: bytes of arrays beside the cache on each device.
            devices: number of devices.
        """
        beside = "memory of steps and the sampler not counted yet"
        if temporaries is not None:
            beside = (
                f"{size_text(temporaries)} of temporaries of steps and {size_text(arrays)} of arrays beside the cache"
            )
        source = (
            f"gpu_memory_utilization {self.share:g} of the {size_text(self.limit)} a device that JAX's allocator has, "
            f"less {size_text(self.in_use)} in use (weights {size_text(self.weights)}), {beside}"
        )
        return Budget(max(0, self.left - (temporaries or 0) - arrays) * devices, source, REMEDY)


@dataclass(frozen=True, repr=False)
class MemoryUse:
    """Bytes in use on each device, by purpose."""

    weights: int
    cache: int
    arrays: int
    """Arrays of the sampler and of encoders, beside the cache."""
    temporaries: int | None = None
    """Most temporaries of a step, as reported by its program; None if not measured."""
    other: int = 0
    """Memory in use outside of the engine."""
    limit: int | None = None
    """Bytes that JAX's allocator may take; None if no limit is known."""

    @property
    def total(self) -> int:
        """Sum of all uses."""
        return self.weights + self.cache + self.arrays + (self.temporaries or 0) + self.other

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by purpose, those that are known."""
        parts = {"weights": self.weights, "cache": self.cache, "arrays of sampler and encoders": self.arrays}
        if self.temporaries is not None:
            parts["temporaries of steps"] = self.temporaries
        return parts | {"other use": self.other} if self.other else parts

    def __str__(self) -> str:
        text = ", ".join(f"{name} {size_text(size)}" for name, size in self.parts.items())
        limit = "" if self.limit is None else f" of {size_text(self.limit)}"
        return f"memory of a device: {text}; {size_text(self.total)}{limit}"

    def __repr__(self) -> str:
        return f"MemoryUse({self})"

    def _repr_html_(self) -> str:
        sizes = zip(palette.OWNERS, self.parts.items())
        parts = [(colour, size, f"{name}: {size_text(size)}") for colour, (name, size) in sizes]
        limit = "" if self.limit is None else f" of {size_text(self.limit)}"
        head = f'<p class="dim">Memory of a device: {size_text(self.total)}{limit}</p>'
        return html.element(head, html.bar(parts, self.limit or self.total))

    def gauges(self) -> dict[str, float]:
        """Return the known sizes by the names of metrics."""
        sizes = {
            "weights": self.weights,
            "kv_cache": self.cache,
            "device_arrays": self.arrays,
            "step_temporaries": self.temporaries,
            "memory_limit": self.limit,
        }
        return {f"{name}_bytes": size for name, size in sizes.items() if size is not None}


@dataclass(frozen=True)
class Fitted:
    """Shapes that fit in memory, with the programs whose temporaries were measured."""

    shapes: Shapes
    programs: Programs
    budget: Budget
    use: MemoryUse


def memory_stats(device: jax.Device) -> Mapping[str, int]:
    """Return the statistics of JAX's allocator on a device; empty if it has no limit, as on a CPU."""
    return {} if device.platform == "cpu" else device.memory_stats() or {}


def device_memory(mesh: Mesh, params: Sequence[jax.Array], share: float) -> DeviceMemory | None:
    """Read the memory of the mesh's devices, the same in every process; None if there is no limit."""
    found = [memory_stats(device) for device in mesh.local_devices]
    if any("bytes_limit" not in stats for stats in found):
        return None
    weights = device_bytes(params)
    sizes = [(stats["bytes_limit"], max(stats.get("bytes_in_use", 0), weights)) for stats in found]
    if meshes.processes(mesh) > 1:  # in MiB, as JAX's integers have 32 bits
        mine = np.array([[limit >> 20, -(-used >> 20)] for limit, used in sizes], np.int32)
        gathered = multihost_utils.process_allgather(mine).reshape(-1, 2)
        sizes = [(int(limit) << 20, int(used) << 20) for limit, used in gathered]
    return min((DeviceMemory(limit, used, weights, share) for limit, used in sizes), key=lambda one: one.left)


def device_bytes(arrays: Any) -> int:
    """Return the bytes that arrays, or their shapes, take on each device."""
    return sum(map(placement.device_bytes, jax.tree.leaves(arrays)))


def beside_cache(program: Program, shapes: Shapes) -> int:
    """Return the bytes of the arrays that a runner keeps on each device beside weights and cache."""
    made = [abstract_edits(program, shapes), abstract_rows(program, shapes)]
    return device_bytes([*made, abstract_features(program, shapes)] if shapes.feature_slots else made)


def memory_use(
    program: Program,
    params: Sequence[Any],
    shapes: Shapes,
    device: DeviceMemory | None = None,
    temporaries: int | None = None,
) -> MemoryUse:
    """Return the memory that an engine of these shapes takes on each device; `params` with those of a draft model."""
    weights, cache = device_bytes(params), device_bytes(abstract_cache(program, shapes))
    cache += device_bytes(abstract_draft_cache(program, shapes))
    beside = {} if device is None else {"other": device.in_use - weights, "limit": device.limit}
    return MemoryUse(weights, cache, beside_cache(program, shapes), temporaries, **beside)


def fit(
    program: Program,
    params: Sequence[Any],
    config: EngineConfig,
    device: DeviceMemory,
    choose: Callable[[Budget], Shapes],
    *,
    draft_params: Sequence[Any] = (),
) -> Fitted:
    """Size the cache by the temporaries of the largest steps; return the shapes and the compiled programs.

    Args:
        program: static part of the model.
        params: its parameters, or their shapes and shardings.
        config: engine settings.
        device: memory to divide.
        choose: function from a budget to shapes.
        draft_params: as `params`, of the draft model.

    Raises:
        CapacityError: too little memory is left for a cache; names all figures and the settings to change.
    """
    shapes, found = _first_candidate(program, device, choose), []
    for _ in range(ROUNDS):
        fitted = _measured(program, (params, draft_params), config, device, shapes)
        if fitted.use.total <= device.in_use + device.left:
            found.append(fitted)
        try:
            shapes = choose(fitted.budget)
        except CapacityError:
            if not found:
                raise
            break
        if fitted in found and _nearly(fitted.shapes, shapes):
            return fitted
    if found:  # XLA's attention needs more for longer sequences, so that a size may fit and the next one not
        return max(found, key=lambda fitted: fitted.use.cache)
    raise CapacityError(
        f"no cache fits in memory together with the steps' temporaries ({fitted.budget.source}); {REMEDY}"
    )


def _first_candidate(program: Program, device: DeviceMemory, choose: Callable[[Budget], Shapes]) -> Shapes:
    """Return shapes that leave memory for the likely temporaries of steps.

    Raises:
        CapacityError: no cache fits, even without temporaries.
    """
    shapes = choose(device.budget(None, 0, program.mesh.size))
    arrays = beside_cache(program, shapes)
    guess = FIRST_GUESS * shapes.rows * program.vocab * 4 // meshes.size(program.mesh)
    if arrays + guess < device.left // 2:
        with suppress(CapacityError):  # a guess is no reason to fail
            return choose(device.budget(guess, arrays, program.mesh.size))
    return shapes


def _measured(
    program: Program,
    weights: tuple[Sequence[Any], Sequence[Any]],
    config: EngineConfig,
    device: DeviceMemory,
    shapes: Shapes,
) -> Fitted:
    """Compile the programs of these shapes; return them with their memory use and the budget left for the cache.

    `weights`: parameters of the model, and of its draft model.
    """
    params, draft_params = weights
    programs = Programs(program, shapes, params, config.compiler_options, draft_params=draft_params)
    use = memory_use(program, [*params, *draft_params], shapes, device, measure(program, shapes, programs))
    programs.room = device.limit - (use.total - use.temporaries)
    return Fitted(shapes, programs, device.budget(use.temporaries, use.arrays, program.mesh.size), use)


def _nearly(shapes: Shapes, better: Shapes) -> bool:
    """Return whether `better` shapes are equal to `shapes`, or have only a few more blocks."""
    ends = (shapes.rows, shapes.max_length, shapes.width) == (better.rows, better.max_length, better.width)
    slots = better.state_slots - shapes.state_slots <= LEAST_GAIN * better.state_slots
    return ends and slots and better.num_blocks - shapes.num_blocks <= LEAST_GAIN * better.num_blocks


def largest_programs(program: Program, shapes: Shapes) -> list[Key]:
    """Return the keys of the programs that need the most memory: each sampler level includes those below it."""
    steps: list[Key] = [mixed_bucket(program, shapes)]
    if not program.deterministic:
        steps = [key for bucket in largest_buckets(program, shapes) for key in programs_of(shapes, bucket)]
    keys: list[Key] = [*dict.fromkeys(steps), Copies(copy_widths(shapes)[-1])]
    if program.draft is not None:
        keys += largest_keys(program, shapes)
    if shapes.encode_buckets:
        keys.append(encode_key(program, shapes, shapes.encode_buckets[-1]))
    if shapes.cross_buckets:
        keys.append(EncodeCross(**vars(encode_shape(program, shapes, shapes.cross_buckets[-1]))))
    return keys


def measure(program: Program, shapes: Shapes, programs: Programs) -> int:
    """Compile the largest steps and return the most bytes that one of them needs on a device beside its arguments."""
    keys = largest_programs(program, shapes)
    programs.prepare(keys, min(len(keys), default_threads()), lambda key: None)
    if not programs.temporaries.keys() >= set(keys):
        raise ConfigError(
            "this JAX backend does not report the memory that a compiled program needs; set kv_cache_memory_bytes"
        )
    most = max(programs.temporaries[key] for key in keys)
    if meshes.processes(program.mesh) > 1:
        most = int(np.max(multihost_utils.process_allgather(np.int32(-(-most >> 10))))) << 10
    return most
