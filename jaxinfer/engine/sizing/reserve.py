"""How many rows of which length the memory of a contiguous cache holds."""

from jaxinfer._utils.units import size_text
from jaxinfer.config import EngineConfig
from jaxinfer.engine.sizing.memory import Budget
from jaxinfer.errors import CapacityError


def reserve(
    config: EngineConfig, rows: int, longest: int, read: int, budget: Budget, block_bytes: int
) -> tuple[int, int]:
    """Rows, and the longest sequence that each of them holds.

    What was not asked for is fitted to the memory: first the rows, then the length.

    Args:
        config: the settings.
        rows: the most there may be; exactly as many where `max_num_seqs` was asked for.
        longest: tokens that the model, or `max_model_len`, allows.
        read: positions of what an encoder reads, for which a row has as much room again.
        budget: what the cache may take over all devices.
        block_bytes: of one block in every group of layers.

    Raises:
        CapacityError: what was asked for does not fit.
    """
    block = config.block_size
    blocks, wanted = budget.size // block_bytes, -(-max(longest, read) // block)
    if config.max_num_seqs is None:
        rows = max(1, min(rows, blocks // wanted))
    width = min(wanted, blocks // rows)
    length = min(longest, width * block)
    if length < 2 or width * block < read or (length < longest and config.max_model_len is not None):
        raise CapacityError(
            f"the contiguous cache of {size_text(budget.size)} ({budget.source}) holds {rows} rows (max_num_seqs) of "
            f"{width * block} positions; rows of the required {max(longest, read)} positions need "
            f"{size_text(rows * wanted * block_bytes)}; {budget.remedy}, or lower max_model_len or max_num_seqs"
        )
    return rows, length
