"""Build the engines of a simulation: one without a device, from config.json alone, and a real one to compare with."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxinfer import LLM
from jaxinfer.checkpoint.hf import read_config
from jaxinfer.checkpoint.hub import resolve_model
from jaxinfer.config import EngineConfig
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.sizing.memory import Budget
from jaxinfer.engine.sizing.settings import HostSettings
from jaxinfer.engine.sizing.setup import choose_shapes, default_budget
from jaxinfer.errors import CapacityError, ConfigError
from jaxinfer.functional import split
from jaxinfer.loading import weights
from jaxinfer.loading.plan import FILES
from jaxinfer.loading.plan import plan as make_plan
from jaxinfer.sharding import Plan, make_mesh
from simulating.runner import Clock, SimulatedRunner
from simulating.times import Device, Roofline, StepTimes

UNSUPPORTED = ("features", "cross")
"""Inputs of a model beside tokens, which a trace does not have."""


@dataclass(frozen=True)
class Simulated:
    """An engine without a device."""

    engine: Engine
    clock: Clock
    times: StepTimes
    plan: Plan
    """Where the weights lie, and what fits beside them."""


def on_device(model: str | Path, device: Device, devices: int, step_bytes: int, settings: dict[str, Any]) -> Simulated:
    """Build the engine that a model would have on GPUs.

    Args:
        model: a folder with config.json, or a Hub id.
        device: each of the GPUs.
        devices: their number.
        step_bytes: memory of each for temporaries of steps.
        settings: of `EngineConfig`.

    Raises:
        CapacityError: the weights leave no room for a cache.
        ConfigError: the model, a setting or their combination is not supported.
    """
    settings = {"gpu_memory_utilization": 0.9} | settings
    planned = ("dtype", "quantization", "block_size", "gpu_memory_utilization", "max_num_seqs", "placement")
    made = make_plan(
        model,
        tensor_parallel_size=devices,
        memory=device.memory,
        step_bytes=step_bytes,
        **{name: settings[name] for name in planned if name in settings},
    )
    if not made.tokens:
        raise CapacityError(
            f"the weights take {made.device_bytes / 2**30:.1f} GiB of the {device.memory / 2**30:.1f} GiB of each of "
            f"{devices} x {device.name}, which leaves no room for a cache; raise --tensor-parallel-size"
        )
    config = _config({**settings, "tensor_parallel_size": devices, "attention_kernel": "xla"})
    module, dtype, mesh = _module(model, config, made)
    budget = Budget(made.cache_bytes * devices, f"{device.name} without the weights", "raise --memory")
    return _simulated(module, dtype, mesh, config, budget, "gpu", Roofline(device, module, made, dtype.itemsize), made)


def like_this_machine(model: str | Path, times: StepTimes, settings: dict[str, Any]) -> Simulated:
    """Build the engine that a model has on this machine's CPU, with the step times that were measured here."""
    config = _config(settings)
    made = make_plan(model, **{name: settings[name] for name in ("dtype", "quantization") if name in settings})
    module, dtype, mesh = _module(model, config, made)
    program, _ = split(module, mesh)
    return _simulated(module, dtype, mesh, config, default_budget(program, config), "cpu", times, made)


def _config(settings: dict[str, Any]) -> EngineConfig:
    """Return the settings of an engine; raises ConfigError for one that step times do not know."""
    config = EngineConfig.of(settings)
    if config.kv_cache_dtype != "auto":
        raise ConfigError(
            f"kv_cache_dtype is {config.kv_cache_dtype!r}, which the simulator does not support; leave it out"
        )
    return config


def _module(model: str | Path, config: EngineConfig, made: Plan) -> Any:
    directory = resolve_model(model, None, patterns=FILES)
    family, parsed = weights.parse(hf := read_config(directory, None), directory)
    stored = weights.config_dtype(hf) or family.stored_dtype
    dtype = weights.resolve_dtype(config.dtype, stored, "gpu", family)
    mesh = make_mesh(made.devices)
    how = dict(hf=hf, directory=directory, quantization=config.quantization)
    return weights.abstract_stored(family, parsed, dtype, mesh, **how), dtype, mesh


def _simulated(
    module: Any,
    dtype: Any,
    mesh: Any,
    config: EngineConfig,
    budget: Budget,
    platform: str,
    times: StepTimes,
    made: Plan,
) -> Simulated:
    program, params = split(module, mesh, deterministic=config.deterministic)
    if program.features is not None or program.cross is not None:
        raise CapacityError("the model reads images, audio or an encoder's input, which traces do not have")
    shapes = choose_shapes(module.config, program, config, budget, platform=platform)
    clock = Clock()
    runner = SimulatedRunner(program, params, shapes, times, clock)
    settings = replace(HostSettings.of(config, runner), log_interval=math.inf)
    return Simulated(Engine(runner, settings), clock, times, made)


def real(model: str | Path, settings: dict[str, Any]) -> LLM:
    """Load a model on this machine and compile the programs of greedy requests."""
    llm = LLM(str(model), skip_tokenizer_init=True, use_tqdm=False, **settings)
    llm.warmup(sampling=[])
    return llm
