"""Choose the number and length of the rows of a contiguous cache."""

from jaxinfer._utils.units import size_text
from jaxinfer.config import EngineConfig
from jaxinfer.engine.sizing.memory import Budget
from jaxinfer.errors import CapacityError


def reserve(
    config: EngineConfig, rows: int, longest: int, read: int, budget: Budget, block_bytes: int
) -> tuple[int, int]:
    """Return the number of rows and the maximum length of a sequence.

    Settings that the user did not give are fitted to the memory: first the rows, then the length.

    Args:
        config: engine settings.
        rows: maximum number of rows; exactly as many if `max_num_seqs` is set.
        longest: maximum tokens of a sequence by the model and `max_model_len`.
        read: maximum encoder positions of a row, which have the same blocks again.
        budget: memory that the cache may take over all devices.
        block_bytes: bytes of one block in all groups of layers.

    Raises:
        CapacityError: the requested rows or length do not fit.
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
