"""How many slots recurrent state gets of the cache's memory."""

from jaxinfer._utils.units import size_text
from jaxinfer.config import EngineConfig
from jaxinfer.engine.sizing.memory import Budget
from jaxinfer.errors import CapacityError
from jaxinfer.functional import Program
from jaxinfer.kv import cache as kv_cache

GPU_SEQUENCES = 256
"""Sequences that run at a time at most on a GPU, where max_num_seqs does not say."""
A_ROW = 2
"""Slots a running sequence may need in one step: the state it reads and the one it writes (`kv.recurrent`)."""


def state_slots(program: Program, config: EngineConfig, rows: int, budget: Budget) -> tuple[int, int, int]:
    """Sequences at a time, slots, and what of the memory (bytes, where they come from) these take; none where no layer
    has a state.

    `rows`: of those sequences at most; where the user did not say how many, as many as half of the memory is enough
        for.

    Raises:
        CapacityError: not enough for as many as the user wants.
    """
    if not program.layout.states:
        return rows, 0, 0
    given, each = budget.size, kv_cache.slot_bytes(program.layout.states, program.mesh)
    rows, slots = divide(config, rows, each, given)
    least = A_ROW * rows
    if slots * each >= given:
        most = int(given * (1 - config.snapshot_memory_fraction)) // (A_ROW * each)
        raise CapacityError(
            f"max_num_seqs is {rows}: recurrent states take {size_text(least * each)} ({A_ROW} slots of "
            f"{size_text(each)} for each sequence) and their snapshots {size_text((slots - least) * each)}, which "
            f"leaves nothing for keys and values of the cache's {size_text(given)} ({budget.source}); lower "
            f"max_num_seqs to less than {max(1, most)}, or {budget.remedy}"
        )
    return rows, slots, slots * each


def divide(config: EngineConfig, rows: int, each: int, given: int) -> tuple[int, int]:
    """Return the sequences that may run at a time, and the slots that they and snapshots get of the cache's memory.

    Args:
        config: the settings.
        rows: the most sequences.
        each: bytes of one slot in all recurrent layers.
        given: bytes of the cache; both on one device, or both on all.
    """
    if config.max_num_seqs is None:
        rows = max(1, min(rows, given // (2 * A_ROW * each)))
    snapshots = int(given * config.snapshot_memory_fraction) // each if config.enable_prefix_caching else 0
    return rows, A_ROW * rows + snapshots
