"""How many slots recurrent state gets of the cache's memory."""

import logging

from jaxinfer.config import EngineConfig
from jaxinfer.errors import CapacityError
from jaxinfer.functional import Program
from jaxinfer.kv import cache as kv_cache
from jaxinfer.units import size_text

log = logging.getLogger(__name__)

A_ROW = 2
"""Slots a running sequence may need in one step: the state it reads and the one it writes (`kv.recurrent`)."""


def state_slots(
    program: Program, config: EngineConfig, rows: int, memory: tuple[int, str]
) -> tuple[int, int, int]:
    """Sequences at a time, slots, and what of the memory (bytes, where they come from) these take; none where no layer has
    a state.

    `rows`: of those sequences at most; where the user did not say how many, as many as half of the memory is enough for.

    Raises:
        CapacityError: not enough for as many as the user wants.
    """
    if not program.layout.states:
        return rows, 0, 0
    (given, source), each = memory, kv_cache.slot_bytes(program.layout.states, program.mesh)
    if config.max_num_seqs is None:
        rows = max(1, min(rows, given // (2 * A_ROW * each)))
    least, snapshots = A_ROW * rows, int(given * config.snapshot_memory_fraction) // each
    slots = least + (snapshots if config.enable_prefix_caching else 0)
    if slots * each >= given:
        most = int(given * (1 - config.snapshot_memory_fraction)) // (A_ROW * each)
        raise CapacityError(
            f"max_num_seqs is {rows}: their recurrent states take {size_text(least * each)} ({A_ROW} slots of "
            f"{size_text(each)} each), and snapshots {size_text(snapshots * each)}, of {size_text(given)} ({source}) that "
            f"keys and values need some of as well; lower max_num_seqs to less than {max(1, most)}, or raise "
            "kv_cache_memory_bytes"
        )
    log.info(
        "recurrent state: %d slots of %s, %d of them for snapshots (snapshot_memory_fraction %g)", slots, size_text(each),
        slots - least, config.snapshot_memory_fraction,
    )  # fmt: skip
    return rows, slots, slots * each
