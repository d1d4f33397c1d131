"""Tree view of a placement plan, in which equal layers are folded into one node."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from jaxinfer.sharding.placement_rows import Exchange, Placed, Row
from jaxinfer.sharding.policy import REPLICATE


@dataclass(frozen=True)
class Node:
    """A module, or adjacent modules that differ only in their number."""

    path: str
    """Path of the first module."""
    last: str
    """Path of the last module; equal to `path` for a single module."""
    count: int
    """Number of modules."""
    rows: tuple[Row, ...]
    """Parameters of the first module, without those of submodules."""
    exchanges: tuple[Exchange, ...]
    """Collectives of the first module, without those of submodules."""
    children: tuple["Node", ...]
    """Submodules."""
    device_bytes: int
    """Bytes of all modules including submodules, on each device."""
    copied_bytes: int
    """Bytes among them that are the same on every device."""

    @property
    def name(self) -> str:
        """Path, or first and last path."""
        return self.path if self.count == 1 else f"{self.path} ... {self.last}"

    @property
    def label(self) -> str:
        """Last part of the path; for a layer's number also the part before it."""
        ends = [path.split(".")[-2:] for path in dict.fromkeys((self.path, self.last))]
        return " ... ".join(".".join(end if end[-1].isdigit() else end[-1:]) for end in ends)

    @property
    def placed(self) -> str:
        """ "sharded", "replicated", "both", or "" for modules without weights.

        Small replicated parameters, such as norm scales, do not make a sharded module "both".
        """
        if not self.device_bytes:
            return ""
        if self.copied_bytes == self.device_bytes:
            return "replicated"
        return "both" if REPLICATE in self._tactics() else "sharded"

    def _tactics(self) -> frozenset[str]:
        return frozenset(row.tactic for row in self.rows).union(*(child._tactics() for child in self.children))

    def collectives(self, step: str) -> Counter[str]:
        """Count a step's collectives by kind, over all modules and their submodules."""
        found = Counter(exchange.collective.kind for exchange in self.exchanges if step in exchange.steps)
        for child in self.children:
            found += child.collectives(step)
        return Counter({kind: count * self.count for kind, count in found.items()})


def tree(plan: Placed) -> Node:
    """Build the tree of the whole model; parts without weights, such as the sampler, are included."""
    copied = plan.devices if plan.devices > 1 else 0
    items = [(tuple(row.path.split(".")[:-1]), row) for row in plan.rows]
    items += [(tuple(exchange.module.split(".")), exchange) for exchange in plan.exchanges]
    return _node((), items, lambda row: row.copies == copied)


_Item = tuple[tuple[str, ...], Row | Exchange]


def _node(path: tuple[str, ...], items: Sequence[_Item], copied: Callable[[Row], bool]) -> Node:
    """Build the node at `path` from items with the paths of their modules, all of which start with `path`."""
    own = [item for at, item in items if at == path]
    parts: dict[str, list[_Item]] = {}
    for at, item in items:
        if at != path:
            parts.setdefault(at[len(path)], []).append((at, item))
    children = _fold([_node((*path, name), inside, copied) for name, inside in parts.items()])
    rows = tuple(item for item in own if isinstance(item, Row))
    return Node(
        ".".join(path),
        ".".join(path),
        1,
        rows,
        tuple(item for item in own if isinstance(item, Exchange)),
        children,
        sum(row.device_bytes for row in rows) + sum(child.device_bytes for child in children),
        sum(row.device_bytes for row in rows if copied(row)) + sum(child.copied_bytes for child in children),
    )


def _fold(nodes: Iterable[Node]) -> tuple[Node, ...]:
    """Merge adjacent numbered nodes that are equal."""
    folded = []
    for _, group in groupby(nodes, lambda node: (node.path.split(".")[-1].isdigit() or node.path, _shape(node))):
        first, *others = group
        count = 1 + len(others)
        folded.append(
            Node(
                first.path,
                others[-1].path if others else first.path,
                count,
                first.rows,
                first.exchanges,
                first.children,
                first.device_bytes * count,
                first.copied_bytes * count,
            )
        )
    return tuple(folded)


def _shape(node: Node) -> tuple:
    """Return a node's content without its path, to compare modules that differ only in location."""
    start = len(node.path)
    rows = [
        (row.path[start:], row.tactic, row.shape, row.dtype, row.logical_axes, tuple(row.spec), row.copies)
        for row in node.rows
    ]
    exchanges = [(exchange.collective, exchange.steps, exchange.row_bytes) for exchange in node.exchanges]
    return tuple(rows), tuple(exchanges), tuple((c.path[start:], c.count, _shape(c)) for c in node.children)
