"""Read the state of an engine's cache (`recording.cache_state`)."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import TypeAlias

import numpy as np

from jaxinfer.engine.engine import Engine
from jaxinfer.engine.recorder import MOST_WAITING, block_codes, owner_of
from jaxinfer.engine.request import Sequence
from jaxinfer.kv.digests import TOKEN_BYTES
from jaxinfer.kv.manager import BlockManager
from jaxinfer.kv.prefix_node import Node
from jaxinfer.recording.cache_state import CacheState, Prefix, RequestState

Decode: TypeAlias = Callable[[tuple[int, ...]], str]
MOST_PREFIXES = 500
"""Number of entries of the prefix tree that are read."""


def read(engine: Engine, decode: Decode | None = None, *, tree: bool = True) -> CacheState:
    """Return the state of the cache; runs on the engine thread, between two steps.

    Args:
        engine: the engine.
        decode: returns the text of tokens.
        tree: whether to read the prefix tree, which costs as much as it has blocks.
    """
    scheduler, manager, counters = engine.scheduler, engine.manager, engine.metrics.counters
    active = scheduler.rows.active
    shown = [*active, *islice(scheduler.waiting, MOST_WAITING)]
    numbers = {sequence: _number(engine, sequence, place) for place, sequence in enumerate(shown)}
    prefixes, more = prefix_tree(manager, decode) if tree and isinstance(manager, BlockManager) else ([], 0)
    return CacheState(
        codes=block_codes(manager, active, numbers.__getitem__),
        block_size=manager.block_size,
        groups=len(manager.tables.blocks),
        requests=tuple(_state(engine, sequence, numbers[sequence]) for sequence in shown),
        waiting=len(scheduler.waiting),
        queried_tokens=counters["prefix_cache_queries"],
        hit_tokens=counters["prefix_cache_hits"],
        lookups=dict(engine.metrics.lookups),
        preemptions=scheduler.preempted,
        compiling=engine.is_compiling,
        prefixes=tuple(prefixes),
        more_prefixes=more,
    )


def _number(engine: Engine, sequence: Sequence, place: int) -> int:
    """Return a sequence's number in the recording, so that both show it in one colour; without a recording, `place`."""
    return place if engine.recorder is None else engine.recorder.number(sequence)


def _state(engine: Engine, sequence: Sequence, number: int) -> RequestState:
    scheduler, owner = engine.scheduler, owner_of(sequence, number)
    if sequence.row < 0:
        return RequestState(owner, "preempted" if sequence.made else "waiting", 0, 0)
    phase = "decode" if scheduler.rows.decoding[sequence.row] else "prefill"
    length = scheduler.manager.length(sequence.row)
    return RequestState(owner, phase, len(scheduler.manager.blocks_of(sequence.row)), length)


def prefix_tree(manager: BlockManager, decode: Decode | None = None) -> tuple[list[Prefix], int]:
    """List the prefix tree depth first, chains of blocks with the same number of holders as one entry.

    Args:
        manager: the cache's manager.
        decode: returns the text of tokens.

    Returns:
        At most `MOST_PREFIXES` entries, and the number of nodes that they leave out.
    """
    nodes = {node.digest: node for node in manager.index.all_nodes()}
    children: dict[bytes, list[Node]] = {}
    for node in nodes.values():
        children.setdefault(node.parent if node.parent in nodes else b"", []).append(node)
    refs, made, seen = manager.pool.refs, [], 0
    left = [(0, node) for node in reversed(children.get(b"", []))]
    while left and len(made) < MOST_PREFIXES:
        depth, node = left.pop()
        chain = list(_chain(node, children, refs))
        seen += len(chain)
        made.append(_entry(manager, depth, chain, refs, decode))
        left += [(depth + 1, child) for child in reversed(children.get(chain[-1].digest, []))]
    return made, len(nodes) - seen


def _chain(node: Node, children: dict[bytes, list[Node]], refs: np.ndarray) -> Iterator[Node]:
    """Yield a node and its only descendants while they have the same number of holders."""
    yield node
    while len(following := children.get(node.digest, [])) == 1 and _refs(following[0], refs) == _refs(node, refs):
        node = following[0]
        yield node


def _refs(node: Node, refs: np.ndarray) -> int:
    """Return how many sequences hold a node's blocks: the maximum over its kinds, as windows release theirs."""
    return max((int(refs[i]) for ids in node.ids for i in ids if i < len(refs)), default=0)


def _entry(manager: BlockManager, depth: int, chain: list[Node], refs: np.ndarray, decode: Decode | None) -> Prefix:
    holders = _refs(chain[0], refs)
    if manager.encoded.kind is not None and chain[0].ids[len(manager.tables.kinds) - 1]:
        return Prefix(depth, len(chain), holders, (), "encoder input")
    size = manager.block_size * TOKEN_BYTES
    tokens = tuple(np.frombuffer(b"".join(node.content[:size] for node in chain), "<i4").tolist())
    return Prefix(depth, len(chain), holders, tokens, text=None if decode is None else decode(tokens))
