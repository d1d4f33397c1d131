"""Time a model's steps under several placements, with random weights, in turns."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxinfer import functional
from jaxinfer.checkpoint import rules
from jaxinfer.engine.sampling.sampler import sample
from jaxinfer.engine.sampling.sampling_rows import Level, SamplingRows
from jaxinfer.functional import Array, DecodeBatch, PrefillBatch, Program
from jaxinfer.kernels.attention.paged import KVCache
from jaxinfer.loading import weights
from jaxinfer.sharding import make_mesh
from jaxinfer.sharding import mesh as meshes
from jaxinfer.sharding.collectives import DECODE, ENCODE
from jaxinfer.sharding.policy import REPLICATE, Placement

BLOCK = 16
"""Positions per cache block."""
WARMUP = 2
"""Warm-up passes of each variant; the first one compiles."""
Run = Callable[[], float]
"""Function that runs one pass and returns its seconds."""


@dataclass(frozen=True)
class Step:
    """Step to measure."""

    kind: str
    """"decode", "prefill" or "encode"."""
    size: int
    """Rows of a decode step, tokens of a prefill, inputs of an encoder step."""
    context: int = 1
    """Context length of each sequence of a decode step, in tokens."""

    def __str__(self) -> str:
        return f"{self.kind} {self.size}"


def devices(count: int | None) -> None:
    """Create `count` virtual CPU devices; None uses the existing devices.

    Raises:
        ValueError: JAX was already started, with fewer devices.
    """
    if count is None:
        return
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX is already started, perhaps with enough devices
        pass
    if len(jax.devices()) < count:
        raise ValueError(
            f"--devices {count}: JAX has started with {len(jax.devices())} device(s); run this in a process of its own"
        )


def mesh_of(sizes: Mapping[str, int] | None, shards: int | None) -> Mesh:
    """Return the mesh of these axes, or of this number of shards; by default over all devices."""
    if sizes is None:
        return make_mesh(shards or len(jax.devices()))
    count = int(np.prod(list(sizes.values())))
    if count > len(jax.devices()):
        raise RuntimeError(f"--mesh has {count} devices, JAX sees {len(jax.devices())}; see --devices")
    kinds = (AxisType.Auto,) * len(sizes)
    made = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=jax.devices()[:count])
    return meshes.normalise(made, shards)


class Model:
    """Model with any placement; every weight is stored twice, sharded and replicated."""

    def __init__(self, hf: Mapping[str, Any], mesh: Mesh, *, dtype: str = "auto", **how: Any):
        self.mesh, self.how = mesh, how
        stored = str(hf.get("dtype") or hf.get("torch_dtype") or "bfloat16")
        self.dtype = weights.resolve_dtype(dtype, stored, mesh.devices.flat[0].platform)
        make = partial(weights.random, hf, mesh, dtype=self.dtype.name, **how)
        self._weights = {
            whole: rules.parameters(make(placement=placement))
            for whole, placement in ((False, Placement()), (True, Placement({"*": REPLICATE})))
        }

    def program(self, hf: Mapping[str, Any], placement: Mapping[str, str]) -> tuple[Program, list[jax.Array]]:
        """Return the program and the parameters of the model, or of a shortened one, under a placement."""
        model_family, config = weights.parse(hf)
        how = dict(hf=hf, placement=Placement.of(placement), **self.how)
        module = weights.abstract_stored(model_family, config, self.dtype, self.mesh, **how)
        program, _ = functional.split(module, self.mesh)
        params = rules.parameters(module).items()
        return program, [self._weights[param.get_metadata()["replicated"]][path][...] for path, param in params]


def runner(program: Program, params: Sequence[jax.Array], step: Step) -> Run:
    """Compile a step with its arguments; return a function that runs it repeatedly."""
    if step.kind == ENCODE:
        features = program.module(params).config.features
        inputs = jnp.zeros((step.size, *features.shape), program.dtype)
        encode = jax.jit(functional.encode, static_argnums=0)
        return lambda: timed(lambda: encode(program, params, inputs))
    rows, length = (step.size, step.context) if step.kind == DECODE else (1, step.size)
    width = -(-length // BLOCK)
    cache = functional.init_cache(program, rows * width, BLOCK)
    tables = np.arange(rows * width, dtype=np.int32).reshape(rows, width)
    if step.kind == DECODE:
        batch = DecodeBatch(np.zeros(rows, np.int32), np.full(rows, length - 1, np.int32), tables)
    else:
        batch = functional.prefill_batch([(np.zeros(length, np.int32), 0, length)], tables, tile=program.tile)
    placed = jax.tree.map(lambda array: array.sharding, cache)
    compiled = jax.jit(partial(greedy, program), donate_argnums=1, out_shardings=(None, placed))
    held = [cache]

    def run() -> float:
        def call() -> jax.Array:
            tokens, held[0] = compiled(params, held[0], batch)
            return tokens

        return timed(call)

    return run


def greedy(
    program: Program, params: Sequence[Array], cache: list[KVCache], batch: DecodeBatch | PrefillBatch
) -> tuple[jax.Array, list[KVCache]]:
    """Return the most likely next tokens and the cache."""
    body = functional.decode if isinstance(batch, DecodeBatch) else functional.prefill
    logits, cache = body(program, params, cache, batch)
    unasked = SamplingRows(*[jnp.zeros(len(logits))] * len(SamplingRows._fields))
    return sample(logits, unasked, None, Level.GREEDY)[0], cache


def timed(call: Callable[[], Any]) -> float:
    """Return the seconds until the result of a call is ready."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def in_turns(runs: Mapping[str, Run], repeats: int, seconds: float = 0.0) -> dict[str, list[float]]:
    """Run `repeats` rounds of all passes in turns, so that a disturbance of the machine affects all of them; return
    seconds by round.

    `seconds`: minimum duration; further rounds run until it is reached.
    """
    for run in runs.values():
        for _ in range(WARMUP):
            run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    number, end = 0, time.perf_counter() + seconds
    while number < repeats or time.perf_counter() < end:
        for name in list(runs)[:: -1 if number % 2 else 1]:
            found[name].append(runs[name]())
        number += 1
    return found


def measure(
    model: Model, variants: Mapping[str, tuple[Mapping[str, Any], Mapping[str, str]]], step: Step, repeats: int
) -> dict[str, list[float]]:
    """Return the seconds of a step for each variant, a config.json with a placement."""
    runs = {name: runner(*model.program(hf, placement), step) for name, (hf, placement) in variants.items()}
    return in_turns(runs, repeats)
