"""How long a model's steps take under several placements, with random weights, in turns."""

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
from jaxinfer.kernels.attention.paged import Lane
from jaxinfer.loading import weights
from jaxinfer.sharding import make_mesh
from jaxinfer.sharding import mesh as meshes
from jaxinfer.sharding.collectives import DECODE, ENCODE
from jaxinfer.sharding.policy import REPLICATE, Placement

BLOCK = 16
"""Positions of a block of the cache."""
WARMUP = 2
"""Passes of each that do not count; the first compiles."""
Run = Callable[[], float]
"""One pass; its seconds."""


@dataclass(frozen=True)
class Step:
    """A step to be measured."""

    kind: str
    """"decode", "prefill" or "encode"."""
    size: int
    """Rows of a decode step, tokens of a prefill, inputs of an encoder."""
    context: int = 1
    """Tokens of each sequence that decode attends to."""

    def __str__(self) -> str:
        return f"{self.kind} {self.size}"


def devices(count: int | None) -> None:
    """Makes `count` virtual CPU devices; None: those there are serve.

    Raises:
        ValueError: JAX has started already, with fewer.
    """
    if count is None:
        return
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # it has started: what it has may be enough
        pass
    if len(jax.devices()) < count:
        raise ValueError(
            f"--devices {count}: JAX has started with {len(jax.devices())} device(s); run this in a process of its own"
        )


def mesh_of(sizes: Mapping[str, int] | None, shards: int | None) -> Mesh:
    """The mesh of these axes, or of so many shards; by default over all devices."""
    if sizes is None:
        return make_mesh(shards or len(jax.devices()))
    count = int(np.prod(list(sizes.values())))
    if count > len(jax.devices()):
        raise RuntimeError(f"--mesh has {count} devices, JAX sees {len(jax.devices())}; see --devices")
    kinds = (AxisType.Auto,) * len(sizes)
    made = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=jax.devices()[:count])
    return meshes.normalise(made, shards)


class Model:
    """One model under any placement; every weight is there twice, divided and whole."""

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
        """The model, or one with fewer of its layers, under a placement."""
        served, config = weights.parse(hf)
        module = weights.abstract(served, config, self.dtype, self.mesh, placement=Placement.of(placement), **self.how)
        program, _ = functional.split(module, self.mesh)
        params = rules.parameters(module).items()
        return program, [self._weights[param.get_metadata()["replicated"]][path][...] for path, param in params]


def runner(program: Program, params: Sequence[jax.Array], step: Step) -> Run:
    """The compiled step with all that it takes, to be run again and again."""
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
    lanes = [cache]

    def run() -> float:
        def call() -> jax.Array:
            tokens, lanes[0] = compiled(params, lanes[0], batch)
            return tokens

        return timed(call)

    return run


def greedy(
    program: Program, params: Sequence[Array], cache: list[Lane], batch: DecodeBatch | PrefillBatch
) -> tuple[jax.Array, list[Lane]]:
    """The likeliest next tokens, and the cache."""
    body = functional.decode if isinstance(batch, DecodeBatch) else functional.prefill
    logits, cache = body(program, params, cache, batch)
    unasked = SamplingRows(*[jnp.zeros(len(logits))] * len(SamplingRows._fields))
    return sample(logits, unasked, None, Level.GREEDY)[0], cache


def timed(call: Callable[[], Any]) -> float:
    """Seconds until what it gives is there."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def in_turns(runs: Mapping[str, Run], repeats: int, seconds: float = 0.0) -> dict[str, list[float]]:
    """Seconds of `repeats` passes of each, by round: what disturbs the machine for a while disturbs all alike.

    `seconds`: rounds go on for as long, where `repeats` of them take less.
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
    """Seconds of a step for each variant: a config.json and a placement."""
    runs = {name: runner(*model.program(hf, placement), step) for name, (hf, placement) in variants.items()}
    return in_turns(runs, repeats)
