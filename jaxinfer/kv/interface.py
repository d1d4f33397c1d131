"""What the engine asks of a cache: the paged one (`kv.manager`) and the contiguous one (`kv.contiguous`) answer."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxinfer.kv.cross_cache import Encoded, EncodedBlocks, EncodedHit
from jaxinfer.kv.prefix import Extras
from jaxinfer.kv.prefix_match import Hit
from jaxinfer.kv.recurrent import RecurrentStates
from jaxinfer.kv.tables import Tables


@runtime_checkable
class CacheManager(Protocol):
    """The host's view of a cache. Each method succeeds as a whole or changes nothing.

    Where `prefix_caching` is on there are also `digests`, `extend_digests` and `publish` of the paged cache.
    """

    prefix_caching: bool
    block_size: int
    """P."""
    tables: Tables
    """Lengths of rows, and their blocks where these are not a function of the row."""
    encoded: EncodedBlocks
    states: RecurrentStates | None
    """Where the states of recurrent layers are, if there are such."""

    @property
    def pool(self) -> Any:
        """Has `num_blocks` and, of them, `num_held`; where `needed` is not 0 also `num_available`."""
        ...

    def lookup(self, tokens: np.ndarray, digests: Sequence[bytes], root: bytes, extras: Extras) -> Hit:
        """The longest usable prefix."""
        ...

    def lookup_encoded(self, content: Encoded | None) -> EncodedHit:
        """What is there of what an encoder reads."""
        ...

    def admit(self, row: int, hit: Hit, tokens: int, reach: int | None, encoded: EncodedHit) -> bool:
        """Gives an empty row to a sequence of `tokens` positions; whether there is room, of some kinds up to
        `reach`."""
        ...

    def needed(self, hit: Hit, tokens: int, reach: int | None, encoded: EncodedHit) -> int:
        """Blocks that must be available for such an admission; 0 where it is no matter of blocks."""
        ...

    def extend(self, row: int, start: int, stop: int) -> bool:
        """Before positions [start, stop) of its prompt are computed: whether there is room."""
        ...

    def grow(self, rows: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Makes place for more positions in each row, or None. Blocks to be copied, from and to, before they write."""
        ...

    def fork(self, source: int, target: int) -> None:
        """Lets row `target` go on from where row `source` is; what it had itself is given up."""
        ...

    def free(self, row: int, digests: Sequence[bytes]) -> None:
        """Empties a row."""
        ...

    def publish_encoded(self, row: int) -> None:
        """The step that writes what a row's encoder read is dispatched."""
        ...

    def take_evicted(self) -> None:
        """A plan is decided: what was evicted for it is found no more."""
        ...

    def withdraw(self, digests: Sequence[bytes]) -> None:
        """These blocks were found bad."""
        ...

    def reset_index(self) -> None:
        """Forgets all that was published."""
        ...

    def check(self) -> None:
        """Raises `PoolInvariantError` where the accounting does not add up."""
        ...
