"""Plan of a model from its config.json: needs no weights and no devices, and takes seconds for any size."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxinfer.checkpoint.hf import apply_overrides, read_config
from jaxinfer.checkpoint.hub import resolve_model
from jaxinfer.checkpoint.manifest import NAME, Manifest
from jaxinfer.checkpoint.packed.declared import FILES as QUANTISED
from jaxinfer.checkpoint.packed.declared import declared
from jaxinfer.checkpoint.safetensors import SafetensorsReader
from jaxinfer.config import EngineConfig
from jaxinfer.engine.sampling import sampler
from jaxinfer.engine.sizing import slots as slots_of
from jaxinfer.errors import ConfigError
from jaxinfer.kernels.attention.choose import check_cache_dtype
from jaxinfer.kv import cache as kv_cache
from jaxinfer.kv import groups
from jaxinfer.kv.spec import State, with_codes
from jaxinfer.loading import adapters, weights
from jaxinfer.loading.draft import DraftCheckpoint
from jaxinfer.models.base import Family, LanguageModel
from jaxinfer.sharding import axes, placement
from jaxinfer.sharding import mesh as meshes
from jaxinfer.sharding.collectives import STEPS
from jaxinfer.sharding.placement import Plan
from jaxinfer.sharding.placement_rows import CacheLayer, CachePlan, Exchange
from jaxinfer.sharding.policy import Placement

log = logging.getLogger(__name__)

FILES = ("config.json", NAME, *QUANTISED)
"""Files fetched for a Hub id."""


def plan(
    model: str | Path | Mapping[str, Any],
    *,
    tensor_parallel_size: int | None = None,
    mesh: Any = None,
    memory: int | None = None,
    step_bytes: int = 0,
    revision: str | None = None,
    hf_overrides: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Plan:
    """Plan where every weight is placed, what each device holds and what a step communicates.

    `LLM` with the same arguments places its weights accordingly.

    Args:
        model: a folder with a config.json, a Hub id whose config.json is cached or can be fetched, or the contents of a
            config.json.
        tensor_parallel_size: number of devices that weights and kv heads are divided over; 1 if neither it nor `mesh`
            is given.
        mesh: a `Mesh`, an `AbstractMesh` (which needs no devices), or the sizes of its axes: `{"data": 2, "model": 4}`.
        memory: memory of a device in bytes that JAX's allocator may take; if given, the plan states how many tokens the
            cache holds.
        step_bytes: bytes of a device for temporaries of steps and arrays of the sampler. An engine measures them on its
            compiled programs at start (log, metrics `step_temporaries_bytes` and `device_arrays_bytes`); with 0 the
            plan divides memory between weights and cache alone.
        revision: revision of the Hub id.
        hf_overrides: values that override config.json.
        settings: `placement`, `pad_heads`, `dtype`, `quantization`, `block_size`, `gpu_memory_utilization`,
            `max_adapters`, `max_adapter_rank` and `speculative_config` (for a draft model) of `EngineConfig`; for
            models with recurrent layers also `max_num_seqs`, `snapshot_memory_fraction` and `enable_prefix_caching`.

    Raises:
        ConfigError: an architecture, size, mesh or placement is not supported, or something is not divisible over the
            mesh.
        CheckpointError, OfflineError: there is no config.json.
        TypeError: a setting does not exist.
    """
    directory, hf = _find(model, revision, hf_overrides)
    if tensor_parallel_size is not None:
        settings = settings | {"tensor_parallel_size": tensor_parallel_size}
    config = EngineConfig.of(settings)
    _check_bytes(memory, step_bytes)
    mesh = meshes.normalise(_mesh(mesh, config.tensor_parallel_size), tensor_parallel_size)
    if mesh.shape.get(axes.FSDP, 1) > 1:
        raise ConfigError(
            f"mesh: axis {axes.FSDP!r} of size {mesh.shape[axes.FSDP]} divides weights that each layer gathers, and a "
            "plan does not list these collectives; leave it out"
        )
    model_family, parsed = weights.parse(hf, directory)
    dtype, how = _settings(config, hf, directory, model_family)
    check_cache_dtype(config.kv_cache_dtype, dtype)
    module = _module(model_family, parsed, dtype, mesh, hf, directory, how)
    adapters.add_room(module, config, mesh)
    draft = _draft(config, mesh)
    made = placement.plan(
        module,
        mesh,
        itemsize=dtype.itemsize,
        more=_sampling(module, dtype),
        cache=cache_plan(module, config, dtype, mesh, 0 if draft is None else draft.cache.block_device_bytes),
        model=_title(model, hf),
        patterns=how["placement"].patterns,
        memory=memory,
        share=config.gpu_memory_utilization,
        step_bytes=step_bytes,
        draft_bytes=0 if draft is None else draft.device_bytes,
    )
    return _with_states(made, config)


def _draft(config: EngineConfig, mesh: Mesh | AbstractMesh) -> Plan | None:
    """Return the plan of the settings' draft model, if they have one."""
    draft = DraftCheckpoint.find(config, patterns=FILES)
    if draft is None:
        return None
    draft.check_layers(config, mesh)
    names = "dtype", "pad_heads", "block_size", "kv_cache_dtype"
    return plan(draft.name, mesh=mesh, **{name: getattr(config, name) for name in names})


def _module(
    model_family: Family,
    parsed: Any,
    dtype: jnp.dtype,
    mesh: Mesh | AbstractMesh,
    hf: Mapping[str, Any],
    directory: Path | None,
    how: Mapping[str, Any],
) -> LanguageModel:
    """Build the module that `LLM` would load: by the folder's tensors or, without, by config.json."""
    if directory is not None and Manifest.read(directory) is not None:
        return weights.abstract(model_family, parsed, dtype, mesh, **how)
    how = dict(hf=hf, directory=directory, **how)
    if directory is None or declared(hf, directory) is None or not any(directory.glob("*.safetensors")):
        return weights.abstract_stored(model_family, parsed, dtype, mesh, **how)
    with SafetensorsReader(directory) as reader:
        settled, source = weights.match_tensors(model_family, parsed, hf, reader, directory)
        return weights.abstract_stored(model_family, settled, dtype, mesh, source=source, **how)


def _check_bytes(memory: object, step_bytes: object) -> None:
    """Check the sizes that `plan` gets in bytes."""
    if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int) or memory < 1):
        raise ConfigError(f"memory must be a positive integer, the bytes of a device, got {memory!r}")
    if isinstance(step_bytes, bool) or not isinstance(step_bytes, int) or step_bytes < 0:
        raise ConfigError(f"step_bytes must be an integer of at least 0, bytes of a device, got {step_bytes!r}")


def cache_plan(
    module: LanguageModel, config: EngineConfig, dtype: jnp.dtype, mesh: Mesh | AbstractMesh, draft_bytes: int = 0
) -> CachePlan:
    """Count the bytes of a model's cache per device, in the same way as the engine.

    Args:
        module: the model, abstract or with weights.
        config: its block size, and how keys and values are stored.
        dtype: dtype of states, and of keys and values that are not quantised.
        mesh: mesh of the devices.
        draft_bytes: bytes that a block takes on each device in the cache of a draft model.
    """
    specs, block_size = with_codes(module.cache_specs(), config.kv_cache_dtype), config.block_size
    cache_layout = groups.layout(specs)
    layers = []
    for layer, (spec, stored) in enumerate(
        zip(specs, kv_cache.abstract(specs, 1, block_size, dtype, mesh), strict=True)
    ):
        arrays = jax.tree.leaves(stored)
        whole, size = (
            bool(arrays) and all(array.sharding.is_fully_replicated for array in arrays),
            sum(map(placement.device_bytes, arrays)),
        )
        sizes = {"state_device_bytes" if isinstance(spec, State) else "block_device_bytes": size}
        layers.append(CacheLayer(layer, whole, **sizes, encoded=spec.kind.encoded))
    # A block id takes memory in all arrays; a block of a sequence takes one id in each of its groups.
    block = kv_cache.block_bytes(cache_layout.array_specs, block_size, dtype, mesh) // mesh.size + draft_bytes
    encoded = groups.encoded(cache_layout.kinds)
    return CachePlan(
        block_size,
        tuple(layers),
        block * groups.count(groups.own(cache_layout.kinds)),
        block * (encoded.count if encoded else 0),
    )


def _with_states(made: Plan, config: EngineConfig) -> Plan:
    """Return the plan with the numbers of sequences and state slots that the engine would choose on a GPU."""
    if not made.cache_bytes or not made.cache.state_device_bytes:
        return made
    rows = config.max_num_seqs or min(slots_of.GPU_SEQUENCES, config.max_num_batched_tokens or slots_of.GPU_SEQUENCES)
    sequences, slots = slots_of.divide(config, rows, made.cache.state_device_bytes, made.cache_bytes)
    return replace(made, cache=replace(made.cache, sequences=sequences, state_slots=slots))


def _sampling(module: LanguageModel, dtype: jnp.dtype) -> list[Exchange]:
    """List the collectives with which the sampler compares logits that the head leaves sharded."""
    shards = max(getattr(part, "logit_shards", 0) for _, part, _ in placement.walk(module))
    return [placement.exchange("sampler", made, STEPS, dtype.itemsize) for made in sampler.collectives(shards)]


def read_model_config(
    model: str | Path | Mapping[str, Any], revision: str | None = None, overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the contents of the config.json of a folder or Hub id, with overrides; raises as `plan`."""
    return _find(model, revision, overrides)[1]


def _find(
    model: str | Path | Mapping[str, Any], revision: str | None, overrides: Mapping[str, Any] | None
) -> tuple[Path | None, dict[str, Any]]:
    """Return the folder, if there is one, and the contents of config.json."""
    if isinstance(model, Mapping):
        return None, apply_overrides(model, overrides)
    directory = resolve_model(model, revision, patterns=FILES)
    return directory, read_config(directory, overrides)


def _settings(
    config: EngineConfig, hf: Mapping[str, Any], directory: Path | None, model_family: Family
) -> tuple[jnp.dtype, dict[str, Any]]:
    """Choose the dtype, assuming a GPU, and the build options of the module, as `loading.load` would.

    If config.json states no dtype, that of the weights in the folder is used, or else the family's default.
    """
    how = {
        "quantization": config.quantization,
        "placement": Placement.of(config.placement),
        "pad_heads": config.pad_heads,
    }
    manifest = None if directory is None else Manifest.read(directory)
    stored = weights.config_dtype(hf) if manifest is None else manifest.dtype
    if config.dtype == "auto" and not stored:
        stored = _stored(directory) or model_family.stored_dtype
        log.warning("config.json states no dtype; the plan assumes %s: pass dtype to change it", stored)
    dtype = weights.resolve_dtype(config.dtype, stored, "gpu", model_family)
    if manifest is not None and directory is not None:
        how = manifest.resolve_options(directory, dtype, requested=config.dtype != "auto", **how)
    return dtype, how


def _stored(directory: Path | None) -> str:
    """Return the dtype of a folder's weights; empty if it has none."""
    if directory is None or not any(directory.glob("*.safetensors")):
        return ""
    with SafetensorsReader(directory) as reader:
        return weights.stored_dtype(reader)


def _mesh(mesh: Any, shards: int) -> Mesh | AbstractMesh:
    if isinstance(mesh, Mesh | AbstractMesh):
        return mesh
    sizes = {axes.MODEL: shards} if mesh is None else mesh
    if not isinstance(sizes, Mapping) or not sizes:
        raise TypeError(f"mesh must be a jax.sharding.Mesh or the sizes of its axes by name, got {mesh!r}")
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(f"mesh: the size of axis {name!r} must be a positive integer, got {size!r}")
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _title(model: Any, hf: Mapping[str, Any]) -> str:
    kind = ", ".join(map(str, hf.get("architectures") or []))
    return kind if isinstance(model, Mapping) else f"{model} ({kind})"
