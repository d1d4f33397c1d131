"""Build an engine from a model and the settings: choose, check and log its sizes."""

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import jax

from jaxinfer._utils.units import size_text
from jaxinfer.config import CONTIGUOUS, CPU_CACHE_BYTES, EngineConfig
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.runner.programs import Programs
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.engine.runner.shapes import Shapes
from jaxinfer.engine.sizing import deterministic, memory
from jaxinfer.engine.sizing.bucket_sizes import (
    cross_buckets,
    decode_buckets,
    encode_buckets,
    joint_buckets,
    prefill_buckets,
    verify_buckets,
)
from jaxinfer.engine.sizing.memory import Budget, MemoryUse
from jaxinfer.engine.sizing.report import report
from jaxinfer.engine.sizing.reserve import reserve
from jaxinfer.engine.sizing.settings import HostSettings
from jaxinfer.engine.sizing.slots import GPU_SEQUENCES, state_slots
from jaxinfer.errors import CapacityError, ConfigError
from jaxinfer.functional import Program, split
from jaxinfer.functional.taps import EXPERTS, LAST, normalise
from jaxinfer.kv import groups as kv_groups
from jaxinfer.models.base import LanguageModel, ModelConfig
from jaxinfer.sharding import Mesh
from jaxinfer.speculative_config import DRAFT_MODEL

log = logging.getLogger(__name__)


def build_engine(
    module: LanguageModel,
    config: EngineConfig,
    mesh: Mesh,
    *,
    sampled_vocab: int | None = None,
    draft: LanguageModel | None = None,
) -> Engine:
    """Build the engine of a loaded module.

    Args:
        module: the model.
        config: engine settings.
        mesh: device mesh of the parameters.
        sampled_vocab: number of token ids that may be sampled; higher ones are padding of the embedding.
        draft: draft model of speculative decoding, on the same mesh.

    Raises:
        ConfigError: settings contradict each other or the model.
        CapacityError: the cache is too small, or too large for the memory; names the sizes and the setting.
    """
    speculative = config.speculative_config
    if (draft is not None) != (speculative is not None and speculative.method == DRAFT_MODEL):
        raise ConfigError(
            f"speculative_config: a draft model and method '{DRAFT_MODEL}' go together; pass both or neither"
        )
    kernels = ("attention_kernel", "matmul_kernel", "fuse_projections", "kv_cache_dtype")
    how = {name: getattr(config, name) for name in kernels}
    program, params = split(module, mesh, deterministic=config.deterministic, **how)
    draft_params: list[jax.Array] = []
    if draft is not None:
        own, draft_params = split(draft, mesh, **how)
        program = replace(program, draft=own)
    if config.deterministic:
        config = deterministic.settings(config, program)
    weights = params, draft_params
    shapes, programs, use = _size(module.config, program, weights, config, sampled_vocab or program.vocab)
    with _cache_in_memory(shapes, program, config):
        runner = Runner(
            program,
            params,
            shapes,
            draft_params=draft_params,
            compiler_options=config.compiler_options,
            programs=programs,
            memory=use,
        )
    if named := _named(config):
        runner.programs.captured(named)
    engine = Engine(runner, HostSettings.of(config, runner))
    if engine.capacity.longest < shapes.max_length:
        log.warning(
            "pool_blocks=%d lets a sequence have %d tokens, less than max_model_len = %d",
            config.pool_blocks,
            engine.capacity.longest,
            shapes.max_length,
        )
    return engine


@contextmanager
def _cache_in_memory(shapes: Shapes, program: Program, config: EngineConfig) -> Iterator[None]:
    """Say that the cache does not fit where the device's memory ends while it is allocated."""
    try:
        yield
    except (RuntimeError, MemoryError, ValueError) as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "memory" not in str(error).lower():
            raise
        needed = shapes.num_blocks * program.block_bytes(config.block_size)
        raise CapacityError(
            f"the cache of {shapes.num_blocks} blocks ({size_text(needed)}) does not fit in the device's memory; "
            "lower kv_cache_memory_bytes or gpu_memory_utilization"
        ) from error


def _size(
    model: ModelConfig, program: Program, weights: Sequence[list[jax.Array]], config: EngineConfig, vocab: int
) -> tuple[Shapes, Programs | None, MemoryUse]:
    """Choose the shapes of the steps and log them; return them with the programs compiled to measure memory, if any.

    `weights`: parameters of the model, and of its draft model.
    """
    params, draft_params = weights

    def choose(budget: Budget) -> Shapes:
        made = choose_shapes(model, program, config, budget)
        return replace(made, sampled_vocab=min(vocab, program.vocab))

    budget, device = default_budget(program, config), None
    if config.kv_cache_memory_bytes is None:
        device = memory.device_memory(program.mesh, [*params, *draft_params], config.gpu_memory_utilization)
    if device is None:
        shapes, programs = choose(budget), None
        use = memory.memory_use(program, [*params, *draft_params], shapes)
    else:
        fitted = memory.fit(program, params, config, device, choose, draft_params=draft_params)
        shapes, programs, use, budget = fitted.shapes, fitted.programs, fitted.use, fitted.budget
    report(program, config, shapes, budget, use, longest_sequence(model, config))
    return shapes, programs, use


def choose_shapes(
    model: ModelConfig,
    program: Program,
    config: EngineConfig,
    budget: Budget,
    *,
    platform: str | None = None,
) -> Shapes:
    """Choose the shapes of the compiled steps from the settings, the model and the cache's budget.

    Args:
        model, program: the model.
        config: engine settings.
        budget: memory for the cache.
        platform: of the devices that the shapes are for, "cpu" or "gpu"; by default the mesh's.
    """
    gpu = (platform or _platform(program)) != "cpu"
    rows, tokens = _step_sizes(config, gpu=gpu)
    block, images = config.block_size, feature_slots(program, config, tokens)
    longest = longest_sequence(model, config)
    rows, slots, taken = state_slots(program, config, rows, budget)
    budget = replace(budget, size=budget.size - taken)
    read = 0 if program.cross is None else program.cross.longest
    if config.cache == CONTIGUOUS:
        block_bytes = program.layout.groups * program.block_bytes(config.block_size)
        rows, length = reserve(config, rows, longest, read, budget, block_bytes)
        num_blocks = rows * program.layout.groups * math.ceil(max(length, read) / block)
    else:
        num_blocks, length = _pool(program, config, rows, longest, read, tokens, budget)
    prefills = prefill_buckets(program, config, tokens, gpu=gpu)
    return Shapes(
        num_blocks=num_blocks,
        block_size=block,
        rows=rows,
        width=math.ceil(max(length, read) / block),
        decode_buckets=decode_buckets(program, config, rows, gpu=gpu),
        prefill_buckets=prefills,
        prefill_rows=min(rows, 64 if gpu else 16),
        max_logprobs=config.max_logprobs,
        max_length=length,
        sampled_vocab=program.vocab,
        groups=program.layout.groups,
        switched=not gpu,
        feature_slots=images,
        encode_buckets=encode_buckets(program, min(images, length), gpu=gpu),
        cross_buckets=cross_buckets(program, tokens, gpu=gpu),
        contiguous=config.cache == CONTIGUOUS,
        state_slots=slots,
        logprobs_mode=config.logprobs_mode,
        capture=_capture(config),
        verify_buckets=verify_buckets(program, config, rows, gpu=gpu),
        draft_tokens=0 if program.draft is None else config.speculative_config.num_speculative_tokens,
        joint_buckets=joint_buckets(program, config, rows, prefills, gpu=gpu),
    )


def _step_sizes(config: EngineConfig, *, gpu: bool) -> tuple[int, int]:
    """Return the running sequences and the tokens of a step: those of the settings, or the default.

    Raises:
        ConfigError: a step has fewer tokens than there are sequences.
    """
    rows = config.max_num_seqs or min(GPU_SEQUENCES if gpu else 64, config.max_num_batched_tokens or 1 << 30)
    tokens = config.max_num_batched_tokens or max(2048 if gpu else 512, rows)
    if tokens < rows:
        raise ConfigError(
            f"max_num_batched_tokens is {tokens}, less than max_num_seqs = {rows}: each running sequence takes a token "
            "of every step; raise the first or lower the second"
        )
    return rows, tokens


def _capture(config: EngineConfig) -> tuple[str, ...]:
    """Return the modules whose outputs all steps return: those of a deterministic engine, which has one program."""
    own = (LAST, *_named(config)) if config.deterministic else _named(config)[len(config.capture) :]
    return tuple(dict.fromkeys(own))


def _named(config: EngineConfig) -> tuple[str, ...]:
    """Return the outputs that the settings request of every step: module paths, then the experts."""
    return (*map(normalise, config.capture), *([EXPERTS] if config.return_routed_experts else []))


def _pool(
    program: Program, config: EngineConfig, rows: int, longest: int, read: int, tokens: int, budget: Budget
) -> tuple[int, int]:
    """Return the blocks of the paged cache and the longest sequence that they hold; a step computes up to `tokens`."""
    block = config.block_size
    needed = partial(kv_groups.blocks_needed, program.layout.kinds, block_size=block, chunk=tokens, read=read)
    lengths = [read if kind.kind.encoded else longest for kind in program.layout.kinds]
    # Number of blocks if those that sliding windows have left behind stay cached.
    most = rows * sum(
        kind.count * math.ceil(length / block) for kind, length in zip(program.layout.kinds, lengths, strict=True)
    )
    num_blocks = min(budget.size // program.block_bytes(block), most)
    capacity = kv_groups.longest(program.layout.kinds, num_blocks, block, tokens, longest, read)
    return num_blocks, _check_length(capacity, longest, needed(longest), budget, program, config)


def _platform(program: Program) -> str:
    return program.mesh.devices.flat[0].platform


def longest_sequence(model: ModelConfig, config: EngineConfig) -> int:
    """Return the maximum tokens of a sequence: `max_model_len`, by default the model's.

    Raises:
        ConfigError: `max_model_len` exceeds the model's maximum.
    """
    requested = config.max_model_len
    if requested is not None and requested > model.max_length:
        raise ConfigError(
            f"max_model_len is {requested}, more than the {model.max_length} tokens that the model supports "
            "(max_position_embeddings); lower it"
        )
    return requested or model.max_length


def feature_slots(program: Program, config: EngineConfig, tokens: int) -> int:
    """Return the number of encoder inputs whose features fit in the feature pool; 0 without an encoder.

    By default eight times those of a step of `tokens`.

    Raises:
        ConfigError: the pool is smaller than one input.
    """
    if program.features is None:
        return 0
    rows, requested = program.features.rows, config.feature_cache_tokens
    if requested is not None and requested < rows:
        raise ConfigError(f"feature_cache_tokens is {requested}, but one tile of an image takes {rows}; raise it")
    return max(8 * tokens // rows, 16) if requested is None else requested // rows


def default_budget(program: Program, config: EngineConfig) -> Budget:
    """Return the budget that the settings give, or the default of a device without a memory limit."""
    if config.kv_cache_memory_bytes is None:
        return Budget(CPU_CACHE_BYTES, "the default on a CPU; kv_cache_memory_bytes sets it")
    _check_host(program, config.kv_cache_memory_bytes)
    return Budget(config.kv_cache_memory_bytes, "kv_cache_memory_bytes")


def _check_host(program: Program, size: int) -> None:
    """Refuse a cache larger than the host's memory: the system would overcommit it and kill the process later."""
    if _platform(program) != "cpu" or not hasattr(os, "sysconf"):
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise CapacityError(
            f"kv_cache_memory_bytes is {size} ({size_text(size)}), more than this machine's memory of "
            f"{size_text(memory)}; lower it"
        )


def _check_length(
    capacity: int, longest: int, blocks: int, budget: Budget, program: Program, config: EngineConfig
) -> int:
    """Return the longest sequence that can be served: `longest`, which needs `blocks` blocks, or else `capacity`."""
    block = program.block_bytes(config.block_size)
    if capacity < 2:
        read = 0 if program.cross is None else program.cross.longest
        least = block * kv_groups.blocks_needed(program.layout.kinds, 2, config.block_size, 2, read)
        what = (
            f"the {read} positions that an encoder may read, {size_text(least)}"
            if read
            else f"one block of {size_text(least)}"
        )
        raise CapacityError(
            f"the cache may take {size_text(budget.size)} ({budget.source}), less than {what}; {budget.remedy}"
        )
    if capacity < longest and config.max_model_len is not None:
        needed = blocks * block
        raise CapacityError(
            f"the cache of {size_text(budget.size)} ({budget.source}) holds {capacity} tokens, less than "
            f"max_model_len = {longest}, which needs {size_text(needed)}; lower max_model_len, or {budget.remedy}"
        )
    return min(capacity, longest)
