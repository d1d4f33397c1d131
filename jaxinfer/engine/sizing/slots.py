"""Choose the number of slots of recurrent state, a part of the cache's memory."""

from jaxinfer._utils.units import size_text
from jaxinfer.config import EngineConfig
from jaxinfer.engine.sizing.memory import Budget
from jaxinfer.errors import CapacityError
from jaxinfer.functional import Program
from jaxinfer.kv import cache as kv_cache

GPU_SEQUENCES = 256
"""Default of max_num_seqs on a GPU."""
SLOTS_PER_ROW = 2
"""Slots a running sequence may need in one step: the state it reads and the one it writes (`kv.recurrent`)."""


def state_slots(program: Program, config: EngineConfig, rows: int, budget: Budget) -> tuple[int, int, int]:
    """Return the maximum number of running sequences, the number of state slots, and the bytes of these slots.

    Models without recurrent layers have no slots.

    Args:
        program: static part of the model.
        config: engine settings.
        rows: maximum number of running sequences; unless `max_num_seqs` is set, lowered to what fits in half of the
            memory.
        budget: memory of cache and states.

    Raises:
        CapacityError: the memory does not suffice for `max_num_seqs` sequences.
    """
    if not program.layout.states:
        return rows, 0, 0
    given, each = budget.size, kv_cache.slot_bytes(program.layout.states, program.mesh)
    rows, slots = divide(config, rows, each, given)
    least = SLOTS_PER_ROW * rows
    if slots * each >= given:
        most = int(given * (1 - config.snapshot_memory_fraction)) // (SLOTS_PER_ROW * each)
        raise CapacityError(
            f"max_num_seqs is {rows}: recurrent states take {size_text(least * each)} ({SLOTS_PER_ROW} slots of "
            f"{size_text(each)} for each sequence) and their snapshots {size_text((slots - least) * each)}, which "
            f"leaves nothing for keys and values of the cache's {size_text(given)} ({budget.source}); lower "
            f"max_num_seqs to less than {max(1, most)}, or {budget.remedy}"
        )
    return rows, slots, slots * each


def divide(config: EngineConfig, rows: int, each: int, given: int) -> tuple[int, int]:
    """Return the maximum number of running sequences, and the number of slots for them and for snapshots.

    Args:
        config: engine settings.
        rows: maximum number of running sequences.
        each: bytes of one slot in all recurrent layers.
        given: bytes of cache and states; both on one device, or both on all.
    """
    if config.max_num_seqs is None:
        rows = max(1, min(rows, given // (2 * SLOTS_PER_ROW * each)))
    snapshots = int(given * config.snapshot_memory_fraction) // each if config.enable_prefix_caching else 0
    return rows, SLOTS_PER_ROW * rows + snapshots
