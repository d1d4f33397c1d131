"""Admission: whether a waiting sequence gets a row, and with which cached prefix, blocks and encoder inputs."""

from jaxinfer.engine.encoder_cache import EncoderCache
from jaxinfer.engine.inflight_prefixes import LEAST_SHARED, InflightPrefixes
from jaxinfer.engine.plan import Limits
from jaxinfer.engine.request import Sequence
from jaxinfer.engine.rows import Rows
from jaxinfer.kv.interface import CacheManager
from jaxinfer.kv.prefix_match import Hit


class Admission:
    """Admits waiting sequences to rows; what a failed admission found is kept in the sequence until it changes."""

    def __init__(
        self,
        manager: CacheManager,
        rows: Rows,
        limits: Limits,
        inflight: InflightPrefixes,
        encoder_cache: EncoderCache,
    ):
        self.limits = limits
        self._manager, self._rows = manager, rows
        self._inflight, self._encoder_cache = inflight, encoder_cache

    def lacks_blocks(self, sequence: Sequence) -> bool:
        """Return whether the cache still has too few blocks for a sequence that failed admission, in O(1).

        Returns False if more of its prompt has been published since.
        """
        if sequence.needed_blocks <= 0 or self._manager.pool.num_available >= sequence.needed_blocks:
            return False
        return sequence.first_missing is None or sequence.first_missing not in self._manager.index

    def waits_for_prefix(self, sequence: Sequence) -> bool:
        """Return whether a waiting sequence should wait for a prefix that another request is computing."""
        if sequence.candidates is not None or self._inflight.still_waits(sequence):
            return True
        findable = self._findable(sequence)
        if not self._inflight or sequence.pending or not findable:
            return False
        key = self._inflight.version, sequence.length
        if sequence.checked_inflight == key:
            return False
        self._chain(sequence)
        size = self._manager.block_size
        waits = self._inflight.should_wait(sequence, (findable - 1) // size, LEAST_SHARED * self.limits.tokens / size)
        sequence.checked_inflight = None if waits else key
        return waits

    def admit(self, sequence: Sequence, budget: int) -> bool:
        """Admit a waiting sequence: assign a row and allocate blocks for all known tokens, if they fit.

        For layers with a window only the blocks of the first chunk, of at most `budget` tokens, are allocated.
        """
        manager, request = self._manager, sequence.request
        encoded = manager.lookup_encoded(request.encoded)
        if encoded.missing and not self._encoder_cache.has_cross_room(request.cross, self.limits.encode_units):
            return False
        hit = self._lookup(sequence)
        row, found = self._rows.free[-1], hit.blocks * manager.block_size
        reservation = self._encoder_cache.find_room(sequence, found)
        if not reservation.fits:
            return False
        chunk_end = min(sequence.length, found + budget)
        seen = (0, 0) if request.cross is None else tuple(request.cross.seen(len(request.prompt), 1)[0].tolist())
        if not manager.admit(row, hit, sequence.length, chunk_end, encoded, seen):
            sequence.needed_blocks = manager.needed(hit, sequence.length, chunk_end, encoded)
            missing = () if self._skips_cache(sequence) else sequence.digests[hit.known : hit.known + 1]
            sequence.first_missing = next(iter(missing), None)
            return False
        self._rows.take(sequence)
        self._encoder_cache.pin(sequence, reservation)
        self._encoder_cache.add_cross(request.cross, manager.encoder_writes(row))
        self._start(sequence, hit)
        return True

    def _start(self, sequence: Sequence, hit: Hit) -> None:
        """Let an admitted sequence start after its prefix hit."""
        request, found = sequence.request, hit.blocks * self._manager.block_size
        sequence.computed = found
        sequence.prefilled = sequence.length
        sequence.published = sequence.hit_blocks = hit.blocks
        sequence.stale = False
        self._inflight.register(sequence)
        if sequence.made == 0 and sequence.index == 0:
            request.cached_tokens, request.hits = found, hit.kinds
            skips = self._skips_cache(sequence)
            request.miss_reason = "the request needs more of its prompt computed" if skips else hit.reason

    def _findable(self, sequence: Sequence) -> int:
        """Return the number of leading tokens of which all but the last may be found in the prefix cache.

        Log-probabilities, hidden states and experts of a prompt's tokens are not kept there.
        """
        request = sequence.request
        if request.wanted is not None:
            return request.wanted.first + 1 if request.wanted.first else 0
        if self.limits.whole_prompts or (request.params.prompt_logprobs is not None and sequence.made == 0):
            return 0
        return sequence.length

    def _skips_cache(self, sequence: Sequence) -> bool:
        """Return whether some of the sequence's tokens must be computed although they are cached."""
        return self._findable(sequence) < sequence.length

    def _chain(self, sequence: Sequence) -> None:
        """Update the sequence's block digests to all known tokens."""
        if self._manager.prefix_caching:
            tokens = sequence.tokens[: sequence.length]
            extras = sequence.request.extras
            sequence.digests = self._manager.digests(tokens, sequence.root, sequence.digests, extras)

    def _lookup(self, sequence: Sequence) -> Hit:
        """Return the prefix hit of a waiting sequence, looked up again only after the prefix index has changed."""
        key = self._manager.index_version, sequence.length
        if sequence.last_hit is None or sequence.last_hit[0] != key:
            self._chain(sequence)
            tokens, extras = sequence.tokens[: self._findable(sequence)], sequence.request.extras
            sequence.last_hit = key, self._manager.lookup(tokens, sequence.digests, sequence.root, extras)
        return sequence.last_hit[1]
