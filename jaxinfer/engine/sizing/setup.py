"""From a model and the settings to an engine: sizes chosen, checked and logged."""

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxinfer._utils.units import size_text
from jaxinfer.config import CONTIGUOUS, CPU_CACHE_BYTES, EngineConfig
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.engine.runner.steps import Shapes
from jaxinfer.engine.sizing.reserve import reserve
from jaxinfer.engine.sizing.settings import HostSettings
from jaxinfer.engine.sizing.slots import GPU_SEQUENCES, state_slots
from jaxinfer.engine.sizing.workspace import peak_bytes
from jaxinfer.errors import CapacityError, ConfigError
from jaxinfer.functional import Program, encode_cross, split
from jaxinfer.functional.encoder_batch import EncodeBatch, EncodeShape
from jaxinfer.kernels.matmul import choose as matmul
from jaxinfer.kv import cache as kv_cache
from jaxinfer.kv import groups as kv_groups
from jaxinfer.models.base import LanguageModel, ModelConfig
from jaxinfer.sharding import Mesh
from jaxinfer.sharding import mesh as meshes

log = logging.getLogger(__name__)

CPU_DECODE, CPU_PREFILL = (1, 2, 4, 8, 16), (32, 64)
"""The first sizes of steps. On a CPU a step takes as long as it has places, so that half steps pay from some size
on."""
CPU_ENCODE, GPU_ENCODE = (1, 2, 4, 8), (1, 2, 4, 8, 16, 32)
"""Inputs of an encoder step: each is whole, so that what is left is encoded in a smaller step, not padded."""
CPU_CROSS, GPU_CROSS = (1, 2, 4), (1, 2, 4, 8, 16)
"""The same for cross-attention, of audio and images; texts have the sizes of prefill steps, up to the longest."""
GPU_DECODE, GPU_PREFILL = (1, 8, 32), (256, 512)
"""On a GPU a small step takes as long as reading the weights, however few its places are."""


def build_engine(
    module: LanguageModel, config: EngineConfig, mesh: Mesh, *, sampled_vocab: int | None = None
) -> Engine:
    """An engine for a module whose weights are in place.

    `sampled_vocab`: token ids from there on are padding of the embedding and are never sampled.

    Raises:
        ConfigError: settings that contradict each other or the model.
        CapacityError: a cache too small, or too large for the memory; names the sizes and the setting.
    """
    program, params = split(
        module,
        mesh,
        attention_kernel=config.attention_kernel,
        matmul_kernel=config.matmul_kernel,
        fuse_projections=config.fuse_projections,
    )
    shapes = choose_shapes(module.config, program, config, params)
    shapes = replace(shapes, sampled_vocab=min(sampled_vocab or program.vocab, program.vocab))
    try:
        runner = Runner(program, params, shapes, compiler_options=config.compiler_options)
    except (RuntimeError, MemoryError, ValueError) as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "memory" not in str(error).lower():
            raise
        needed = shapes.num_blocks * _block_bytes(program, config)
        raise CapacityError(
            f"the cache of {shapes.num_blocks} blocks ({size_text(needed)}) does not fit in the device's memory; "
            "lower kv_cache_memory_bytes or gpu_memory_utilization"
        ) from error
    engine = Engine(runner, HostSettings.of(config, runner))
    if engine.capacity.longest < shapes.max_length:
        log.warning(
            "pool_blocks=%d lets a sequence have %d tokens, less than max_model_len = %d",
            config.pool_blocks,
            engine.capacity.longest,
            shapes.max_length,
        )
    return engine


def choose_shapes(
    model: ModelConfig, program: Program, config: EngineConfig, params: Sequence[jax.Array] = ()
) -> Shapes:
    """What fixes the compiled steps, from the settings, the model and the memory.

    `params`: of the model, whose encoder's step is measured by them where the memory is to be divided.
    """
    gpu = _platform(program) != "cpu"
    native = matmul.choose(config.matmul_kernel, program.mesh) == matmul.NATIVE
    rows = config.max_num_seqs or min(GPU_SEQUENCES if gpu else 64, config.max_num_batched_tokens or 1 << 30)
    budget = config.max_num_batched_tokens or max(2048 if gpu else 512, rows)
    if budget < rows:
        raise ConfigError(
            f"max_num_batched_tokens is {budget}, less than max_num_seqs = {rows}: each running sequence takes a token "
            "of every step; raise the first or lower the second"
        )
    block = config.block_size
    longest = _longest(model, config)
    features = _feature_bytes(program, feature_slots(program, config, budget))
    beside = features
    if gpu and params and program.cross is not None and config.kv_cache_memory_bytes is None:
        beside += encoder_bytes(program, params, max(_cross_buckets(program, budget, gpu=gpu)))
    budget_bytes, source = _cache_bytes(program, config, beside)
    rows, slots, taken = state_slots(program, config, rows, (budget_bytes, source))
    budget_bytes -= taken
    read = 0 if program.cross is None else program.cross.longest
    if config.cache == CONTIGUOUS:
        block_bytes = program.layout.groups * _block_bytes(program, config)
        rows, length = reserve(config, rows, longest, read, (budget_bytes, source), block_bytes)
        num_blocks = rows * program.layout.groups * math.ceil(max(length, read) / block)
    else:
        num_blocks, length = _pool(program, config, rows, longest, read, budget, (budget_bytes, source))
    decode, prefill = (GPU_DECODE, GPU_PREFILL) if gpu else (CPU_DECODE, CPU_PREFILL)
    if not gpu and not native:
        decode = CPU_DECODE[2:]  # XLA on a CPU takes ten times as long for one row of bfloat16 as for four
    return Shapes(
        num_blocks=num_blocks,
        block_size=block,
        rows=rows,
        width=math.ceil(max(length, read) / block),
        decode_buckets=_buckets(config.decode_buckets, rows, decode, "decode_buckets", halves=not gpu),
        prefill_buckets=_buckets(config.prefill_buckets, budget, prefill, "prefill_buckets", halves=True),
        prefill_rows=min(rows, 64 if gpu else 16),
        max_logprobs=config.max_logprobs,
        max_length=length,
        sampled_vocab=program.vocab,
        groups=program.layout.groups,
        switched=not gpu,
        feature_slots=feature_slots(program, config, budget),
        encode_buckets=() if program.features is None else GPU_ENCODE if gpu else CPU_ENCODE,
        cross_buckets=_cross_buckets(program, budget, gpu=gpu),
        contiguous=config.cache == CONTIGUOUS,
        state_slots=slots,
    )


def _pool(
    program: Program, config: EngineConfig, rows: int, longest: int, read: int, budget: int, memory: tuple[int, str]
) -> tuple[int, int]:
    """Blocks of the paged cache, and the longest sequence that they hold, where a step takes `budget` tokens."""
    (budget_bytes, source), block = memory, config.block_size
    needed = partial(kv_groups.blocks_needed, program.layout.kinds, block_size=block, chunk=budget, read=read)
    lengths = [read if kind.kind.encoded else longest for kind in program.layout.kinds]
    # With all that windows leave behind cached.
    most = rows * sum(
        kind.count * math.ceil(length / block) for kind, length in zip(program.layout.kinds, lengths, strict=True)
    )
    num_blocks = min(budget_bytes // _block_bytes(program, config), most)
    capacity = kv_groups.longest(program.layout.kinds, num_blocks, block, budget, longest, read)
    length = _check_length(capacity, longest, needed(longest), budget_bytes, source, program, config)
    used = num_blocks * _block_bytes(program, config)
    log.info(
        "cache: %d blocks of %d tokens, %s of %s (%s); max_model_len %d",
        num_blocks,
        block,
        size_text(used),
        size_text(budget_bytes),
        source,
        length,
    )
    return num_blocks, length


def encoder_bytes(program: Program, params: Sequence[Any], units: int) -> int:
    """Bytes that a step of so many values needs on a device, at most, to encode them for cross-attention.

    `params`: of the model, or their shapes.
    """
    source, groups = program.cross, kv_groups.encoded(program.layout.kinds).count
    shape = EncodeShape(units, source.rows, groups, units, program.tile)
    array, lanes = jax.ShapeDtypeStruct, kv_cache.abstract(program.layout.lanes, 1, 1, program.dtype, program.mesh)
    integers = {name: array(size, np.int32) for name, size in shape.shapes.items()}
    inputs = array((units, *source.shape), np.float32 if source.shape else np.int32)
    batch = EncodeBatch(inputs, array((units, source.numbers), np.int32), **integers, tile=shape.tile)
    shapes = [array(param.shape, param.dtype) for param in params]
    size = peak_bytes(jax.make_jaxpr(partial(encode_cross, program))(shapes, lanes, batch))
    log.info("encoder: up to %s for a step of %d positions", size_text(size), shape.positions)
    return size


def _cross_buckets(program: Program, budget: int, *, gpu: bool) -> tuple[int, ...]:
    """Values of an encoder step for cross-attention: a whole text fits in the largest, and several short ones."""
    if program.cross is None:
        return ()
    if not program.cross.joint:
        return GPU_CROSS if gpu else CPU_CROSS
    largest = max(budget, program.cross.longest // program.cross.rows)
    return _buckets(None, largest, GPU_PREFILL if gpu else CPU_PREFILL, "cross_buckets", halves=True)


def _platform(program: Program) -> str:
    return program.mesh.devices.flat[0].platform


def _block_bytes(program: Program, config: EngineConfig) -> int:
    return kv_cache.block_bytes(program.layout.lanes, config.block_size, program.dtype, program.mesh)


def _longest(model: ModelConfig, config: EngineConfig) -> int:
    asked = config.max_model_len
    if asked is not None and asked > model.max_length:
        raise ConfigError(
            f"max_model_len is {asked}, but the model's numbers hold for {model.max_length} tokens "
            "(max_position_embeddings); lower it"
        )
    return asked or model.max_length


def feature_slots(program: Program, config: EngineConfig, budget: int) -> int:
    """Inputs of the encoder whose rows the feature pool holds, where a step takes `budget` tokens; 0 without an
    encoder.

    Raises:
        ConfigError: a pool that does not hold one.
    """
    if program.features is None:
        return 0
    rows, asked = program.features.rows, config.feature_cache_tokens
    if asked is not None and asked < rows:
        raise ConfigError(f"feature_cache_tokens is {asked}, but one tile of an image takes {rows}; raise it")
    return max(8 * budget // rows, 16) if asked is None else asked // rows


def _feature_bytes(program: Program, slots: int) -> int:
    """Bytes of the feature pool on each device."""
    if not slots:
        return 0
    rows = slots * program.features.rows
    size = rows * program.feature_width * program.dtype.itemsize
    log.info(
        "feature cache: %d tiles of images, %d tokens, %s a device (feature_cache_tokens)", slots, rows, size_text(size)
    )
    return size


def _cache_bytes(program: Program, config: EngineConfig, beside: int) -> tuple[int, str]:
    """The memory the cache may take over all devices, and why as much; on a GPU `beside` bytes a device are left."""
    if config.kv_cache_memory_bytes is not None:
        _check_host(program, config.kv_cache_memory_bytes)
        return config.kv_cache_memory_bytes, "kv_cache_memory_bytes"
    if _platform(program) == "cpu":
        return CPU_CACHE_BYTES, "the default on a CPU; kv_cache_memory_bytes sets it"
    free = max(0, _least_free(program.mesh) - beside)
    share = config.gpu_memory_utilization
    total = int(free * share) * program.mesh.size
    reason = (
        f"gpu_memory_utilization {share} of the {size_text(free)} a device that JAX's allocator may still give; it "
        "takes "
        "75% of the memory at start, XLA_CLIENT_MEM_FRACTION changes that"
    )
    return total, reason


def _least_free(mesh: Mesh) -> int:
    """Of the mesh's devices; each process sees its own, and all must come to the same number."""
    free = min(_free(device) for device in mesh.local_devices)
    if meshes.processes(mesh) > 1:
        free = int(np.min(multihost_utils.process_allgather(np.int32(free >> 20)))) << 20  # JAX's integers have 32 bits
    return free


def _free(device: jax.Device) -> int:
    stats = device.memory_stats() or {}
    return max(0, stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0))


def _check_host(program: Program, size: int) -> None:
    """On a CPU the system would hand out memory it does not have, and kill the process later."""
    if _platform(program) != "cpu" or not hasattr(os, "sysconf"):
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise CapacityError(
            f"kv_cache_memory_bytes is {size} ({size_text(size)}), more than this machine's memory of "
            f"{size_text(memory)}; lower it"
        )


def _check_length(
    capacity: int, longest: int, blocks: int, given: int, source: str, program: Program, config: EngineConfig
) -> int:
    """The longest sequence that can be served: `longest`, which takes so many blocks, or `capacity`."""
    block = _block_bytes(program, config)
    if capacity < 2:
        read = 0 if program.cross is None else program.cross.longest
        least = block * kv_groups.blocks_needed(program.layout.kinds, 2, config.block_size, 2, read)
        what = (
            f"the {read} positions that an encoder may read, {size_text(least)}"
            if read
            else f"one block of {size_text(least)}"
        )
        raise CapacityError(
            f"the cache may take {size_text(given)} ({source}), less than {what}; raise kv_cache_memory_bytes"
        )
    if capacity >= longest:
        return longest
    if config.max_model_len is not None:
        needed = blocks * block
        raise CapacityError(
            f"the cache of {size_text(given)} ({source}) holds {capacity} tokens, less than max_model_len = {longest}, "
            "which "
            f"needs {size_text(needed)}; raise kv_cache_memory_bytes or lower max_model_len"
        )
    log.warning("max_model_len is %d, as many tokens as the cache holds; the model allows %d", capacity, longest)
    return capacity


def _buckets(
    asked: Sequence[int] | None, largest: int, first: Sequence[int], name: str, *, halves: bool
) -> tuple[int, ...]:
    """What was asked for; by default the first sizes, doubled on and on, with those half-way between if `halves`."""
    if asked is not None:
        if max(asked) < largest:
            raise ConfigError(f"{name} ends at {max(asked)}, but up to {largest} are needed; add a bucket of {largest}")
        return tuple(sorted(set(asked)))
    sizes = list(first)
    while (size := sizes[-1]) < largest:
        sizes += [size * 3 // 2, size * 2] if halves else [size * 2]
    # One that is nearly the largest spares little.
    return (*(size for size in sizes if size * 4 <= largest * 3), largest)
