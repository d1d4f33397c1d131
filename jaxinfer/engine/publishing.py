"""Publication of full blocks in the prefix index, once the steps that write them are dispatched."""

from jaxinfer.engine.inflight_prefixes import InflightPrefixes
from jaxinfer.engine.plan import Plan
from jaxinfer.engine.request import Sequence
from jaxinfer.engine.sequence_state import Status
from jaxinfer.kv.interface import CacheManager


class Publisher:
    """Publishes the blocks of running sequences, and knows which of them a plan is still to write."""

    def __init__(self, manager: CacheManager, inflight: InflightPrefixes):
        self._manager, self._inflight = manager, inflight
        self._unwritten: dict[Sequence, int] = {}
        """Number of the last positions of each sequence that a plan which is not dispatched yet will write."""

    def hold(self, plan: Plan) -> None:
        """Publish nothing of what a plan writes until `end_hold`."""
        self._unwritten = {
            **{chunk.sequence: chunk.count for chunk in plan.chunks},
            **{sequence: plan.chunks[number].count for number, sequence in plan.samples},
            **dict(zip(plan.decodes, plan.tokens, strict=True)),
        }

    def end_hold(self) -> None:
        """Forget the plan that was held, as it is dispatched or dropped."""
        self._unwritten = {}

    def publish(self, sequence: Sequence) -> None:
        """Publish the sequence's full blocks whose tokens are known and whose writing steps have been dispatched."""
        manager = self._manager
        if not manager.prefix_caching or sequence.status is not Status.RUNNING or sequence.stale:
            return
        written = manager.length(sequence.row)
        if self._unwritten:
            written -= self._unwritten.get(sequence, 0)
        written = min(written, sequence.length)
        full, digests = written // manager.block_size, sequence.digests
        if full <= sequence.published:
            return
        tokens = sequence.tokens[: full * manager.block_size]
        # Only new blocks are hashed and copied, however long the sequence is.
        extras = sequence.request.extras
        manager.extend_digests(digests, tokens, sequence.root, extras)
        manager.publish(sequence.row, tokens, digests, sequence.root, sequence.published, full, extras)
        if self._inflight:
            self._inflight.unregister(sequence, full)
        sequence.published = full
