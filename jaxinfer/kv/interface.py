"""Interface between the engine and a cache: `kv.manager` (paged) and `kv.contiguous` implement it."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxinfer.kv.cross_cache import Encoded, EncodedHit
from jaxinfer.kv.digests import Extras
from jaxinfer.kv.prefix_match import Hit
from jaxinfer.kv.recurrent import Segment
from jaxinfer.kv.tables import Tables


@runtime_checkable
class CacheManager(Protocol):
    """Host-side manager of a cache. Each method either succeeds as a whole or changes nothing.

    With `prefix_caching` a manager also has `digests`, `extend_digests` and `publish` of the paged cache.
    """

    prefix_caching: bool
    block_size: int
    """P."""
    tables: Tables
    """Lengths of rows, and their block tables unless these are computed from the row number. Only the manager writes
    them.
    """

    @property
    def pool(self) -> Any:
        """Memory use: `num_blocks`, `num_held`, and `num_available` if `needed` can be non-zero."""
        ...

    @property
    def index_version(self) -> int:
        """Number that changes whenever `lookup` may find another hit."""
        ...

    @property
    def usage(self) -> float:
        """Share of the blocks in use; may be read from any thread while a step runs."""
        ...

    def blocks_of(self, row: int) -> np.ndarray:
        """Return the ids of all blocks that a row in use holds."""
        ...

    def cached_blocks(self) -> np.ndarray:
        """Return the ids of the blocks that no row holds and that keep a prefix."""
        ...

    def lookup(self, tokens: np.ndarray, digests: Sequence[bytes], root: bytes, extras: Extras) -> Hit:
        """Find the longest usable cached prefix."""
        ...

    def lookup_encoded(self, content: Encoded | None) -> EncodedHit:
        """Find the blocks of an encoder input."""
        ...

    def admit(
        self,
        row: int,
        hit: Hit,
        tokens: int,
        chunk_end: int | None,
        encoded: EncodedHit,
        seen: tuple[int, int],
    ) -> bool:
        """Admit a sequence of `tokens` positions to an empty row; False if there is no room.

        Kinds that are filled chunk by chunk get blocks up to position `chunk_end` only. Its new tokens see the encoder
        positions `seen`.
        """
        ...

    def needed(self, hit: Hit, tokens: int, chunk_end: int | None, encoded: EncodedHit) -> int:
        """Return the available blocks that `admit` with these arguments needs; 0 if admission needs no blocks."""
        ...

    def extend(self, row: int, start: int, stop: int) -> bool:
        """Prepare a row for computing positions [start, stop) of its prompt; False if there is no room."""
        ...

    def grow(self, rows: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Make room for `steps` more positions in each row.

        Returns:
            Source and target block ids of the copies that must run before the rows write, or None if there is no room.
        """
        ...

    def begin_plan(self) -> None:
        """Begin a plan of the next step."""
        ...

    def length(self, row: int) -> int:
        """Return the number of positions of a row that the steps planned so far write."""
        ...

    def advance(self, rows: np.ndarray, steps: int) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
        """Let each row write `steps` more positions; return the first ones, and the state slots of each step."""
        ...

    def advance_drafts(self, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Let each row write `tokens` more positions in one step; return the first ones."""
        ...

    def take_back(self, row: int, tokens: int) -> None:
        """Forget the last positions of a row."""
        ...

    def advance_prompt(self, row: int, stop: int) -> tuple[Segment, ...]:
        """Let a row write its prompt up to position `stop`; return the parts after which states are stored."""
        ...

    def encoder_writes(self, row: int) -> np.ndarray | None:
        """Return the blocks that the next step writes a row's encoder input to; None if it writes none."""
        ...

    def fork(self, source: int, target: int) -> None:
        """Make row `target` continue from row `source`; discards the target's own sequence."""
        ...

    def free(self, row: int, digests: Sequence[bytes]) -> None:
        """Empty a row."""
        ...

    def publish_encoded(self, row: int) -> None:
        """Mark a row's encoder input as written: the step that writes it is dispatched."""
        ...

    def resend(self, rows: Sequence[int]) -> None:
        """Send the block tables of these rows to the device again, as a step that sent them was dropped."""
        ...

    def take_evicted(self) -> None:
        """Remove blocks evicted by the current plan from the prefix index, once the plan is decided."""
        ...

    def withdraw(self, digests: Sequence[bytes]) -> None:
        """Unpublish the blocks with these digests, whose content was found to be bad."""
        ...

    def reset_index(self) -> None:
        """Unpublish all blocks."""
        ...

    def check(self) -> None:
        """Check the accounting.

        Raises:
            PoolInvariantError: an invariant is violated.
        """
        ...
