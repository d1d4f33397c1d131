"""Log an engine's memory use and the resulting sizes at startup."""

import logging

from jaxinfer._utils.units import size_text
from jaxinfer.config import EngineConfig
from jaxinfer.engine.runner.shapes import Shapes
from jaxinfer.engine.sizing.memory import Budget, MemoryUse
from jaxinfer.engine.sizing.slots import SLOTS_PER_ROW
from jaxinfer.functional import Program
from jaxinfer.kv import cache as kv_cache

log = logging.getLogger(__name__)


def report(
    program: Program, config: EngineConfig, shapes: Shapes, budget: Budget, use: MemoryUse, longest: int
) -> None:
    """Log the chosen sizes of an engine.

    Args:
        program: static part of the model.
        config: engine settings.
        shapes: chosen shapes.
        budget: memory that the cache may take.
        use: memory use of a device.
        longest: maximum tokens of a sequence by the model and `max_model_len`.
    """
    taken = _states(program, config, shapes)
    if shapes.feature_slots:
        log.info(
            "feature cache: %d tiles of images, %d tokens (feature_cache_tokens)"
            if program.features.joint is None
            else "feature cache: %d patches of images, %d tokens (feature_cache_tokens)",
            shapes.feature_slots,
            shapes.feature_slots * program.features.rows,
        )
    block = program.block_bytes(config.block_size)
    sizes = size_text(shapes.num_blocks * block), size_text(budget.size - taken), budget.source
    if program.kv_cache_dtype != "auto":
        log.info("keys and values are stored in %s (kv_cache_dtype)", program.kv_cache_dtype)
    if shapes.contiguous:
        _contiguous(shapes, longest, sizes)
    else:
        _paged(shapes, longest, sizes)
    log.info("%s", use)


def _contiguous(shapes: Shapes, longest: int, sizes: tuple[str, str, str]) -> None:
    """Log the rows of a contiguous cache; `sizes`: memory used, memory available, its origin."""
    if shapes.max_length < longest:
        log.warning(
            "max_model_len is %d, as many tokens as each of %d rows of the contiguous cache holds; the model allows "
            "%d: max_num_seqs and max_model_len share the memory",
            shapes.max_length,
            shapes.rows,
            longest,
        )
    log.info("contiguous cache: %d rows of %d tokens, %s of %s (%s)", shapes.rows, shapes.max_length, *sizes)


def _paged(shapes: Shapes, longest: int, sizes: tuple[str, str, str]) -> None:
    """Log the blocks of a paged cache; `sizes` as in `_contiguous`."""
    if shapes.max_length < longest:
        log.warning(
            "max_model_len is %d, as many tokens as the cache holds; the model allows %d", shapes.max_length, longest
        )
    log.info(
        "cache: %d blocks of %d tokens, %s of %s (%s); max_model_len %d",
        shapes.num_blocks,
        shapes.block_size,
        *sizes,
        shapes.max_length,
    )


def _states(program: Program, config: EngineConfig, shapes: Shapes) -> int:
    """Log the slots of recurrent state and return their size in bytes."""
    if not shapes.state_slots:
        return 0
    each = kv_cache.slot_bytes(program.layout.states, program.mesh)
    log.info(
        "recurrent state: %d slots of %s, %d of them for snapshots (snapshot_memory_fraction %g)",
        shapes.state_slots,
        size_text(each),
        shapes.state_slots - SLOTS_PER_ROW * shapes.rows,
        config.snapshot_memory_fraction,
    )
    return shapes.state_slots * each
