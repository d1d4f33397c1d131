"""Check that a request fits in the cache before it is queued, and clamp its length to what fits."""

import logging
from functools import cache

from jaxinfer.engine.request import Request
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.engine.sizing.settings import HostSettings
from jaxinfer.errors import CapacityError
from jaxinfer.kv.groups import blocks_of_beams, longest
from jaxinfer.media import PlacedInputs

log = logging.getLogger(__name__)


class Capacity:
    """Capacity of a runner's cache under an engine's settings."""

    def __init__(self, runner: Runner, settings: HostSettings):
        self._shapes, self._program, self._settings = runner.shapes, runner.program, settings
        self._kinds = runner.program.layout.kinds
        self.tokens = cache(self._tokens)
        self._said_clamped = False

    @property
    def longest(self) -> int:
        """Maximum tokens of a sequence whose blocks fit in the pool beside the longest encoder input."""
        return self.tokens(0 if self._program.cross is None else self._program.cross.longest)

    def _tokens(self, read: int) -> int:
        """Return the maximum tokens of a sequence beside `read` encoder positions; `tokens` caches the result."""
        shapes, settings = self._shapes, self._settings
        if shapes.contiguous:
            return shapes.max_length
        most = max(settings.pool_blocks * shapes.block_size, shapes.max_length)
        return longest(self._kinds, settings.pool_blocks, shapes.block_size, settings.token_budget, most, read)

    def check(self, request: Request) -> None:
        """Check that a request can be served once nothing else runs.

        Raises:
            CapacityError: its prompt or its beams never fit in the pool, or its images in the feature pool.
        """
        read = 0 if request.cross is None else request.cross.length
        capacity = self.tokens(read)
        if len(request.prompt) + (request.wanted is None) > capacity:
            beside = f" beside the {read} positions that its encoder reads" if read else ""
            raise CapacityError(
                f"a prompt of {len(request.prompt)} tokens can never fit in the cache: with the first token of its "
                f"output it needs {len(request.prompt) + 1}, and the cache holds {capacity} tokens{beside} "
                f"({self._settings.pool_blocks} blocks of {self._shapes.block_size}); shorten the prompt, or raise "
                "kv_cache_memory_bytes, or pool_blocks where that is set"
            )
        if request.beams is not None:
            self._check_beams(request, read)
        if request.inputs is not None:
            self._check_inputs(request.inputs)

    def clamp(self, request: Request) -> None:
        """Clamp a request's maximum length to the cache's capacity; log the first time that this reduces it."""
        prompt, asked = len(request.prompt), request.limit if request.asked is None else request.asked
        request.limit = min(request.limit, self.tokens(0 if request.cross is None else request.cross.length))
        if request.limit >= asked:
            return
        request.clamped_max_tokens = request.limit - prompt
        if not self._said_clamped:
            self._said_clamped = True
            log.warning(
                "request %s: max_tokens lowered to %d from %d: the cache holds sequences of at most %d tokens and the "
                "prompt has %d; raise kv_cache_memory_bytes (or pool_blocks, if set). Logged once; each such result "
                "has metrics.clamped_max_tokens",
                request.id,
                request.limit - prompt,
                asked - prompt,
                request.limit,
                prompt,
            )

    def _check_beams(self, request: Request, read: int) -> None:
        shapes, width = self._shapes, request.beams.params.width
        if width > shapes.rows:
            raise CapacityError(
                f"a beam search of width {width} runs {width} sequences at a time, more than max_num_seqs = "
                f"{shapes.rows}; lower width, or make the LLM with max_num_seqs={width}"
            )
        if shapes.contiguous:
            return
        size, pool = shapes.block_size, self._settings.pool_blocks
        lengths = len(request.prompt), request.limit, read
        needed = blocks_of_beams(self._kinds, lengths, width, size, self._settings.token_budget)
        if needed > pool:
            raise CapacityError(
                f"a beam search of width {width} over a prompt of {len(request.prompt)} tokens and "
                f"{request.limit - len(request.prompt)} more takes up to {needed} blocks of {size}, and the cache has "
                f"{pool}; lower width or max_tokens, or raise kv_cache_memory_bytes, or pool_blocks where that is set"
            )

    def _check_inputs(self, inputs: PlacedInputs) -> None:
        slots, needed = self._shapes.feature_slots, sum(one.count for one in inputs.distinct().values())
        if needed > slots:
            rows = inputs.inputs[0].rows
            tiles, of = f" {needed} tiles ({needed * rows} tokens)", f"{slots} tiles of {rows} tokens"
            if self._program.features.joint is not None:
                tiles, of = f" {needed} tokens", f"{slots} tokens"
            raise CapacityError(
                f"a prompt whose images have{tiles} can never fit in the feature cache: it holds {of}; pass fewer or "
                f"smaller images, or make the LLM with feature_cache_tokens={needed * rows}"
            )
